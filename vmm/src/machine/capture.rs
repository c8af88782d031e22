//! A machine that stands still, as data; and a machine that goes on from there.
//!
//! What is captured goes on in any number of other machines of the same shape, on the same kind of processor. Guest and
//! host keep time apart: the guest's own clocks stand still from the capture to the start that follows, so that no
//! timer is late. What time it is by then, [`Machine::clock`] tells.

use std::fs::File;
use std::io;
use std::sync::PoisonError;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_cpuid_entry2,
    kvm_irqchip,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::{ExitReason, Machine, MachineError, PATIENCE, Processors, SlotError};
use crate::host::HostError;
use crate::image::{self, ImageError};
use crate::serial::Registers;
use crate::touched::Touched;
use crate::vcpu::control::Phase;
use crate::vcpu::{Vcpu, VcpuError, VcpuState};
use crate::virtio::mmio::state::TransportState;
use crate::{cpuid, host, layout, memory};

/// The interrupt controllers.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// What the extended states take at most, as long as none is enabled that a process has to ask for.
const EXTENDED_STATES: i32 = 4096;

/// Why a machine could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// It has not been started.
    #[error("the machine was not started, so there is nothing to capture")]
    NotStarted,
    /// The guest has ended.
    #[error("the guest has ended: {0:?}")]
    Ended(ExitReason),
    /// A vCPU does not come to rest.
    #[error("a vCPU of the machine does not stop")]
    Busy,
    /// The processor has states that are not captured.
    #[error(
        "the guest's processors have extended states of {0} bytes, and {EXTENDED_STATES} can be captured"
    )]
    ExtendedStates(i32),
    /// A device.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The memory.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// KVM refused something.
    #[error("KVM refused {what}: {source}")]
    Kvm {
        /// What was refused.
        what: &'static str,
        /// What KVM reported.
        source: errno::Error,
    },
}

/// Why a machine cannot go on from a capture.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The data make no sense.
    #[error("the captured state cannot be decoded: {0}")]
    Decode(#[from] postcard::Error),
    /// It is the state of a machine that cannot be.
    #[error("the captured state has {0}")]
    Impossible(&'static str),
    /// The processor is not the same.
    #[error("the machine was captured on another processor, or on the same with other features")]
    Processor,
    /// The memory.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine could not be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The state of a machine, apart from its memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    memory: u64,
    cpuid: Vec<kvm_cpuid_entry2>,
    vcpus: Vec<VcpuState>,
    chips: Vec<kvm_irqchip>,
    serial: Registers,
    slots: Vec<Option<TransportState>>,
    clock: Clock,
}

/// Instants of clocks that were read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Clock {
    /// KVM's clock of the machine, in nanoseconds.
    kvm: u64,
    /// The time stamp counter of the first vCPU.
    tsc: u64,
}

impl std::fmt::Debug for MachineState {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "MachineState({} vCPUs, {} bytes of memory)", self.vcpus.len(), self.memory)
    }
}

impl MachineState {
    /// The state as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        // It fails for lack of room alone, and a vector has that.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// The reverse. It takes any bytes, and little memory beyond them.
    pub fn from_bytes(bytes: &[u8]) -> Result<MachineState, RestoreError> {
        let state: MachineState = postcard::from_bytes(bytes)?;
        state.check_counts()?;
        Ok(state)
    }

    /// The number of vCPUs.
    pub fn vcpus(&self) -> u8 {
        // Checked when it was decoded, or it was made of a machine.
        self.vcpus.len() as u8
    }

    /// The size of the memory in bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The type of the device in each slot, 0 where there is none.
    pub fn devices(&self) -> Vec<u32> {
        let kind = |slot: &Option<TransportState>| slot.as_ref().map_or(0, TransportState::device_type);
        self.slots.iter().map(kind).collect()
    }

    fn check_counts(&self) -> Result<(), RestoreError> {
        if self.vcpus.is_empty() || self.vcpus.len() > usize::from(super::MAX_VCPUS) {
            return Err(RestoreError::Impossible("a number of vCPUs that no machine has"));
        }
        if self.slots.len() > usize::from(layout::MAX_SLOTS) {
            return Err(RestoreError::Impossible("more device slots than a machine can have"));
        }
        let chips = self.chips.iter().map(|chip| chip.chip_id);
        if !chips.eq(CHIPS) {
            return Err(RestoreError::Impossible("other interrupt controllers than a machine has"));
        }
        Ok(())
    }
}

impl Machine {
    /// Ends the vCPUs and devices, as [`stop`](Self::stop) does, writes the memory to an empty file, and tells how
    /// everything else was. The guest must have nothing under way at a device that keeps something for it, such as a
    /// mounted file system.
    pub fn capture(&self, file: &File) -> Result<MachineState, CaptureError> {
        let refused = |what| move |source| CaptureError::Kvm { what, source };
        let vcpus = self.take_vcpus()?;
        if let Some(reason) = self.exit_reason() {
            return Err(CaptureError::Ended(reason));
        }
        let first = vcpus.first().ok_or(CaptureError::NotStarted)?;
        let size = self.vm.check_extension_int(Cap::Xsave2);
        if size > EXTENDED_STATES {
            return Err(CaptureError::ExtendedStates(size));
        }
        let slots = self.bus.slots().iter().map(|slot| slot.capture());
        let slots = slots.collect::<Result<_, _>>()?;
        let kvm_clock = self.vm.get_clock().map_err(refused("the clock"))?;
        let clock = Clock { kvm: kvm_clock.clock, tsc: first.read_tsc()? };
        let kvm = host::open_kvm()?;
        let msrs = kvm.get_msr_index_list().map_err(refused("the list of registers"))?;
        let states = vcpus.iter().map(|vcpu| vcpu.save(msrs.as_slice())).collect::<Result<_, _>>()?;
        let chips = CHIPS.map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.get_irqchip(&mut chip).map(|()| chip)
        });
        let chips =
            chips.into_iter().collect::<Result<_, _>>().map_err(refused("an interrupt controller"))?;
        image::write(&self.memory, file)?;
        Ok(MachineState {
            memory: memory::size(&self.memory),
            cpuid: cpuid::supported(&kvm).map_err(refused("the processor's features"))?.as_slice().to_vec(),
            vcpus: states,
            chips,
            serial: self.bus.serial_registers(),
            slots,
            clock,
        })
    }

    /// Ends the threads of the vCPUs, which give these back.
    fn take_vcpus(&self) -> Result<Vec<Vcpu>, CaptureError> {
        self.control.set_phase(Phase::Stopped);
        let before = std::mem::replace(&mut *self.processors(), Processors::Started(Vec::new()));
        let Processors::Started(threads) = before else { return Err(CaptureError::NotStarted) };
        if !self.control.wait_until_ended(PATIENCE) {
            return Err(CaptureError::Busy);
        }
        threads.into_iter().map(|thread| thread.join().map_err(|_| CaptureError::Busy)).collect()
    }

    /// Makes a machine that goes on from a capture once it is [started](Self::start). Each slot that had a device is
    /// to get one of the same kind first.
    ///
    /// What it is known to touch soon, it has from the start.
    pub fn restore(state: MachineState, file: &File, soon: &Touched) -> Result<Machine, RestoreError> {
        let (kvm, _) = host::open_kvm_for_kernels().map_err(MachineError::from)?;
        let machine = Machine::restore_on(&kvm, state, file)?;
        soon.provide(&machine.memory);
        machine.map_at_once(soon);
        machine.lock_timeline().kernel_is_loaded();
        Ok(machine)
    }

    /// What the guest of a restored machine has touched of its memory so far.
    pub fn touched(&self) -> io::Result<Touched> {
        Touched::of(&self.memory)
    }

    pub(crate) fn restore_on(kvm: &Kvm, state: MachineState, file: &File) -> Result<Machine, RestoreError> {
        state.check_counts()?;
        let refused = |what| move |source| MachineError::Kvm { what, source };
        let present = cpuid::supported(kvm).map_err(refused("to list the processor's features"))?;
        if !cpuid::is_same_processor(present.as_slice(), &state.cpuid) {
            return Err(RestoreError::Processor);
        }
        let memory = memory::create(state.memory).map_err(MachineError::from)?;
        image::map(&memory, file)?;
        // As many as were counted above.
        let (vcpus, slots) = (state.vcpus.len() as u8, state.slots.len() as u8);
        let machine = Machine::over(kvm, vcpus, memory, slots, Some(&state.serial))?;
        machine.take_over(state)?;
        Ok(machine)
    }

    fn take_over(&self, state: MachineState) -> Result<(), RestoreError> {
        for (slot, captured) in self.bus.slots().iter().zip(&state.slots) {
            let Some(captured) = captured else { continue };
            if !captured.is_possible(&self.memory) {
                return Err(RestoreError::Impossible("a device with queues outside of the memory"));
            }
            slot.expect(captured.clone());
        }
        if let Processors::Waiting(vcpus) = &*self.processors() {
            for (vcpu, captured) in vcpus.iter().zip(&state.vcpus) {
                vcpu.restore(captured).map_err(MachineError::from)?;
            }
        }
        for chip in &state.chips {
            let refused = |source| MachineError::Kvm { what: "an interrupt controller's state", source };
            self.vm.set_irqchip(chip).map_err(refused)?;
        }
        *self.captured.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        Ok(())
    }

    /// Lets the clocks of a machine that was captured go on, which is about to be started.
    pub(super) fn resume_clocks(&self, vcpus: &[Vcpu]) -> Result<(), MachineError> {
        let captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(MachineState { clock, vcpus: states, .. }) = captured else { return Ok(()) };
        for vcpu in vcpus {
            vcpu.set_tsc(clock.tsc)?;
        }
        set_clock(&self.vm, clock.kvm)?;
        for (vcpu, state) in vcpus.iter().zip(&states) {
            vcpu.set_timer(state)?;
        }
        Ok(())
    }
}

fn set_clock(vm: &VmFd, nanoseconds: u64) -> Result<(), MachineError> {
    let clock = kvm_clock_data { clock: nanoseconds, ..Default::default() };
    vm.set_clock(&clock).map_err(|source| MachineError::Kvm { what: "the clock", source })
}
