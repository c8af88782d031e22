//! Machines with a few instructions of 16-bit real mode to run.
//!
//! These tests need a /dev/kvm; any does, also one that emulates guest kernels. Where there is none they say so and
//! pass: then they prove something in the project's test host only.

use std::time::Instant;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use kvm_ioctls::VcpuFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::{ActivateError, Activation};

mod capture;

const CODE: u64 = 0x1000;
/// `mov al, 0xfe; out 0x64, al`: the end of a guest.
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// `again: inc dword es:[0x2000]; jmp again`
const COUNT: [u8; 8] = [0x66, 0x26, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf8];

/// A machine whose vCPU runs `code`, with DS at the registers of slot 0 and ES at 0. None without KVM.
fn machine(code: &[u8]) -> Option<Machine> {
    let kvm = match host::open_kvm() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("nothing is tested here: {error}");
            return None;
        }
    };
    let machine = Machine::without_kernel(&kvm, 1, 16 << 20, 2).unwrap();
    machine.memory.write_slice(code, GuestAddress(CODE)).unwrap();
    if let Processors::Waiting(vcpus) = &*machine.processors() {
        set_up(vcpus[0].fd(), CODE);
    }
    Some(machine)
}

fn set_up(vcpu: &VcpuFd, code: u64) {
    let mut system = vcpu.get_sregs().unwrap();
    (system.cs.base, system.cs.selector) = (0, 0);
    (system.ds.base, system.ds.limit, system.ds.g) = (layout::slot_address(0).0, 0xffff, 0);
    vcpu.set_sregs(&system).unwrap();
    vcpu.set_regs(&kvm_regs { rip: code, rflags: 2, ..Default::default() }).unwrap();
}

fn wait_for_end(machine: &Machine) -> ExitReason {
    let mut ends = [PollFd::new(machine.exit_event(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut ends, timeout).unwrap(), 1, "the guest did not end");
    machine.exit_reason().unwrap()
}

/// Waits until `condition` holds.
fn eventually(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A device that does nothing, with two queues.
struct Idle;

impl VirtioDevice for Idle {
    fn device_type(&self) -> u32 {
        0x41
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

#[test]
fn a_guest_writes_to_the_console_and_ends_by_reset() {
    // mov dx, 0x3f8; mov al, 'A'; out dx, al
    let hello = [0xba, 0xf8, 0x03, 0xb0, b'A', 0xee];
    let Some(machine) = machine(&[&hello[..], &RESET].concat()) else { return };
    assert_eq!((machine.exit_reason(), machine.timeline().kernel_entry), (None, None));
    machine.start().unwrap();
    assert_eq!(wait_for_end(&machine), ExitReason::Reset);
    assert_eq!(machine.console(), "A");
    assert_eq!(machine.exits(), 1);
    assert!(machine.timeline().kernel_entry.unwrap() >= machine.timeline().kvm_ready);
    machine.stop();
    assert_eq!(machine.exit_reason(), Some(ExitReason::Reset));
    assert!(matches!(machine.start(), Err(MachineError::StartedTwice)));
}

/// mov eax, [register]; mov dx, 0x3f8; out dx, eax
fn print(register: u8) -> [u8; 9] {
    [0x66, 0xa1, register, 0x00, 0xba, 0xf8, 0x03, 0x66, 0xef]
}

#[test]
fn a_device_appears_in_its_slot() {
    let (magic, device) = (print(0), print(8));
    let code = [&magic[..], &device, &RESET].concat();
    let Some(empty) = machine(&code) else { return };
    empty.start().unwrap();
    assert_eq!(wait_for_end(&empty), ExitReason::Reset);
    assert_eq!(empty.console(), "virt\0\0\0\0");

    let Some(plugged) = machine(&code) else { return };
    plugged.plug(0, Box::new(Idle)).unwrap();
    plugged.start().unwrap();
    assert_eq!(wait_for_end(&plugged), ExitReason::Reset);
    assert_eq!(plugged.console(), "virtA\0\0\0");
}

#[test]
fn a_kick_of_a_queue_does_not_leave_the_kernel() {
    // mov dword [0x50], 1; mov dword [0x50], 2
    let notify = |queue| [0x66, 0xc7, 0x06, 0x50, 0x00, queue, 0x00, 0x00, 0x00];
    let Some(machine) = machine(&[&notify(1)[..], &notify(2), &RESET].concat()) else { return };
    machine.plug(0, Box::new(Idle)).unwrap();
    machine.start().unwrap();
    assert_eq!(wait_for_end(&machine), ExitReason::Reset);
    assert_eq!(machine.exits(), 1, "only the queue that does not exist");
}

#[test]
fn an_interrupt_is_handled_without_leaving_the_kernel() {
    // mov eax, [0x60]; mov dword [0x64], reasons
    let acknowledge =
        |reasons| [0x66, 0xa1, 0x60, 0x00, 0x66, 0xc7, 0x06, 0x64, 0x00, reasons, 0x00, 0x00, 0x00];
    let Some(machine) = machine(&[&acknowledge(1)[..], &acknowledge(3), &RESET].concat()) else { return };
    machine.plug(0, Box::new(Idle)).unwrap();
    machine.start().unwrap();
    assert_eq!(wait_for_end(&machine), ExitReason::Reset);
    assert_eq!(machine.exits(), 1, "only where the configuration has changed");
}

#[test]
fn slots_take_one_device_at_a_time() {
    let Some(machine) = machine(&RESET) else { return };
    machine.plug(1, Box::new(Idle)).unwrap();
    assert!(matches!(machine.plug(1, Box::new(Idle)), Err(MachineError::Slot(SlotError::Occupied(1)))));
    assert!(matches!(machine.plug(2, Box::new(Idle)), Err(MachineError::NoSlot(2))));
    assert!(machine.unplug(1).unwrap().is_some());
    assert!(machine.unplug(1).unwrap().is_none());
    machine.plug(1, Box::new(Idle)).unwrap();
}

#[test]
fn a_paused_machine_stands_still() {
    let Some(machine) = machine(&COUNT) else { return };
    let counter = || machine.memory.read_obj::<u32>(GuestAddress(0x2000)).unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    assert_eq!(counter(), 0, "neither does anything before the start");

    machine.start().unwrap();
    for _ in 0..20 {
        let before = counter();
        eventually(|| counter() != before);
        machine.pause().unwrap();
        let paused = counter();
        thread::sleep(Duration::from_millis(1));
        assert_eq!(counter(), paused);
        machine.resume().unwrap();
    }
    machine.stop();
    assert_eq!(machine.exit_reason(), None, "it did not end by itself");
    let stopped = counter();
    machine.resume().unwrap();
    assert_eq!(counter(), stopped);
}

#[test]
fn a_machine_that_sleeps_can_be_stopped() {
    // again: hlt; jmp again
    let Some(machine) = machine(&[0xf4, 0xeb, 0xfd]) else { return };
    machine.start().unwrap();
    machine.stop();
    machine.stop();
    assert_eq!(machine.exit_reason(), None);
}

#[test]
fn a_machine_that_was_never_started_can_be_dropped() {
    drop(machine(&RESET));
}

#[test]
fn counts_without_sense_are_refused() {
    let Ok(kvm) = host::open_kvm() else { return };
    let refused = |vcpus, slots| Machine::without_kernel(&kvm, vcpus, 16 << 20, slots).err().unwrap();
    assert!(matches!(refused(0, 0), MachineError::VcpuCount { count: 0, .. }));
    assert!(matches!(refused(255, 0), MachineError::VcpuCount { count: 255, .. }));
    let slots = MAX_SLOTS + 1;
    assert!(matches!(refused(1, slots), MachineError::SlotCount(count) if count == slots));
}

#[test]
fn each_vcpu_has_a_thread_of_its_own() {
    let Ok(kvm) = host::open_kvm() else { return };
    let machine = Machine::without_kernel(&kvm, 3, 16 << 20, 0).unwrap();
    machine.memory.write_slice(&[0xeb, 0xfe], GuestAddress(0)).unwrap();
    machine.start().unwrap();
    let Processors::Started(threads) = &*machine.processors() else { panic!("it was started") };
    let names: Vec<_> = threads.iter().map(|thread| thread.thread().name().unwrap().to_owned()).collect();
    assert_eq!(names, ["vcpu0", "vcpu1", "vcpu2"]);
}

#[test]
fn vcpus_have_no_capabilities_and_few_system_calls() {
    let Some(machine) = machine(&COUNT) else { return };
    machine.start().unwrap();
    let confined = || {
        let status = status_of_thread("vcpu0")?;
        Some(status.contains("CapPrm:\t0000000000000000\n") && status.contains("Seccomp:\t2\n"))
    };
    let begun = Instant::now();
    while confined() != Some(true) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", status_of_thread("vcpu0"));
        thread::sleep(Duration::from_millis(1));
    }
}

/// What the kernel says of this process's thread of that name.
fn status_of_thread(name: &str) -> Option<String> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let mut statuses =
        threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    statuses.find(|status| status.starts_with(&format!("Name:\t{name}\n")))
}

#[test]
fn when_one_vcpu_ends_the_guest_the_others_stand_still() {
    let Ok(kvm) = host::open_kvm() else { return };
    let machine = Machine::without_kernel(&kvm, 2, 16 << 20, 0).unwrap();
    // The first waits until the second counts, and ends the guest: `again: cmp dword es:[0x2000], 0; je again`.
    let wait = [0x66, 0x26, 0x83, 0x3e, 0x00, 0x20, 0x00, 0x74, 0xf7];
    machine.memory.write_slice(&[&wait[..], &RESET].concat(), GuestAddress(CODE)).unwrap();
    machine.memory.write_slice(&COUNT, GuestAddress(CODE + 0x100)).unwrap();
    if let Processors::Waiting(vcpus) = &*machine.processors() {
        set_up(vcpus[0].fd(), CODE);
        set_up(vcpus[1].fd(), CODE + 0x100);
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpus[1].fd().set_mp_state(runnable).unwrap();
    }
    machine.start().unwrap();
    assert_eq!(wait_for_end(&machine), ExitReason::Reset);
    machine.pause().unwrap();
    let counter = || machine.memory.read_obj::<u32>(GuestAddress(0x2000)).unwrap();
    let paused = counter();
    assert_ne!(paused, 0);
    thread::sleep(Duration::from_millis(2));
    assert_eq!(counter(), paused);
    assert!(machine.control.wait_until_ended(PATIENCE), "there is nothing left to do for them");
}

/// A device that does something at its reset.
struct OnReset<F>(F);

impl<F: FnMut() + Send> VirtioDevice for OnReset<F> {
    fn device_type(&self) -> u32 {
        0x41
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.0();
    }
}

#[test]
fn a_device_that_keeps_a_vcpu_waiting_holds_up_nobody_for_ever() {
    // mov dword [0x70], 0; jmp $
    let Some(machine) = machine(&[0x66, 0xc7, 0x06, 0x70, 0, 0, 0, 0, 0, 0xeb, 0xfe]) else { return };
    let (let_go, held) = mpsc::channel();
    let (arrived, arrives) = mpsc::channel();
    let wait = move || {
        let _ = arrived.send(());
        let _: Result<(), _> = held.recv();
    };
    machine.plug(0, Box::new(OnReset(wait))).unwrap();
    machine.start().unwrap();
    arrives.recv_timeout(PATIENCE).unwrap();
    let short = Duration::from_millis(20);
    assert!(matches!(machine.pause_within(short), Err(MachineError::Busy(_))));
    machine.stop_within(short);
    assert!(!machine.control.wait_until_ended(Duration::ZERO), "it waits still");
    drop(let_go);
    assert!(machine.control.wait_until_ended(PATIENCE));
    machine.pause().unwrap();
}

#[test]
fn devices_are_reset_when_the_machine_stops() {
    // The driver's first step: mov dword [0x70], 1
    let acknowledge = [0x66, 0xc7, 0x06, 0x70, 0, 1, 0, 0, 0];
    let Some(machine) = machine(&[&acknowledge[..], &RESET].concat()) else { return };
    let (tell, resets) = mpsc::channel();
    machine.plug(0, Box::new(OnReset(move || tell.send(()).unwrap()))).unwrap();
    machine.start().unwrap();
    assert_eq!(wait_for_end(&machine), ExitReason::Reset);
    assert!(resets.try_recv().is_err());
    machine.stop();
    assert!(resets.try_recv().is_ok());
    assert!(machine.unplug(0).unwrap().is_some(), "it keeps its place");
}
