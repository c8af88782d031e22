//! Where things are in the guest's physical address space, and which interrupt belongs to what.
//!
//! ```text
//! 0x0_0000_0000  low memory: tables for the boot
//! 0x0_0009_c000  MP table, up to the end of conventional memory
//! 0x0_0010_0000  memory: kernel, initramfs at its upper end
//! 0x0_c000_0000  gap: virtio-mmio at 0xd000_0000, IOAPIC, KVM's own pages, local APIC
//! 0x1_0000_0000  memory that did not fit below the gap
//! ```

use vm_memory::GuestAddress;

/// The global descriptor table for the entry into the kernel.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// The Linux boot parameters, the "zero page".
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The stack that the boot processor starts with; it grows downwards.
pub(crate) const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// The root of the page tables for the entry into the kernel. Two more pages follow.
pub(crate) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub(crate) const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// What x86 kernels take of it, with the zero at its end (`COMMAND_LINE_SIZE`).
pub(crate) const COMMAND_LINE_SIZE: usize = 2048;
/// The MP configuration table; not reported as usable memory.
pub(crate) const MP_TABLE: GuestAddress = GuestAddress(0x9_c000);
/// The MP floating pointer: the last KiB of conventional memory is one of the places where kernels look.
pub(crate) const MP_POINTER: GuestAddress = GuestAddress(0x9_fc00);
/// Where the memory above the first MiB begins.
pub(crate) const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// No memory from here ...
pub(crate) const GAP_START: GuestAddress = GuestAddress(0xc000_0000);
/// ... up to here.
pub(crate) const GAP_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// The pages of slot 0.
const SLOTS: GuestAddress = GuestAddress(0xd000_0000);
/// Size of a slot's registers and of the configuration space behind them.
pub(crate) const SLOT_SIZE: u64 = 0x1000;
/// Where a slot's registers begin on its first page, which they fill up: the configuration space lies on the second.
pub(crate) const REGISTERS_OFFSET: u64 = 0xf00;
/// From one slot to the next.
const SLOT_STRIDE: u64 = 0x2000;
/// The most virtio-mmio slots that a machine can have.
pub const MAX_SLOTS: u8 = 17;

/// Where KVM's interrupt controllers are.
pub(crate) const IOAPIC: GuestAddress = GuestAddress(0xfec0_0000);
/// The local APIC of each vCPU.
pub(crate) const LOCAL_APIC: GuestAddress = GuestAddress(0xfee0_0000);
/// A page that KVM needs on Intel processors that cannot run real mode.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for the same purpose.
pub(crate) const KVM_TSS: usize = 0xfeff_d000;

/// Where the guest's kernel asks for its text, see [`crate::shared_boot`].
pub(crate) const TEXT_PORT: u16 = 0x5e0;

/// The first serial port.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub(crate) const SERIAL_GSI: u32 = 4;
/// The interrupt of slot 0.
const FIRST_SLOT_GSI: u32 = 5;
/// The interrupt of the real-time clock: kernels that have a driver claim it, even without such a clock.
const CLOCK_GSI: u32 = 8;

/// The page that ends with a slot's registers.
pub(crate) fn slot_page(slot: u8) -> GuestAddress {
    GuestAddress(SLOTS.0 + u64::from(slot) * SLOT_STRIDE)
}

/// Where a slot's registers are.
pub(crate) fn slot_address(slot: u8) -> GuestAddress {
    GuestAddress(slot_page(slot).0 + REGISTERS_OFFSET)
}

/// The slot that an address belongs to, and the offset in it.
pub(crate) fn slot_at(address: u64) -> Option<(usize, u64)> {
    let offset = address.checked_sub(slot_address(0).0)?;
    Some((usize::try_from(offset / SLOT_STRIDE).ok()?, offset % SLOT_STRIDE))
}

/// The interrupt of a slot: one of the IOAPIC's 24 pins, and no other slot's.
pub(crate) fn slot_gsi(slot: u8) -> u32 {
    let gsi = FIRST_SLOT_GSI + u32::from(slot);
    if gsi < CLOCK_GSI { gsi } else { gsi + 1 }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_slot_has_an_interrupt_of_its_own() {
        let lines: HashSet<u32> = (0..MAX_SLOTS).map(slot_gsi).collect();
        assert_eq!(lines.len(), usize::from(MAX_SLOTS));
        assert!(lines.iter().all(|gsi| (5..24).contains(gsi) && *gsi != CLOCK_GSI), "{lines:?}");
        assert_eq!((slot_gsi(0), slot_gsi(2), slot_gsi(3)), (5, 7, 9));
    }

    #[test]
    fn an_address_leads_to_its_slot() {
        assert_eq!(slot_at(0xd000_0f00), Some((0, 0)));
        assert_eq!(slot_at(0xd000_0eff), None);
        assert_eq!(slot_at(slot_address(15).0 + 0xffc), Some((15, 0xffc)));
        assert_eq!(slot_at(0xcfff_ffff), None);
    }

    #[test]
    fn slots_are_within_the_gap() {
        assert!(slot_address(0) >= GAP_START);
        assert!(slot_address(MAX_SLOTS).0 <= IOAPIC.0);
    }
}
