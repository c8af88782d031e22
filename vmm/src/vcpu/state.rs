//! All that a vCPU which does not run consists of, to be taken over by another one.

use std::collections::HashMap;

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::{Vcpu, VcpuError};
use crate::clock::GuestClock;

/// Time stamp counter.
const MSR_TSC: u32 = 0x10;
/// When the local APIC's timer is due, by that counter.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The state of one vCPU.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    general: kvm_regs,
    system: kvm_sregs,
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    run_state: kvm_mp_state,
    events: kvm_vcpu_events,
    /// All but the two that are about time.
    msrs: Vec<(u32, u64)>,
    tsc_deadline: Option<u64>,
    tsc_khz: u32,
}

impl Vcpu {
    /// The state, with those of the listed model-specific registers that this vCPU has.
    pub(crate) fn save(&self, msrs: &[u32]) -> Result<VcpuState, VcpuError> {
        let fd = &self.fd;
        // First, as the others say: KVM brings pending events into the state of the processor with it.
        let run_state = fd.get_mp_state().map_err(self.refused("the run state"))?;
        let mut msrs: HashMap<u32, u64> =
            read_msrs(fd, msrs).map_err(self.refused("the model-specific registers"))?;
        msrs.remove(&MSR_TSC);
        let tsc_deadline = msrs.remove(&MSR_TSC_DEADLINE);
        let mut msrs: Vec<_> = msrs.into_iter().collect();
        msrs.sort_unstable();
        Ok(VcpuState {
            general: fd.get_regs().map_err(self.refused("the general registers"))?,
            system: fd.get_sregs().map_err(self.refused("the system registers"))?,
            extended: fd.get_xsave().map_err(self.refused("the extended states"))?,
            extended_control: fd.get_xcrs().map_err(self.refused("the extended states' control"))?,
            debug: fd.get_debug_regs().map_err(self.refused("the debug registers"))?,
            apic: fd.get_lapic().map_err(self.refused("the local APIC"))?,
            events: fd.get_vcpu_events().map_err(self.refused("the pending events"))?,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            run_state,
            msrs,
            tsc_deadline,
        })
    }

    /// Takes over a state, but for its clocks.
    pub(crate) fn restore(&self, state: &VcpuState) -> Result<(), VcpuError> {
        let fd = &self.fd;
        // Only a host whose counter runs at another speed has to be asked for this one's.
        if state.tsc_khz != 0 && fd.get_tsc_khz().is_ok_and(|khz| khz != state.tsc_khz) {
            fd.set_tsc_khz(state.tsc_khz).map_err(self.refused("the frequency of the time stamp counter"))?;
        }
        fd.set_mp_state(state.run_state).map_err(self.refused("the run state"))?;
        fd.set_regs(&state.general).map_err(self.refused("the general registers"))?;
        fd.set_sregs(&state.system).map_err(self.refused("the system registers"))?;
        fd.set_xcrs(&state.extended_control).map_err(self.refused("the extended states' control"))?;
        // SAFETY: KVM reads more than the structure has only where states were enabled on request of the process
        // (`arch_prctl`), which this one does not make.
        unsafe { fd.set_xsave(&state.extended) }.map_err(self.refused("the extended states"))?;
        fd.set_debug_regs(&state.debug).map_err(self.refused("the debug registers"))?;
        // After the system registers, which say where it is and in which mode.
        fd.set_lapic(&state.apic).map_err(self.refused("the local APIC"))?;
        self.restore_msrs(&state.msrs).map_err(self.refused("the model-specific registers"))?;
        fd.set_vcpu_events(&state.events).map_err(self.refused("the pending events"))
    }

    /// Writes the registers that differ from what they are: there are some that KVM reports and takes no value for.
    fn restore_msrs(&self, wanted: &[(u32, u64)]) -> Result<(), errno::Error> {
        let numbers: Vec<u32> = wanted.iter().map(|(number, _)| *number).collect();
        let present = read_msrs(&self.fd, &numbers)?;
        let differing = wanted.iter().filter(|(number, value)| present.get(number) != Some(value));
        write_msrs(&self.fd, &differing.copied().collect::<Vec<_>>())
    }

    /// Sets the time stamp counter. One value for all vCPUs makes KVM keep their counters together.
    pub(crate) fn set_tsc(&self, tsc: u64) -> Result<(), VcpuError> {
        write_msrs(&self.fd, &[(MSR_TSC, tsc)]).map_err(self.refused("the time stamp counter"))
    }

    /// What the counter says now.
    pub(crate) fn read_tsc(&self) -> Result<u64, VcpuError> {
        let msrs = read_msrs(&self.fd, &[MSR_TSC]).map_err(self.refused("the time stamp counter"))?;
        Ok(msrs.get(&MSR_TSC).copied().unwrap_or(0))
    }

    /// Notes what the counter says now, beside the host's clock.
    pub(crate) fn note_counter(&self) -> Result<(), VcpuError> {
        note_counter(&self.fd, self.control.clock()).map_err(self.refused("the time stamp counter"))
    }

    /// Winds the timer up again. To be done when counter and APIC are as they were.
    pub(crate) fn set_timer(&self, state: &VcpuState) -> Result<(), VcpuError> {
        let deadline = state.tsc_deadline.filter(|deadline| *deadline != 0);
        let deadline = deadline.map(|deadline| (MSR_TSC_DEADLINE, deadline));
        write_msrs(&self.fd, deadline.as_slice()).map_err(self.refused("the timer"))
    }

    fn refused(&self, what: &'static str) -> impl FnOnce(errno::Error) -> VcpuError {
        let vcpu = self.number;
        move |source| VcpuError::Kvm { what, vcpu, source }
    }
}

/// Notes what the counter of a vCPU says now.
pub(super) fn note_counter(vcpu: &VcpuFd, clock: &GuestClock) -> Result<(), errno::Error> {
    // Where the host cannot tell, nobody can use it.
    let Ok(khz) = vcpu.get_tsc_khz() else { return Ok(()) };
    clock.note(khz, || {
        read_msrs(vcpu, &[MSR_TSC])?.remove(&MSR_TSC).ok_or_else(|| errno::Error::new(libc::EINVAL))
    })
}

/// Reads registers. What this processor does not have is left out.
fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<HashMap<u32, u64>, errno::Error> {
    let mut values = HashMap::with_capacity(numbers.len());
    for numbers in numbers.chunks(KVM_MAX_MSR_ENTRIES) {
        let mut rest = numbers;
        while !rest.is_empty() {
            let mut msrs = entries(rest.iter().map(|number| (*number, 0)))?;
            // KVM stops at the first that it cannot read.
            let count = vcpu.get_msrs(&mut msrs)?.min(rest.len());
            values.extend(msrs.as_slice()[..count].iter().map(|msr| (msr.index, msr.data)));
            rest = rest.get(count + 1..).unwrap_or_default();
        }
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), errno::Error> {
    for values in values.chunks(KVM_MAX_MSR_ENTRIES) {
        if vcpu.set_msrs(&entries(values.iter().copied())?)? != values.len() {
            return Err(errno::Error::new(libc::EINVAL));
        }
    }
    Ok(())
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, errno::Error> {
    let entries: Vec<_> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| errno::Error::new(libc::E2BIG))
}
