//! The guest's memory.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::errno;

use crate::GuestMemory;
use crate::layout::{GAP_END, GAP_START};

/// The least memory in which a kernel can be expected to start.
pub const MIN_MEMORY: u64 = 16 << 20;
/// The most; what 4-level page tables of the host can map beside everything else.
pub const MAX_MEMORY: u64 = 16 << 40;
const MIB: u64 = 1 << 20;
/// A huge page of the host.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// Usually the second fits.
const ALIGNMENT_ATTEMPTS: usize = 8;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of bounds.
    #[error("a machine cannot have {0} bytes of memory: it takes {min} MiB to {max} TiB",
        min = MIN_MEMORY >> 20, max = MAX_MEMORY >> 40)]
    Size(u64),
    /// The host did not give the address space.
    #[error("{0} bytes of memory for the guest could not be mapped: {1}")]
    Map(u64, FromRangesError),
    /// KVM did not take it.
    #[error("KVM refused the guest's memory: {0}")]
    Register(errno::Error),
}

/// Reserves memory for a guest. No page of it exists before it is touched.
pub(crate) fn create(size: u64) -> Result<GuestMemory, MemoryError> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) {
        return Err(MemoryError::Size(size));
    }
    let failed = |error| MemoryError::Map(size, error);
    let regions = ranges(size.next_multiple_of(MIB)).into_iter().map(|(start, length)| {
        let mapping = map_aligned(length).map_err(FromRangesError::from)?;
        let region = GuestRegionMmap::new(mapping, start).ok_or(FromRangesError::InvalidGuestRegion)?;
        advise_huge_pages(&region);
        keep_from_children(&region);
        Ok::<_, FromRangesError>(region)
    });
    let regions = regions.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| failed(error.into()))?;
    Ok(Arc::new(memory))
}

/// How much memory there is.
pub(crate) fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Maps memory that starts at a multiple of a huge page, since only then can KVM map huge pages to the guest.
///
/// Kernels place mappings below one another, and before Linux 6.7 not aligned. So what a mapping starts too high is
/// filled for the next attempt, each time by more, lest the filler end up in a hole between other mappings. Should
/// that never fit, huge pages are lost and nothing else.
fn map_aligned(length: usize) -> Result<MmapRegion, MmapRegionError> {
    let mut fillers = Vec::new();
    loop {
        let mapping = MmapRegion::new(length)?;
        let excess = mapping.as_ptr() as usize % HUGE_PAGE;
        if excess == 0 || fillers.len() == ALIGNMENT_ATTEMPTS {
            return Ok(mapping);
        }
        drop(mapping);
        fillers.push(MmapRegion::<()>::new(excess + (HUGE_PAGE << fillers.len()))?);
    }
}

/// Makes the memory that of the virtual machine. Whoever keeps a descriptor of the machine has to keep the memory,
/// too, and longer.
pub(crate) fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is a mapping of this size that lives as long as `memory`. The virtual machine lives as
        // long as any descriptor of it or of its vCPUs; whoever owns one (machine, slots, vCPUs, and through them
        // their threads) owns the memory as well, in a field that is dropped later. Where this process looks at the
        // guest's memory, it does so by volatile or atomic accesses and system calls, never through a reference.
        unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Register)?;
    }
    Ok(())
}

/// Where memory of this size lies: around the gap.
fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(GAP_START.0);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GAP_END, (size - low) as usize));
    }
    ranges
}

/// A process that the monitor forks has no use for the guest's memory, and its page tables would have to be copied.
fn keep_from_children(region: &GuestRegionMmap) {
    // SAFETY: the range is a mapping of this process, and the advice changes nothing of its contents.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTFORK) };
}

/// With huge pages a guest that boots takes a page fault for every 2 MiB instead of every 4 KiB. It is advice: where
/// the host has them switched off, nothing changes.
fn advise_huge_pages(region: &GuestRegionMmap) {
    // SAFETY: the range is a mapping of this process, and the advice changes nothing of its contents.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_gap_free() {
        assert_eq!(ranges(512 << 20), [(GuestAddress(0), 512 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ranges(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }

    #[test]
    fn memory_is_reserved_and_not_used() {
        let memory = create(64 << 30).unwrap();
        assert_eq!(memory.last_addr().0, (65 << 30) - 1);
        assert!(!memory.address_in_range(crate::layout::slot_address(0)));
        for region in memory.iter() {
            let mut resident = vec![0xff_u8; 1 << 18];
            // SAFETY: the range is mapped, and there is a byte of room for each of its pages.
            let looked =
                unsafe { libc::mincore(region.as_ptr().cast(), resident.len() << 12, resident.as_mut_ptr()) };
            assert_eq!(looked, 0);
            assert!(resident.iter().all(|page| page & 1 == 0), "no page of its first GiB exists");
        }
    }

    #[test]
    fn memory_can_have_huge_pages() {
        for size in [32 << 20, 33 << 20, 5 << 30] {
            let memory = create(size).unwrap();
            let starts: Vec<_> = memory.iter().map(|region| region.as_ptr() as usize % HUGE_PAGE).collect();
            assert!(starts.iter().all(|start| *start == 0), "{starts:x?}");
        }
    }

    #[test]
    fn sizes_are_whole_mebibytes() {
        assert_eq!(create((32 << 20) + 1).unwrap().last_addr().0, (33 << 20) - 1);
    }

    #[test]
    fn sizes_without_sense_are_refused() {
        for size in [0, 4096, MIN_MEMORY - 1, MAX_MEMORY + 1, u64::MAX] {
            assert!(matches!(create(size), Err(MemoryError::Size(_))), "{size}");
        }
    }
}
