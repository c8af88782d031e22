//! The boot parameters, or "zero page" (Documentation/arch/x86/zero-page.rst).

use std::ops::Range;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use super::kernel::Kernel;
use crate::GuestMemory;
use crate::layout::{COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_MEMORY, MP_TABLE};

/// `boot_flag` and `header`: these are boot parameters.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
/// `type_of_loader`: none of those with a number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Types of ranges in the memory map.
const USABLE: u32 = 1;
const RESERVED: u32 = 2;

/// The parameters of a kernel that finds its initramfs, which may be empty, there.
pub(super) fn build(memory: &GuestMemory, kernel: &Kernel, initramfs: &Range<u64>) -> boot_params {
    let mut params = boot_params { hdr: kernel.setup_header.unwrap_or_default(), ..Default::default() };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = COMMAND_LINE.0 as u32;
    params.hdr.cmdline_size = COMMAND_LINE_SIZE as u32;
    if !initramfs.is_empty() {
        // Both fit: the initramfs lies below the gap.
        params.hdr.ramdisk_image = initramfs.start as u32;
        params.hdr.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    }
    let map = memory_map(memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

/// The memory as a firmware would report it (E820).
fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, type_| boot_e820_entry { addr: start, size: end - start, type_ };
    let mut map = vec![entry(0, MP_TABLE.0, USABLE), entry(MP_TABLE.0, HIGH_MEMORY.0, RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().max(HIGH_MEMORY);
        map.push(entry(start.0, region.start_addr().0 + region.len(), USABLE));
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn params(size: u64, initramfs_size: u64) -> boot_params {
        let kernel = Kernel {
            entry: GuestAddress(0x100_0000),
            end: GuestAddress(0x200_0000),
            initramfs_max: GuestAddress(u64::MAX),
            setup_header: None,
        };
        build(&crate::memory::create(size).unwrap(), &kernel, &(0x300_0000..0x300_0000 + initramfs_size))
    }

    fn map(params: &boot_params) -> Vec<(u64, u64, u32)> {
        let entries = &params.e820_table[..usize::from(params.e820_entries)];
        entries.iter().map(|entry| (entry.addr, entry.addr + entry.size, entry.type_)).collect()
    }

    #[test]
    fn the_memory_map_has_all_memory_and_no_gap() {
        let low = [(0, 0x9_c000, USABLE), (0x9_c000, 0x10_0000, RESERVED)];
        assert_eq!(map(&params(128 << 20, 0)), [low[0], low[1], (0x10_0000, 128 << 20, USABLE)]);
        let around_the_gap = [(0x10_0000, 3 << 30, USABLE), (4 << 30, 6 << 30, USABLE)];
        assert_eq!(map(&params(5 << 30, 0)), [low, around_the_gap].concat());
    }

    #[test]
    fn an_initramfs_is_named_if_there_is_one() {
        let hdr = params(128 << 20, 4711).hdr;
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x300_0000, 4711));
        let hdr = params(128 << 20, 0).hdr;
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0, 0));
    }
}
