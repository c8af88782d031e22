//! The machine: what the monitor configures, plugs devices into, starts, pauses and watches.

mod capture;
mod timeline;

use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

pub use self::capture::{CaptureError, MachineState, RestoreError};
pub use self::timeline::Timeline;
pub use crate::boot::BootError;
use crate::boot::{self, Boot};
pub use crate::boot::{BootFiles, BootSource};
use crate::bus::Bus;
use crate::clock::GuestClock;
use crate::console::Console;
use crate::host::{self, HostError};
pub use crate::image::ImageError;
use crate::layout;
pub use crate::layout::MAX_SLOTS;
use crate::memory;
pub use crate::memory::MemoryError;
use crate::serial::{Registers, SerialPort};
use crate::shared_boot::{self, RecordedBoot, SharedBootError, TextPort};
pub use crate::touched::Touched;
use crate::vcpu::Vcpu;
pub use crate::vcpu::VcpuError;
use crate::vcpu::control::{Control, Phase, install_kick_handler};
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::slot::Slot;
pub use crate::virtio::mmio::slot::SlotError;
use crate::{GuestMemory, cpuid};

/// Local APICs are numbered with 8 bits; one number means all of them, and one is the IOAPIC's.
const MAX_VCPUS: u8 = 254;
/// How long vCPUs and devices may take to come to rest. Usually that is a matter of milliseconds, but a disk of the
/// host may keep a device waiting, and the device a vCPU.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to build.
#[derive(Debug)]
pub struct MachineConfig {
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// Size of the guest's memory in bytes; rounded up to whole MiB.
    pub memory: u64,
    /// The kernel and what it finds at first.
    pub source: BootSource,
    /// What to add to the kernel command line that the machine makes.
    pub command_line: String,
    /// Number of virtio-mmio slots, at most [`MAX_SLOTS`].
    pub slots: u8,
}

/// Why a machine could not be made, changed or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host cannot run a machine at all.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The number of vCPUs is out of bounds.
    #[error("a machine cannot have {count} vCPUs: on this host it takes 1 to {max}")]
    VcpuCount {
        /// How many were asked for.
        count: u8,
        /// How many there can be.
        max: usize,
    },
    /// The number of slots is out of bounds.
    #[error("a machine cannot have {0} device slots: at most {MAX_SLOTS} are possible")]
    SlotCount(u8),
    /// There is no such slot.
    #[error("the machine has no device slot {0}")]
    NoSlot(u8),
    /// A device could not be plugged in.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// There is no memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU could not be made or started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// KVM refused something.
    #[error("KVM refused {what}: {source}")]
    Kvm {
        /// What was refused.
        what: &'static str,
        /// What KVM reported.
        source: errno::Error,
    },
    /// The operating system refused something.
    #[error("the machine's events could not be created: {0}")]
    Event(#[from] io::Error),
    /// A vCPU does not come to rest.
    #[error("a vCPU did not stop within {} seconds: a device keeps it waiting", .0.as_secs())]
    Busy(Duration),
    /// The machine was started before.
    #[error("the machine was started already")]
    StartedTwice,
}

/// Why the guest ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest asked for a reset: an orderly end, or a kernel panic (`panic=-1`).
    Reset,
    /// The guest's processor shut down (a triple fault), or the guest asked to be powered off.
    Shutdown,
    /// The machine cannot go on; the text says why.
    Error(String),
}

/// A virtual machine. It ends with this value.
pub struct Machine {
    // Dropped in this order: the vCPUs are stopped before anything that they use goes.
    processors: Mutex<Processors>,
    control: Arc<Control>,
    bus: Arc<Bus>,
    console: Console,
    timeline: Mutex<Timeline>,
    /// What it goes on from, until it is started.
    captured: Mutex<Option<MachineState>>,
    vm: Arc<VmFd>,
    memory: GuestMemory,
}

/// The vCPUs, before and after the start.
enum Processors {
    Waiting(Vec<Vcpu>),
    Started(Vec<JoinHandle<Vcpu>>),
}

impl Machine {
    /// Makes a machine and loads the kernel into it.
    pub fn new(config: MachineConfig) -> Result<Machine, MachineError> {
        let (kvm, _) = host::open_kvm_for_kernels()?;
        let machine = Machine::without_kernel(&kvm, config.vcpus, config.memory, config.slots)?;
        let mut source = config.source;
        let stays = machine.load(Boot {
            source: &mut source,
            command_line: &config.command_line,
            vcpus: config.vcpus,
            slots: config.slots,
        })?;
        match (source, stays) {
            (BootSource::Recorded(files), Some(kernel)) => {
                machine.bus.text().record(&kernel, files.initramfs)
            }
            (BootSource::Shared(shared), _) => machine.bus.text().offer(shared).map_err(BootError::Shared)?,
            _ => {}
        }
        machine.lock_timeline().kernel_is_loaded();
        Ok(machine)
    }

    /// A machine that has nothing to run yet.
    pub(crate) fn without_kernel(
        kvm: &Kvm,
        vcpus: u8,
        memory_size: u64,
        slots: u8,
    ) -> Result<Machine, MachineError> {
        check_counts(kvm, vcpus, slots)?;
        Machine::over(kvm, vcpus, memory::create(memory_size)?, slots, None)
    }

    /// A machine over this memory, with a serial port that has these registers.
    fn over(
        kvm: &Kvm,
        vcpus: u8,
        memory: GuestMemory,
        slots: u8,
        serial: Option<&Registers>,
    ) -> Result<Machine, MachineError> {
        check_counts(kvm, vcpus, slots)?;
        let refused = |what| move |source| MachineError::Kvm { what, source };
        let vm = Arc::new(create_vm(kvm)?);
        memory::register(&vm, &memory)?;

        let console = Console::default();
        let serial_line = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        vm.register_irqfd(&serial_line, layout::SERIAL_GSI)
            .map_err(refused("the serial port's interrupt"))?;
        let serial = match serial {
            Some(registers) => SerialPort::restored(registers, serial_line, console.clone()),
            None => SerialPort::new(serial_line, console.clone()),
        };
        let slots = (0..slots).map(|number| Slot::new(number, vm.clone(), memory.clone()));
        let slots = slots.collect::<Result<_, _>>()?;
        let bus = Arc::new(Bus::new(serial, TextPort::new(memory.clone()), slots));

        let control = Arc::new(Control::new()?);
        let waiting = create_vcpus(kvm, &vm, vcpus, |vm, number, cpuid| {
            Vcpu::new(vm, number, cpuid, bus.clone(), control.clone(), memory.clone())
        })?;
        Ok(Machine {
            processors: Mutex::new(Processors::Waiting(waiting)),
            control,
            bus,
            console,
            timeline: Mutex::new(Timeline::kvm_ready_now()),
            captured: Mutex::default(),
            vm,
            memory,
        })
    }

    /// Loads a kernel; returns where it stays.
    fn load(&self, boot: Boot<'_>) -> Result<Option<Range<u64>>, MachineError> {
        let boot::Loaded { entry, stays, provided } = boot::load(&self.memory, boot)?;
        if let Processors::Waiting(vcpus) = &*self.processors()
            && let Some(boot_processor) = vcpus.first()
        {
            boot_processor.set_entry(entry)?;
        }
        self.map_at_once(&provided);
        Ok(stays)
    }

    /// Has KVM map pages that the host has, before the machine is started.
    fn map_at_once(&self, pages: &Touched) {
        if let Processors::Waiting(vcpus) = &*self.processors()
            && let Some(first) = vcpus.first()
        {
            pages.map(&self.memory, first.fd());
        }
    }

    /// What other machines can share of this one's boot, if that was to be recorded. It is given out once.
    pub fn recorded_boot(&self) -> Result<Option<RecordedBoot>, SharedBootError> {
        Ok(self.bus.text().take_recorded(shared_boot::present()?))
    }

    /// Puts a device into an empty slot, before the start or while the guest runs.
    pub fn plug(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        Ok(self.slot(slot)?.plug(device)?)
    }

    /// Takes the device out of a slot, if there is one. The guest should have let go of it.
    pub fn unplug(&self, slot: u8) -> Result<Option<Box<dyn VirtioDevice>>, MachineError> {
        Ok(self.slot(slot)?.unplug())
    }

    /// Lets the vCPUs run.
    pub fn start(&self) -> Result<(), MachineError> {
        let mut processors = self.processors();
        let Processors::Waiting(vcpus) = &mut *processors else {
            return Err(MachineError::StartedTwice);
        };
        install_kick_handler().map_err(|source| MachineError::Kvm { what: "the vCPUs' signal", source })?;
        self.resume_clocks(vcpus)?;
        if let Some(first) = vcpus.first() {
            first.note_counter()?;
        }
        let vcpus = std::mem::take(vcpus);
        *processors = Processors::Started(Vec::with_capacity(vcpus.len()));
        for vcpu in vcpus {
            let thread = vcpu.spawn()?;
            if let Processors::Started(threads) = &mut *processors {
                threads.push(thread);
            }
        }
        self.lock_timeline().kernel_is_entered();
        self.control.set_phase(Phase::Running);
        Ok(())
    }

    /// Halts all vCPUs; when this returns without an error, none of them runs guest code. After an error they halt
    /// as soon as they can.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.pause_within(PATIENCE)
    }

    fn pause_within(&self, patience: Duration) -> Result<(), MachineError> {
        // Nobody is to resume the machine before it has come to rest.
        let _processors = self.processors();
        if self.control.phase() == Phase::Running {
            self.control.set_phase(Phase::Paused);
        }
        match self.control.wait_until_idle(patience) {
            true => Ok(()),
            false => Err(MachineError::Busy(patience)),
        }
    }

    /// Lets paused vCPUs go on. The guest's clocks have gone on meanwhile.
    pub fn resume(&self) -> Result<(), MachineError> {
        if matches!(&*self.processors(), Processors::Started(_)) {
            self.control.set_phase(Phase::Running);
        }
        Ok(())
    }

    /// The host's clock as this guest can be told of it, once it is started.
    pub fn clock(&self) -> GuestClock {
        self.control.clock().clone()
    }

    /// Readable when the guest ended by itself.
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.control.exit_event()
    }

    /// Why the guest ended, once it did.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.control.exit_reason()
    }

    /// The last lines of the kernel's messages, 64 KiB at most.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Writes the kernel's messages also to `out`, from now on. A vCPU waits for each write.
    pub fn mirror_console(&self, out: Box<dyn Write + Send>) {
        self.console.mirror_to(out);
    }

    /// When the phases of the start were reached.
    pub fn timeline(&self) -> Timeline {
        *self.lock_timeline()
    }

    /// How often the guest had to be served by this process, until now. It does not count what KVM does itself.
    pub fn exits(&self) -> u64 {
        self.control.exits()
    }

    /// Ends the vCPUs and resets the devices, and waits for both. The machine cannot be started again.
    ///
    /// Data that a device has not delivered yet are lost. What a disk of the host keeps waiting for more than half a
    /// minute is not waited for: it ends when it can, and keeps until then what it uses.
    pub fn stop(&self) {
        self.stop_within(PATIENCE);
    }

    fn stop_within(&self, patience: Duration) {
        self.control.set_phase(Phase::Stopped);
        let before = std::mem::replace(&mut *self.processors(), Processors::Started(Vec::new()));
        let ended = self.control.wait_until_ended(patience);
        if let Processors::Started(threads) = before {
            for thread in threads.into_iter().filter(|thread| ended || thread.is_finished()) {
                // A vCPU that panicked has ended, too.
                let _ = thread.join();
            }
        }
        self.reset_devices(patience);
    }

    /// Resets the devices on a thread of its own, for which this one can stop to wait.
    fn reset_devices(&self, patience: Duration) {
        if self.bus.slots().iter().all(Slot::is_at_rest) {
            return;
        }
        let (done, wait) = mpsc::channel::<()>();
        let bus = self.bus.clone();
        let reset = move || {
            bus.slots().iter().for_each(Slot::reset);
            drop(done);
        };
        if thread::Builder::new().name("reset".into()).spawn(reset).is_ok() {
            // Nothing is ever sent: it ends with the other end of the channel, or in time.
            let _ = wait.recv_timeout(patience);
        }
    }

    fn slot(&self, number: u8) -> Result<&Slot, MachineError> {
        self.bus.slots().get(usize::from(number)).ok_or(MachineError::NoSlot(number))
    }

    fn processors(&self) -> MutexGuard<'_, Processors> {
        self.processors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_timeline(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check_counts(kvm: &Kvm, vcpus: u8, slots: u8) -> Result<(), MachineError> {
    let max = kvm.get_max_vcpus().min(usize::from(MAX_VCPUS));
    if vcpus == 0 || usize::from(vcpus) > max {
        return Err(MachineError::VcpuCount { count: vcpus, max });
    }
    if slots > MAX_SLOTS {
        return Err(MachineError::SlotCount(slots));
    }
    Ok(())
}

/// A virtual machine with KVM's interrupt controllers. There is no PIT: by their CPUID, processors have a timer that
/// needs none for its calibration.
fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let refused = |what| move |source| MachineError::Kvm { what, source };
    let vm = kvm.create_vm().map_err(refused("a new virtual machine"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("the identity map's address"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(refused("the task state segment's address"))?;
    // Before the first vCPU, or it has no local APIC.
    vm.create_irq_chip().map_err(refused("the interrupt controllers"))?;
    Ok(vm)
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    create: impl Fn(&VmFd, u8, &CpuId) -> Result<Vcpu, VcpuError>,
) -> Result<Vec<Vcpu>, MachineError> {
    let refused = |what| move |source| MachineError::Kvm { what, source };
    let supported = cpuid::supported(kvm).map_err(refused("to list the processor's features"))?;
    (0..count)
        .map(|number| {
            let cpuid = cpuid::for_vcpu(&supported, number, count).map_err(|_| MachineError::Kvm {
                what: "the processor's features",
                source: errno::Error::new(libc::E2BIG),
            })?;
            Ok(create(vm, number, &cpuid)?)
        })
        .collect()
}

#[cfg(test)]
mod tests;
