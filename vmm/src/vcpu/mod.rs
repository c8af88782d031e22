//! A virtual processor: how it is prepared, and the loop that runs it.

pub(crate) mod control;
mod registers;
mod state;

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::errno;

use self::control::{Control, Kickable};
pub(crate) use self::state::VcpuState;
use crate::bus::Bus;
use crate::machine::ExitReason;
use crate::{GuestMemory, confine};

/// Room for the loop, for the registers of a device and for its activation.
const STACK: usize = 256 << 10;

/// Why a vCPU could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused something.
    #[error("KVM refused {what} of vCPU {vcpu}: {source}")]
    Kvm {
        /// What was refused.
        what: &'static str,
        /// The vCPU's number.
        vcpu: u8,
        /// What KVM reported.
        source: errno::Error,
    },
    /// The thread could not be started.
    #[error("the thread of vCPU {vcpu} could not be started: {source}")]
    Thread {
        /// The vCPU's number.
        vcpu: u8,
        /// What the operating system reported.
        source: io::Error,
    },
}

/// A virtual processor that does not run yet.
pub(crate) struct Vcpu {
    number: u8,
    fd: VcpuFd,
    bus: Arc<Bus>,
    control: Arc<Control>,
    /// Of a machine that is gone a vCPU can be left over, which then keeps what its guest runs in.
    _memory: GuestMemory,
}

impl Vcpu {
    /// Creates the vCPU of this number with this CPUID.
    pub(crate) fn new(
        vm: &VmFd,
        number: u8,
        cpuid: &CpuId,
        bus: Arc<Bus>,
        control: Arc<Control>,
        memory: GuestMemory,
    ) -> Result<Self, VcpuError> {
        let refused = |what| move |source| VcpuError::Kvm { what, vcpu: number, source };
        let fd = vm.create_vcpu(number.into()).map_err(refused("the creation"))?;
        // First of all: what other registers may hold depends on the features.
        fd.set_cpuid2(cpuid).map_err(refused("the CPUID"))?;
        registers::enable_extended_states(&fd, cpuid).map_err(refused("the extended states"))?;
        registers::set_msrs(&fd).map_err(refused("the model-specific registers"))?;
        Ok(Self { number, fd, bus, control, _memory: memory })
    }

    /// Makes this the boot processor, which enters the kernel here.
    pub(crate) fn set_entry(&self, entry: GuestAddress) -> Result<(), VcpuError> {
        let refused = |what| move |source| VcpuError::Kvm { what, vcpu: self.number, source };
        registers::set_system(&self.fd).map_err(refused("the system registers"))?;
        registers::set_general(&self.fd, entry).map_err(refused("the general registers"))
    }

    /// What KVM knows it by.
    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Starts the vCPU's thread. It runs guest code when the control says so, and gives the vCPU back at its end. It serves
    /// files, too, if there is a device by now that has it do so.
    pub(crate) fn spawn(self) -> Result<JoinHandle<Vcpu>, VcpuError> {
        let number = self.number;
        let duty = self.bus.duty_of_vcpus();
        let count = self.control.add_thread();
        thread::Builder::new()
            .name(format!("vcpu{number}"))
            .stack_size(STACK)
            .spawn(move || {
                let _count = count;
                match confine::enter_vcpu(duty) {
                    Ok(()) => self.run(),
                    Err(error) => {
                        let text = format!("its thread could not be confined: {error}");
                        self.control.guest_ended(describe(ExitReason::Error(text), number));
                        self
                    }
                }
            })
            .map_err(|source| VcpuError::Thread { vcpu: number, source })
    }

    /// Runs guest code whenever it may, until the end.
    fn run(mut self) -> Self {
        let mut vcpu = Kickable::new(&mut self.fd, &self.control);
        let mut was_paused = false;
        while let Some(turn) = self.control.enter() {
            if was_paused {
                // Tells the guest that it stood still, lest its watchdogs bark. A guest without KVM's clock has no
                // use for it, and KVM then refuses.
                let _ = vcpu.vcpu().kvmclock_ctrl();
            }
            let mut may_go_on = true;
            while may_go_on {
                match run_once(vcpu.vcpu(), &self.bus) {
                    ControlFlow::Continue(Exit::Handled) => self.control.count_exit(),
                    ControlFlow::Continue(Exit::Kicked) => may_go_on = turn.goes_on(),
                    ControlFlow::Break(reason) => {
                        self.control.guest_ended(describe(reason, self.number));
                        may_go_on = false;
                    }
                }
            }
            if self.number == 0 {
                // The longer ago it was noted, the less is it worth. As much as it is, it remains.
                let _ = state::note_counter(vcpu.vcpu(), self.control.clock());
            }
            was_paused = true;
        }
        drop(vcpu);
        self
    }
}

/// Why a vCPU came back from the guest, if that is not the guest's end.
enum Exit {
    /// The guest touched a device.
    Handled,
    /// A signal arrived.
    Kicked,
}

/// Runs guest code up to the next exit, and serves it.
fn run_once(vcpu: &mut VcpuFd, bus: &Bus) -> ControlFlow<ExitReason, Exit> {
    match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.read_port(port, data);
            bus.text().map_replaced(vcpu);
        }
        Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data)?,
        Ok(VcpuExit::Intr) => return ControlFlow::Continue(Exit::Kicked),
        Err(error) if error.errno() == libc::EINTR => {
            vcpu.set_kvm_immediate_exit(0);
            return ControlFlow::Continue(Exit::Kicked);
        }
        // A processor that the guest has not started, or that was just started.
        Err(error) if error.errno() == libc::EAGAIN => return ControlFlow::Continue(Exit::Kicked),
        Err(error) => return ControlFlow::Break(ExitReason::Error(format!("KVM could not run it: {error}"))),
        Ok(VcpuExit::Shutdown) => return ControlFlow::Break(ExitReason::Shutdown),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            return ControlFlow::Break(ExitReason::Shutdown);
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return ControlFlow::Break(ExitReason::Reset),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            return ControlFlow::Break(ExitReason::Error(format!("the guest reported event {kind}")));
        }
        Ok(VcpuExit::InternalError) => {
            let reason = internal_error(vcpu.get_kvm_run());
            return ControlFlow::Break(ExitReason::Error(reason + &position(vcpu)));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            let text =
                format!("the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})");
            return ControlFlow::Break(ExitReason::Error(text));
        }
        Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
            let text = format!("the host could not provide {size} bytes of guest memory at {gpa:#x}");
            return ControlFlow::Break(ExitReason::Error(text));
        }
        // With KVM's own interrupt controller a halted processor waits within KVM.
        Ok(VcpuExit::Hlt) => {
            return ControlFlow::Break(ExitReason::Error("the guest halted for good".into()));
        }
        Ok(other) => {
            let text = format!("KVM returned for an unexpected reason: {other:?}");
            return ControlFlow::Break(ExitReason::Error(text));
        }
    }
    ControlFlow::Continue(Exit::Handled)
}

/// What an internal error of KVM means.
fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        format!("KVM could not emulate an instruction of the guest (suberror {suberror})")
    } else {
        format!("KVM had an internal error (suberror {suberror})")
    }
}

/// Where the guest was, as far as that can be found out.
fn position(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map_or_else(|_| String::new(), |registers| format!(" at {:#x}", registers.rip))
}

/// The reason with the vCPU that it comes from.
fn describe(reason: ExitReason, vcpu: u8) -> ExitReason {
    match reason {
        ExitReason::Error(text) => ExitReason::Error(format!("vCPU {vcpu}: {text}")),
        other => other,
    }
}
