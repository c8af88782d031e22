//! A queue while the driver sets it up: what it wrote, unchecked until the device is activated.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};

use super::registers::QueueRegister;
use crate::GuestMemory;

/// Bytes of a descriptor (virtio 1.2, section 2.7.5).
const DESCRIPTOR: u64 = 16;
/// Bytes of the available ring: flags, index, entries of 2 bytes, and `used_event`.
const AVAILABLE: (u64, u64) = (6, 2);
/// Bytes of the used ring: flags, index, entries of 8 bytes, and `avail_event`.
const USED: (u64, u64) = (6, 8);

/// The registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueSetup {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueSetup {
    /// An unused queue of a device that takes at most `max_size` descriptors.
    pub(super) fn new(max_size: u16) -> Self {
        Self { max_size, size: u32::from(max_size), ready: false, descriptors: 0, available: 0, used: 0 }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// A driver's write. A queue that is ready does not change any more (virtio 1.2, section 4.2.2.2).
    pub(super) fn write(&mut self, register: QueueRegister, value: u32) {
        if self.ready && register != QueueRegister::Ready {
            return;
        }
        match register {
            QueueRegister::Size => self.size = value,
            QueueRegister::Ready => self.ready = value == 1,
            QueueRegister::DescriptorLow => set_low(&mut self.descriptors, value),
            QueueRegister::DescriptorHigh => set_high(&mut self.descriptors, value),
            QueueRegister::AvailableLow => set_low(&mut self.available, value),
            QueueRegister::AvailableHigh => set_high(&mut self.available, value),
            QueueRegister::UsedLow => set_low(&mut self.used, value),
            QueueRegister::UsedHigh => set_high(&mut self.used, value),
        }
    }

    /// The queue, if everything about it is in order: its size a power of two within the limit, its parts
    /// aligned and each as a whole within the guest's memory.
    ///
    /// `Queue::is_valid` is no help for the last point: it looks at the address behind a part alone, so that a
    /// part that begins in the MMIO gap passes and one that ends where the memory ends does not.
    pub(super) fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let size = u16::try_from(self.size).ok()?;
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .ok()?;
        let size = u64::from(size);
        let parts = [
            (self.descriptors, DESCRIPTOR * size),
            (self.available, AVAILABLE.0 + AVAILABLE.1 * size),
            (self.used, USED.0 + USED.1 * size),
        ];
        // virtio-queue takes a ring at address 0 for one that was never set.
        let inside = |&(address, length): &(u64, u64)| {
            address != 0 && memory.check_range(GuestAddress(address), length as usize)
        };
        parts.iter().all(inside).then_some(queue)
    }

    /// The queue as a device finds it that goes on where another one has stopped, with nothing under way. What that one
    /// had taken and not given back is on offer once more.
    pub(super) fn rebuild(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let mut queue = self.build(memory, event_idx)?;
        let used = queue.used_idx(&**memory, Ordering::Acquire).ok()?.0;
        queue.set_next_avail(used);
        queue.set_next_used(used);
        Some(queue)
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    const GAP: u64 = 0x10_0000;
    const HIGH: u64 = 0x20_0000;

    /// Memory with a gap, as the machine's.
    fn memory() -> GuestMemory {
        let ranges = [(GuestAddress(0), GAP as usize), (GuestAddress(HIGH), 0x10_0000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn setup(size: u32, descriptors: u64, available: u64, used: u64) -> QueueSetup {
        QueueSetup { max_size: 256, size, ready: true, descriptors, available, used }
    }

    fn is_accepted(setup: &QueueSetup) -> bool {
        setup.build(&memory(), false).is_some()
    }

    #[test]
    fn a_good_queue_is_built_as_it_was_set_up() {
        let queue = setup(128, 0x1000, 0x2000, HIGH).build(&memory(), true).unwrap();
        assert!(queue.ready() && queue.event_idx_enabled());
        assert_eq!((queue.size(), queue.max_size()), (128, 256));
        assert_eq!((queue.desc_table(), queue.avail_ring(), queue.used_ring()), (0x1000, 0x2000, HIGH));
    }

    #[test]
    fn verify_spec_2_7_sizes_are_powers_of_two_within_the_limit() {
        for size in [1, 2, 64, 256] {
            assert!(is_accepted(&setup(size, 0x1000, 0x3000, 0x4000)), "{size}");
        }
        for size in [0, 3, 255, 512, 0x1_0000, 0x1_0100, u32::MAX] {
            assert!(!is_accepted(&setup(size, 0x1000, 0x3000, 0x4000)), "{size}");
        }
    }

    #[test]
    fn verify_spec_2_7_parts_are_aligned() {
        assert!(!is_accepted(&setup(16, 0x1008, 0x3000, 0x4000)));
        assert!(!is_accepted(&setup(16, 0x1000, 0x3001, 0x4000)));
        assert!(!is_accepted(&setup(16, 0x1000, 0x3000, 0x4002)));
    }

    #[test]
    fn parts_lie_within_memory_as_a_whole() {
        let ends_with_memory = GAP - 16 * 16;
        assert!(is_accepted(&setup(16, ends_with_memory, 0x3000, 0x4000)), "up to the last byte");
        assert!(!is_accepted(&setup(16, ends_with_memory + 16, 0x3000, 0x4000)), "one descriptor too far");
        assert!(!is_accepted(&setup(16, HIGH - 128, 0x3000, 0x4000)), "begins in the gap, ends in memory");
        assert!(!is_accepted(&setup(16, 0x1000, GAP, 0x4000)), "in the gap");
        assert!(!is_accepted(&setup(16, 0x1000, 0x3000, u64::MAX - 3)), "wraps around");
        assert!(!is_accepted(&setup(16, 0, 0x3000, 0x4000)), "address 0 means: never set");
    }

    #[test]
    fn verify_spec_4_2_2_2_a_ready_queue_does_not_change() {
        let mut queue = setup(16, 0x1000, 0x3000, 0x4000);
        let before = queue.clone();
        queue.write(QueueRegister::DescriptorLow, 0x5000);
        queue.write(QueueRegister::Size, 8);
        assert_eq!(queue, before);
        queue.write(QueueRegister::Ready, 0);
        queue.write(QueueRegister::DescriptorHigh, 1);
        queue.write(QueueRegister::DescriptorLow, 0x5000);
        assert_eq!((queue.descriptors, queue.is_ready()), (0x1_0000_5000, false));
    }
}
