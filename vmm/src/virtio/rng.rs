//! The entropy device (virtio 1.2, section 5.4): fills the guest's buffers from the host's random generator.

use std::os::fd::{AsRawFd, RawFd};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::buffers::GuestBuffers;
use super::virtqueue::{QueueError, Virtqueue};
use super::worker::{self, Notify, Post, Stop};
use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;
use crate::event_loop::EventLoopHandle;

const QUEUE_SIZE: u16 = 64;
/// A request gets no more than this. The device may use less than it was offered (section 5.4.6.2).
const MAX_REQUEST: usize = 64 << 10;
/// How many requests are served before other devices of the loop get their turn.
const BATCH: usize = 16;

/// The entropy device.
#[derive(Debug)]
pub struct RngDevice {
    post: Post,
}

impl RngDevice {
    /// A device that is served by this loop.
    pub fn new(events: EventLoopHandle) -> Self {
        Self { post: Post::new(events) }
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let queue =
            queues.into_iter().find(|queue| queue.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let to_worker = interrupt.clone();
        let worker = |stop| Worker { memory, interrupt: to_worker, queue: queue.into(), stop };
        Ok(self.post.start(interrupt, worker)?)
    }

    fn reset(&mut self) {
        self.post.stop();
    }
}

struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    queue: Virtqueue,
    stop: Stop,
}

impl worker::Worker for Worker {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.queue.as_raw_fd(), EventSet::IN)]
    }

    fn process(&mut self, _: RawFd) -> Result<(), QueueError> {
        let (memory, batch) = (&*self.memory, (BATCH, Notify::Batch));
        worker::serve(&mut self.queue, memory, &self.interrupt, &self.stop, batch, |chain| {
            // A malformed chain gets nothing, as does one for which the host has no entropy.
            GuestBuffers::writable(memory, chain).map_or(0, fill) as u32
        })
    }
}

/// Fills buffers up to the limit; returns how many bytes were written.
fn fill(mut buffers: GuestBuffers<'_>) -> usize {
    buffers.truncate(MAX_REQUEST);
    let mut entropy = [0; 4096];
    let mut filled = 0;
    while !buffers.is_empty() {
        let entropy = &mut entropy[..buffers.len().min(4096)];
        if getrandom::fill(entropy).is_err() {
            break;
        }
        filled += buffers.write(entropy);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_loop::EventLoop;
    use crate::virtio::testing::{Descriptor, Guest, MEMORY, Part, WRITE};

    fn running(guest: &Guest, features: u64) -> RngDevice {
        let mut device = RngDevice::new(EventLoop::spawn("test").unwrap().handle());
        guest.activate(&mut device, features);
        device
    }

    #[test]
    fn requests_are_filled_with_different_bytes() {
        for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
            let mut guest = Guest::new(&[QUEUE_SIZE]);
            let _device = running(&guest, features);
            let mut seen = Vec::new();
            for _ in 0..2 {
                guest.push(0, &[Part::In(16), Part::In(3), Part::In(45)]);
                guest.push_indirect(0, &[Part::In(32), Part::In(32)]);
                guest.kick(0);
                // In this order: a driver that has seen the buffers already need not be interrupted for them.
                guest.wait_interrupt();
                seen.push(guest.wait_used(0).data);
                seen.push(guest.wait_used(0).data);
            }
            assert!(seen.iter().all(|bytes| bytes.len() == 64));
            seen.sort();
            seen.dedup();
            assert_eq!(seen.len(), 4);
        }
    }

    #[test]
    fn a_request_is_capped() {
        let mut guest = Guest::new(&[QUEUE_SIZE]);
        let _device = running(&guest, 0);
        guest.push(0, &[Part::In(1 << 20), Part::In(1 << 20)]);
        guest.kick(0);
        let used = guest.wait_used(0);
        assert_eq!(used.len as usize, MAX_REQUEST);
        assert!(used.data.iter().any(|&byte| byte != 0));
    }

    #[test]
    fn a_full_queue_is_served_to_its_end() {
        let mut guest = Guest::new(&[QUEUE_SIZE]);
        let _device = running(&guest, 1 << VIRTIO_RING_F_EVENT_IDX);
        for _ in 0..QUEUE_SIZE {
            guest.push(0, &[Part::In(8)]);
        }
        guest.kick(0);
        for _ in 0..QUEUE_SIZE {
            assert_eq!(guest.wait_used(0).len, 8);
        }
    }

    #[test]
    fn malformed_chains_come_back_empty() {
        let mut guest = Guest::new(&[QUEUE_SIZE]);
        let _device = running(&guest, 0);
        for descriptor in [
            Descriptor::new(0x40_0000, 8, 0, 0),
            Descriptor::new(MEMORY - 4, 8, WRITE, 0),
            Descriptor::new(0, 0, WRITE, 0),
        ] {
            guest.push_raw(0, &[descriptor]);
            guest.kick(0);
            assert_eq!(guest.wait_used(0).len, 0);
        }
    }

    #[test]
    fn a_corrupt_queue_stops_the_device_and_a_reset_revives_it() {
        let mut guest = Guest::new(&[QUEUE_SIZE]);
        let mut device = running(&guest, 0);
        guest.set_available(0, QUEUE_SIZE + 1);
        guest.kick(0);
        guest.wait_needs_reset();
        device.reset();
        device.reset();
        assert!(guest.pop_used(0).is_none());

        let mut guest = Guest::new(&[QUEUE_SIZE]);
        guest.push(0, &[Part::In(8)]);
        guest.activate(&mut device, 0);
        assert_eq!(guest.wait_used(0).len, 8);
    }

    #[test]
    fn a_device_whose_loop_has_ended_says_so() {
        let guest = Guest::new(&[QUEUE_SIZE]);
        let device = running(&guest, 0);
        assert!(!guest.interrupt.is_reset_needed());
        drop(device);
        assert!(guest.interrupt.is_reset_needed());
    }

    #[test]
    fn a_device_that_cannot_hear_its_driver_says_so() {
        let guest = Guest::new(&[QUEUE_SIZE]);
        let mut device = RngDevice::new(EventLoop::spawn("test").unwrap().handle());
        device.activate(guest.deaf_activation(0)).unwrap();
        assert!(guest.interrupt.is_reset_needed());
    }

    #[test]
    fn a_device_without_its_queue_does_not_start() {
        let guest = Guest::new(&[]);
        let mut device = RngDevice::new(EventLoop::spawn("test").unwrap().handle());
        assert!(matches!(device.activate(guest.activation(0)), Err(ActivateError::MissingQueue(0))));
    }
}
