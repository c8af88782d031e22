//! The entropy device (virtio 1.2, section 5.4): fills the guest's buffers from the host's random generator.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::buffers::GuestBuffers;
use super::virtqueue::{QueueError, Virtqueue};
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
    events: EventLoopHandle,
    worker: Option<SubscriberId>,
}

impl RngDevice {
    /// A device that is served by this loop.
    pub fn new(events: EventLoopHandle) -> Self {
        Self { events, worker: None }
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
        let worker = Worker { memory, interrupt, queue: queue.into() };
        self.worker = Some(self.events.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // It fails only when the loop has ended, and the worker with it.
            let _ = self.events.remove(worker);
        }
    }
}

struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    queue: Virtqueue,
}

impl Worker {
    /// Serves one batch of requests.
    fn serve(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let mut more = true;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop(&memory)? else {
                more = self.queue.enable_kicks(&memory)?;
                if more {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            // A malformed chain gets nothing, as does one for which the host has no entropy.
            let filled = GuestBuffers::writable(&memory, chain).map_or(0, fill);
            self.queue.push_used(&memory, head, filled as u32)?;
        }
        self.queue.notify(&memory, &self.interrupt)?;
        if more {
            self.queue.kick_self();
        }
        Ok(())
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

impl MutEventSubscriber for Worker {
    fn process(&mut self, _: Events, ops: &mut EventOps<'_>) {
        self.queue.acknowledge_kick();
        if self.serve().is_err() {
            // The queue cannot be used any more: leave it alone until the driver resets the device.
            self.interrupt.needs_reset();
            let _ = ops.remove(Events::empty(&self.queue));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // It fails only for want of memory in the kernel. Then the device serves nothing, which a driver of
        // an entropy source has to expect anyway.
        let _ = ops.add(Events::new(&self.queue, EventSet::IN));
    }
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
                seen.push(guest.wait_used(0).data);
                seen.push(guest.wait_used(0).data);
                guest.wait_interrupt();
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
        device.reset();
        device.reset();
        assert!(guest.pop_used(0).is_none());

        let mut guest = Guest::new(&[QUEUE_SIZE]);
        guest.push(0, &[Part::In(8)]);
        guest.activate(&mut device, 0);
        assert_eq!(guest.wait_used(0).len, 8);
    }

    #[test]
    fn a_device_without_its_queue_does_not_start() {
        let guest = Guest::new(&[]);
        let mut device = RngDevice::new(EventLoop::spawn("test").unwrap().handle());
        assert!(matches!(device.activate(guest.activation(0)), Err(ActivateError::MissingQueue(0))));
    }
}
