//! The registers of the boot processor when it enters the kernel (Linux 64-bit boot protocol).
//!
//! The other processors wait for the first one to start them and need nothing.

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::errno;

use crate::boot::{SEGMENT_LIMIT, SEGMENTS};
use crate::layout;

const CR0_PROTECTION: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that is always set. Interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// The number of the register that enables extended states.
const XCR0: u32 = 0;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets the general registers: at the kernel's entry, with the boot parameters in RSI.
pub(super) fn set_general(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), errno::Error> {
    vcpu.set_regs(&kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE.0,
        rsp: layout::BOOT_STACK.0,
        rbp: layout::BOOT_STACK.0,
        rflags: RFLAGS,
        ..Default::default()
    })
}

/// Sets the system registers: 64-bit mode with the boot's page tables and segments.
pub(super) fn set_system(vcpu: &VcpuFd) -> Result<(), errno::Error> {
    // KVM's own values stay where nothing is asked for, the APIC's base among them.
    let mut registers = vcpu.get_sregs()?;
    enter_long_mode(&mut registers);
    vcpu.set_sregs(&registers)
}

fn enter_long_mode(registers: &mut kvm_sregs) {
    let data = SEGMENTS.data.register();
    registers.cs = SEGMENTS.code.register();
    registers.tr = SEGMENTS.task.register();
    for segment in
        [&mut registers.ds, &mut registers.es, &mut registers.fs, &mut registers.gs, &mut registers.ss]
    {
        *segment = data;
    }
    registers.gdt = kvm_dtable { base: layout::GDT.0, limit: SEGMENT_LIMIT, ..Default::default() };
    // No interrupt and no exception is expected before the kernel has a table of its own.
    registers.idt = kvm_dtable::default();
    registers.cr3 = layout::PAGE_TABLES.0;
    registers.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
    registers.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE | CR0_PAGING;
    registers.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}

/// Sets what a firmware would have set on each processor: fast string instructions, and all memory cached.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<(), errno::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| errno::Error::new(libc::E2BIG))?;
    match vcpu.set_msrs(&msrs)? {
        count if count == entries.len() => Ok(()),
        // KVM stops at the first that it does not take, and reports how many it took.
        _ => Err(errno::Error::new(libc::EINVAL)),
    }
}

/// Enables each extended state that the processor has (XCR0).
///
/// After a reset none is, and a kernel enables what it wants. But QEMU's software processor lets a guest write XCR0
/// without KVM's knowledge: KVM would put the old value back on the next entry, and the guest's AVX instructions would be
/// invalid from then on. With the value that each kernel writes there from the start, both agree.
pub(super) fn enable_extended_states(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), errno::Error> {
    let Some(value) = supported_extended_states(cpuid) else { return Ok(()) };
    let mut registers = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    registers.xcrs[0].xcr = XCR0;
    registers.xcrs[0].value = value;
    vcpu.set_xcrs(&registers)
}

fn supported_extended_states(cpuid: &CpuId) -> Option<u64> {
    let states = cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (0xd, 0))?;
    let value = u64::from(states.edx) << 32 | u64::from(states.eax);
    (value != 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn extended_states_are_those_of_the_processor() {
        let leaf =
            |index, eax, edx| kvm_cpuid_entry2 { function: 0xd, index, eax, edx, ..Default::default() };
        let cpuid = |entries: &[kvm_cpuid_entry2]| CpuId::from_entries(entries).unwrap();
        assert_eq!(supported_extended_states(&cpuid(&[leaf(1, 9, 0), leaf(0, 7, 1)])), Some(0x1_0000_0007));
        assert_eq!(supported_extended_states(&cpuid(&[leaf(0, 0, 0)])), None);
        assert_eq!(supported_extended_states(&cpuid(&[])), None);
    }

    #[test]
    fn the_boot_processor_is_in_64_bit_mode() {
        let mut registers = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        enter_long_mode(&mut registers);
        assert_eq!((registers.cs.l, registers.cs.selector, registers.ss.selector), (1, 0x10, 0x18));
        assert_eq!((registers.cr0, registers.cr3, registers.cr4), (0x8000_0011, 0x9000, 0x20));
        assert_eq!(registers.efer, 0x500);
        assert_eq!(registers.apic_base, 0xfee0_0900);
    }
}
