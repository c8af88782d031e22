//! Which of its memory a machine has touched since it was restored, and how another one gets it at once.
//!
//! Each first touch of a page interrupts the guest, and the host looks for the page, copies it perhaps, and maps it. What
//! one machine has touched in its first moments the next one will, too, so all that can be done in one go before it
//! starts. It is a hint: whatever the list says, a machine does the same, earlier or later.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::GuestMemory;
use crate::pagemap::{Entry, PAGE, Pagemap};

/// Pages whose entries are read at a time.
const BATCH: u64 = 4096;
/// Stretches that lie no further apart become one where that only maps what is there: a request costs more than a page.
const GAP: u64 = 4;
/// A list has no more stretches than that.
const MOST_STRETCHES: usize = 16 << 10;

mod requests {
    use kvm_bindings::kvm_pre_fault_memory;
    nix::ioctl_readwrite!(pre_fault_memory, 0xae, 0xd5, kvm_pre_fault_memory);
}

/// Memory that a guest has touched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// What it has read, and what it has written.
    read: Vec<Stretch>,
    written: Vec<Stretch>,
}

/// Pages beside one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stretch {
    /// The number of the first page, by guest address.
    first: u64,
    count: u64,
}

impl Touched {
    /// What has been touched of memory that was mapped from a file.
    pub(crate) fn of(memory: &GuestMemory) -> io::Result<Touched> {
        let pages = Pagemap::open()?;
        let mut touched = Touched::default();
        for region in memory.iter() {
            let first = region.start_addr().0 / PAGE;
            let place = region.as_ptr() as u64;
            let count = region.len() / PAGE;
            for start in (0..count).step_by(BATCH as usize) {
                let entries = pages.read(place + start * PAGE, BATCH.min(count - start))?;
                for (page, entry) in (first + start..).zip(entries) {
                    touched.note(page, entry);
                }
            }
        }
        Ok(touched)
    }

    fn note(&mut self, page: u64, entry: Entry) {
        let page = Stretch { first: page, count: 1 };
        match entry {
            entry if !entry.is_present() => {}
            entry if entry.is_of_file() => add(&mut self.read, page, GAP),
            // Each page more would be a copy more, for as long as the machine runs.
            _ => add(&mut self.written, page, 0),
        }
    }

    /// Pages that will be read, and such as will be written, which may be among them.
    pub(crate) fn expected(read: impl Iterator<Item = Range<u64>>, written: &[Range<u64>]) -> Touched {
        // A request of KVM's for nothing would fail, and end all.
        let stretch = |pages: Range<u64>| {
            let count = pages.end.checked_sub(pages.start).filter(|count| *count > 0)?;
            Some(Stretch { first: pages.start, count })
        };
        let written = written.iter().cloned().filter_map(stretch).collect();
        Touched { read: read.filter_map(stretch).collect(), written }
    }

    /// Has the host provide these pages: those that will be written as copies, others as those of the file. A host that
    /// cannot do that in advance does it later.
    pub(crate) fn provide(&self, memory: &GuestMemory) {
        for (list, advice) in
            [(&self.written, libc::MADV_POPULATE_WRITE), (&self.read, libc::MADV_POPULATE_READ)]
        {
            for (region, offset, length) in list.iter().filter_map(|stretch| stretch.within(memory)) {
                let Ok(place) = region.get_host_address(MemoryRegionAddress(offset)) else { continue };
                // SAFETY: the range lies within the region's mapping, and the advice changes nothing of its contents.
                unsafe { libc::madvise(place.cast(), length as usize, advice) };
            }
        }
    }

    /// Has KVM map these pages to the guest. A KVM that cannot do that in advance does it later.
    pub(crate) fn map(&self, memory: &GuestMemory, vcpu: &VcpuFd) {
        // Between what is written lies what is only mapped.
        let mut written = Vec::new();
        self.written.iter().for_each(|stretch| add(&mut written, *stretch, GAP));
        for stretch in written.iter().chain(&self.read) {
            let Some((region, offset, length)) = stretch.within(memory) else { continue };
            let gpa = region.start_addr().0 + offset;
            let mut request = kvm_pre_fault_memory { gpa, size: length, ..Default::default() };
            // SAFETY: the request reads and writes the structure alone, which outlives it.
            let mapped = unsafe { requests::pre_fault_memory(vcpu.as_raw_fd(), &raw mut request) };
            if mapped.is_err() {
                return;
            }
        }
    }
}

/// Adds a stretch to a list in ascending order. It becomes one with the last if they lie no further apart than `gap`.
fn add(list: &mut Vec<Stretch>, new: Stretch, gap: u64) {
    let is_full = list.len() >= MOST_STRETCHES;
    match list.last_mut().and_then(|last| Some((last.joined(new, gap)?, last))) {
        Some((joined, last)) => *last = joined,
        None if is_full => {}
        None => list.push(new),
    }
}

impl Stretch {
    /// This one and a later one with all between them, if that is no more than `gap` pages. The numbers may be anything.
    fn joined(self, later: Stretch, gap: u64) -> Option<Stretch> {
        let between = later.first.checked_sub(self.first.checked_add(self.count)?)?;
        let end = later.first.checked_add(later.count)?;
        (between <= gap).then_some(Stretch { count: end - self.first, ..self })
    }

    /// The region that it begins in, where in that, and how many bytes of it, if it is in memory.
    fn within(self, memory: &GuestMemory) -> Option<(&GuestRegionMmap, u64, u64)> {
        let region = memory.find_region(GuestAddress(self.first.checked_mul(PAGE)?))?;
        let offset = self.first * PAGE - region.start_addr().0;
        let length = self.count.checked_mul(PAGE)?.min(region.len() - offset);
        Some((region, offset, length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::{image, memory};

    const SIZE: u64 = 32 << 20;

    fn restored() -> GuestMemory {
        let first = memory::create(SIZE).unwrap();
        (0..SIZE / PAGE).for_each(|page| first.write_obj(page + 1, GuestAddress(page * PAGE)).unwrap());
        let file = tempfile::tempfile().unwrap();
        image::write(&first, &file).unwrap();
        let memory = memory::create(SIZE).unwrap();
        image::map(&memory, &file).unwrap();
        memory
    }

    #[test]
    fn what_is_touched_is_found_and_provided() {
        let memory = restored();
        assert_eq!(Touched::of(&memory).unwrap(), Touched::default());
        memory.write_obj(1_u8, GuestAddress(100 * PAGE)).unwrap();
        memory.write_obj(1_u8, GuestAddress(102 * PAGE)).unwrap();
        memory.read_obj::<u8>(GuestAddress(3000 * PAGE)).unwrap();
        let touched = Touched::of(&memory).unwrap();
        let written = [100, 102].map(|first| Stretch { first, count: 1 });
        assert_eq!(touched.written, written, "nothing is copied that lies between");
        // The host maps what lies around it, too.
        assert!(
            touched.read.iter().any(|stretch| (stretch.first..stretch.first + stretch.count).contains(&3000))
        );

        let other = restored();
        touched.provide(&other);
        let provided = Touched::of(&other).unwrap();
        assert_eq!(provided.written, touched.written);
        assert!(
            provided
                .read
                .iter()
                .any(|stretch| (stretch.first..stretch.first + stretch.count).contains(&3000))
        );
        assert_eq!(other.read_obj::<u64>(GuestAddress(100 * PAGE)).unwrap(), 101);
    }

    #[test]
    fn stretches_that_are_close_become_one() {
        let joined = |gap| {
            let mut list = Vec::new();
            [1, 2, 7, 13, 14].iter().for_each(|&first| add(&mut list, Stretch { first, count: 1 }, gap));
            list.iter().map(|stretch| (stretch.first, stretch.count)).collect::<Vec<_>>()
        };
        assert_eq!(joined(4), [(1, 7), (13, 2)]);
        assert_eq!(joined(0), [(1, 2), (7, 1), (13, 2)]);
    }

    #[test]
    fn nothing_is_not_asked_for() {
        let empty = Range { start: 7, end: 7 };
        let backwards = Range { start: 7, end: 5 };
        let expected = Touched::expected([empty.clone(), 3..5].into_iter(), &[empty, backwards, 9..10]);
        assert_eq!(expected.read, [Stretch { first: 3, count: 2 }]);
        assert_eq!(expected.written, [Stretch { first: 9, count: 1 }]);
    }

    proptest! {
        #[test]
        fn no_list_reaches_beyond_the_memory(first: u64, count: u64) {
            let memory = memory::create(SIZE).unwrap();
            let stretch = Stretch { first, count };
            if let Some((region, offset, length)) = stretch.within(&memory) {
                prop_assert!(offset + length <= region.len());
            }
            let list = vec![Stretch { first: first % 10_000, count }];
            Touched { read: list, written: Vec::new() }.provide(&memory);
        }

        #[test]
        fn two_stretches_are_joined_if_they_are_close(first in 0..1000_u64, count: u32, between in 0..10_u64, length: u32) {
            let start = first + u64::from(count) + between;
            let (count, length) = (u64::from(count), u64::from(length));
            let mut list = vec![Stretch { first, count }];
            add(&mut list, Stretch { first: start, count: length }, GAP);
            let apart = vec![Stretch { first, count }, Stretch { first: start, count: length }];
            let joined = vec![Stretch { first, count: start + length - first }];
            prop_assert_eq!(list, if between <= GAP { joined } else { apart });
        }

        #[test]
        fn numbers_without_sense_are_left_as_they_are(first: u64, count: u64, start: u64, length: u64) {
            let mut list = vec![Stretch { first, count }];
            add(&mut list, Stretch { first: start, count: length }, GAP);
            prop_assert_eq!(list[0].first, first);
            let end = |stretch: &Stretch| u128::from(stretch.first) + u128::from(stretch.count);
            prop_assert_eq!(end(list.last().unwrap()), u128::from(start) + u128::from(length));
        }
    }
}
