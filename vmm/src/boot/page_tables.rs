//! Page tables for the entry in 64-bit mode: the first GiB, at its own addresses.
//!
//! The kernel replaces them with its first instructions; until then it touches itself, the boot parameters and the
//! command line.

use vm_memory::GuestAddress;

/// How far the tables reach.
pub(crate) const MAPPED: GuestAddress = GuestAddress(1 << 30);

const PAGE: u64 = 0x1000;
const ENTRIES: u64 = PAGE / size_of::<u64>() as u64;
const HUGE_PAGE: u64 = 2 << 20;

const PRESENT_AND_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

/// Three tables for the address `root`, of one page each: two with a single entry, which lead to the next, and one
/// with 512 pages of 2 MiB.
pub(super) fn identity(root: GuestAddress) -> Vec<u8> {
    let link = |number: u64| (root.0 + number * PAGE) | PRESENT_AND_WRITABLE;
    let upper = [link(1), link(2)];
    let mut tables = Vec::with_capacity(3 * ENTRIES as usize);
    for entry in upper {
        tables.push(entry);
        tables.resize(tables.len().next_multiple_of(ENTRIES as usize), 0);
    }
    tables.extend((0..ENTRIES).map(|index| (index * HUGE_PAGE) | PRESENT_AND_WRITABLE | HUGE));
    tables.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the processor does (Intel SDM, volume 3, section 4.5.4).
    fn walk(root: u64, tables: &[u8], address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u32| {
            let offset = (table - root + (address >> shift & 0x1ff) * 8) as usize;
            let entry = u64::from_le_bytes(tables[offset..offset + 8].try_into().unwrap());
            (entry & 1 == 1).then_some(entry)
        };
        let table = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let directory = entry(table(entry(table(entry(root, 39)?), 30)?), 21)?;
        assert_ne!(directory & HUGE, 0);
        Some((directory & 0x000f_ffff_ffe0_0000) + (address & 0x1f_ffff))
    }

    #[test]
    fn the_first_gibibyte_is_mapped_to_itself() {
        let root = 0x9000;
        let tables = identity(GuestAddress(root));
        assert_eq!(tables.len(), 3 * PAGE as usize);
        for address in [0, 0x7000, 0x10_0000, 0x100_0000, 0x1234_5678, MAPPED.0 - 1] {
            assert_eq!(walk(root, &tables, address), Some(address), "{address:#x}");
        }
        for address in [MAPPED.0, 1 << 39, 0xffff_8000_0000_0000] {
            assert_eq!(walk(root, &tables, address), None, "{address:#x}");
        }
    }
}
