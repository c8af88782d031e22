//! The MP table (MultiProcessor Specification 1.4): which processors and interrupts there are.
//!
//! It is what a kernel without ACPI reads. Interrupts are those of an ISA bus, edge-triggered, one for one on the
//! pins of the IOAPIC.

use std::iter::once;

use crate::layout;

/// Version 1.4 of the specification.
const SPECIFICATION: u8 = 4;
/// Entry types (section 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Length of the header (section 4.2).
const HEADER: usize = 44;

/// Processor flags.
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// What the version registers of KVM's APICs say.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Interrupt types.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// The number of the only bus.
const ISA: u8 = 0;
/// Means: each local APIC.
const ALL: u8 = 0xff;

/// The floating pointer, which leads to the table.
pub(super) fn pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((layout::MP_TABLE.0 as u32).to_le_bytes());
    // Length in units of 16 bytes, version, checksum, features: none, so no default configuration and no PIC mode.
    pointer.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// The table for a machine with so many processors and slots.
pub(super) fn table(vcpus: u8, slots: u8) -> Vec<u8> {
    let entries = entries(vcpus, slots);
    let body: Vec<u8> = entries.concat();
    let length = (HEADER + body.len()) as u16;

    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"RVM     RVM         ");
    // No table of a manufacturer: pointer and length are 0.
    table.extend([0; 6]);
    table.extend((entries.len() as u16).to_le_bytes());
    table.extend((layout::LOCAL_APIC.0 as u32).to_le_bytes());
    // No extended table.
    table.extend([0; 4]);
    table.extend(body);
    table[7] = checksum(&table);
    table
}

fn entries(vcpus: u8, slots: u8) -> Vec<Vec<u8>> {
    let interrupts = once(layout::SERIAL_GSI).chain((0..slots).map(layout::slot_gsi));
    // The IOAPIC's ID is the first that no processor has.
    let ioapic = vcpus;
    let mut entries: Vec<_> = (0..vcpus).map(processor).collect();
    entries.push([&[BUS, ISA], b"ISA   ".as_slice()].concat());
    let address = (layout::IOAPIC.0 as u32).to_le_bytes();
    entries.push([[IOAPIC, ioapic, IOAPIC_VERSION, ENABLED], address].concat());
    entries.extend(interrupts.map(|gsi| interrupt(IO_INTERRUPT, VECTORED, gsi as u8, ioapic, gsi as u8)));
    entries.push(interrupt(LOCAL_INTERRUPT, EXTINT, 0, 0, 0));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, 0, ALL, 1));
    entries
}

/// Signature and feature flags of the processor are left out: kernels ask CPUID.
fn processor(id: u8) -> Vec<u8> {
    let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
    let mut entry = vec![PROCESSOR, id, LOCAL_APIC_VERSION, flags];
    entry.resize(20, 0);
    entry
}

/// An interrupt of the ISA bus with that bus's polarity and trigger, which the flags 0 stand for.
fn interrupt(entry: u8, kind: u8, bus_interrupt: u8, apic: u8, pin: u8) -> Vec<u8> {
    vec![entry, kind, 0, 0, ISA, bus_interrupt, apic, pin]
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Entries as a kernel reads them: the type says how long each is.
    fn parse(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[HEADER..];
        let mut entries = Vec::new();
        while let Some(kind) = rest.first() {
            let (entry, after) = rest.split_at(if *kind == PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = after;
        }
        entries
    }

    #[test]
    fn checksums_are_right() {
        assert_eq!((sum(&pointer()), pointer().len()), (0, 16));
        assert_eq!(sum(&table(4, 8)), 0);
    }

    #[test]
    fn the_header_says_what_follows() {
        let table = table(3, 8);
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        let entries = parse(&table);
        assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries.len());
        assert_eq!(entries.len(), 3 + 1 + 1 + 1 + 8 + 2);
    }

    #[test]
    fn one_processor_boots_the_others_wait() {
        let table = table(3, 0);
        let processors: Vec<_> = parse(&table).into_iter().filter(|entry| entry[0] == PROCESSOR).collect();
        assert_eq!(
            processors.iter().map(|entry| (entry[1], entry[3])).collect::<Vec<_>>(),
            [(0, 3), (1, 1), (2, 1)]
        );
    }

    #[test]
    fn each_interrupt_in_use_has_its_pin() {
        let table = table(1, 5);
        let pins: Vec<_> = parse(&table).into_iter().filter(|entry| entry[0] == IO_INTERRUPT).collect();
        assert!(pins.iter().all(|entry| entry[5] == entry[7] && entry[6] == 1));
        assert_eq!(pins.iter().map(|entry| entry[7]).collect::<Vec<_>>(), [4, 5, 6, 7, 9, 10]);
    }

    #[test]
    fn the_largest_table_stays_below_its_pointer() {
        let end = layout::MP_TABLE.0 + table(u8::MAX, layout::MAX_SLOTS).len() as u64;
        assert!(end <= layout::MP_POINTER.0);
    }
}
