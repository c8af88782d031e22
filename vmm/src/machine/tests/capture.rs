//! Machines that are captured while they run, and others that go on from there.

use std::fs::File;

use proptest::prelude::*;

use super::*;

const COUNTER: GuestAddress = GuestAddress(0x2000);

/// Machines that count, each vCPU in a place of its own; none without KVM.
fn counting(vcpus: u8) -> Option<(Kvm, Machine)> {
    let kvm = host::open_kvm().inspect_err(|error| eprintln!("nothing is tested here: {error}")).ok()?;
    let machine = Machine::without_kernel(&kvm, vcpus, 16 << 20, 2).unwrap();
    machine.memory.write_slice(&COUNT, GuestAddress(CODE)).unwrap();
    if let Processors::Waiting(vcpus) = &*machine.processors() {
        for (number, vcpu) in (0..).zip(vcpus) {
            set_up(vcpu.fd(), CODE);
            let mut system = vcpu.fd().get_sregs().unwrap();
            system.es.base = number * 8;
            vcpu.fd().set_sregs(&system).unwrap();
            vcpu.fd().set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
        }
    }
    Some((kvm, machine))
}

fn counter(machine: &Machine, vcpu: u8) -> u32 {
    machine.memory.read_obj(GuestAddress(COUNTER.0 + u64::from(vcpu) * 8)).unwrap()
}

fn captured(machine: &Machine) -> (Vec<u8>, File) {
    let file = tempfile::tempfile().unwrap();
    (machine.capture(&file).unwrap().to_bytes(), file)
}

fn restored(kvm: &Kvm, state: &[u8], file: &File) -> Result<Machine, RestoreError> {
    Machine::restore_on(kvm, MachineState::from_bytes(state)?, file)
}

#[test]
fn a_machine_goes_on_where_another_one_was_captured() {
    let Some((kvm, machine)) = counting(1) else { return };
    machine.start().unwrap();
    eventually(|| counter(&machine, 0) > 1000);
    let (state, file) = captured(&machine);
    let reached = counter(&machine, 0);
    thread::sleep(Duration::from_millis(2));
    assert_eq!(counter(&machine, 0), reached, "it stands still");
    assert!(matches!(machine.start(), Err(MachineError::StartedTwice)));

    let clones = [(); 2].map(|()| restored(&kvm, &state, &file).unwrap());
    for clone in &clones {
        assert_eq!((counter(clone, 0), clone.clock().read().khz), (reached, 0));
        clone.start().unwrap();
        let reading = clone.clock().read();
        assert!(reading.khz > 0 && reading.counter > 0, "{reading:?}");
        eventually(|| counter(clone, 0) != reached);
        assert_eq!(clone.exit_reason(), None);
    }
    clones.iter().for_each(Machine::stop);
    assert_eq!(counter(&machine, 0), reached, "and knows nothing of the others");
}

#[test]
fn all_vcpus_go_on() {
    let Some((kvm, machine)) = counting(3) else { return };
    machine.start().unwrap();
    (0..3).for_each(|vcpu| eventually(|| counter(&machine, vcpu) > 1000));
    let (state, file) = captured(&machine);
    let reached = [0, 1, 2].map(|vcpu| counter(&machine, vcpu));
    let clone = restored(&kvm, &state, &file).unwrap();
    assert_eq!([0, 1, 2].map(|vcpu| counter(&clone, vcpu)), reached);
    clone.start().unwrap();
    (0..3).for_each(|vcpu| eventually(|| counter(&clone, vcpu) != reached[usize::from(vcpu)]));
    assert_eq!(clone.exit_reason(), None);
}

#[test]
fn registers_and_clocks_are_those_of_the_capture() {
    let Some((kvm, machine)) = counting(1) else { return };
    machine.start().unwrap();
    eventually(|| counter(&machine, 0) > 0);
    let (state, file) = captured(&machine);
    let before = machine.vm.get_clock().unwrap().clock;
    let clone = restored(&kvm, &state, &file).unwrap();
    let Processors::Waiting(vcpus) = &*clone.processors() else { panic!("it was not started") };
    let system = vcpus[0].fd().get_sregs().unwrap();
    assert_eq!((system.ds.base, system.es.base), (layout::slot_address(0).0, 0));
    clone.resume_clocks(vcpus).unwrap();
    let after = clone.vm.get_clock().unwrap().clock;
    assert!(
        after < before + 5_000_000_000,
        "its time has not begun anew, nor gone on meanwhile: {before} {after}"
    );
}

#[test]
fn what_does_not_run_is_not_captured() {
    let Some((_, machine)) = counting(1) else { return };
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(machine.capture(&file), Err(CaptureError::NotStarted)));
    let Some(machine) = super::machine(&RESET) else { return };
    machine.start().unwrap();
    wait_for_end(&machine);
    assert!(matches!(machine.capture(&file), Err(CaptureError::Ended(ExitReason::Reset))));
}

#[test]
fn memory_of_another_size_is_refused() {
    let Some((kvm, machine)) = counting(1) else { return };
    machine.start().unwrap();
    let (state, file) = captured(&machine);
    file.set_len(15 << 20).unwrap();
    assert!(matches!(restored(&kvm, &state, &file), Err(RestoreError::Image(ImageError::Size { .. }))));
}

#[test]
fn damaged_states_are_errors_or_harmless() {
    let Some((kvm, machine)) = counting(2) else { return };
    machine.start().unwrap();
    let (state, file) = captured(&machine);
    for length in (0..state.len()).step_by(97) {
        assert!(restored(&kvm, &state[..length], &file).is_err(), "{length}");
    }
    for position in (0..state.len()).step_by(61) {
        let mut damaged = state.clone();
        damaged[position] ^= 0xff;
        // Whatever KVM takes is a machine, if none that makes sense.
        let _ = restored(&kvm, &damaged, &file);
    }
}

proptest! {
    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = MachineState::from_bytes(&bytes);
    }
}
