//! The device as the transport sees it.

use std::sync::Arc;

use event_manager::SubscriberId;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::handle::{Shared, VsockError, VsockHandle};
use super::worker::Worker;
use crate::event_loop::EventLoopHandle;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// Linux posts buffers of 4 KiB for the whole receive queue, so its length costs memory of the guest; 128 hold
/// what one connection may have in flight. The event queue has next to nothing to carry.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// Feature bit: sockets of type stream.
const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// The socket device.
#[derive(Debug)]
pub struct VsockDevice {
    guest_cid: u64,
    shared: Arc<Shared>,
    events: EventLoopHandle,
    worker: Option<SubscriberId>,
}

impl VsockDevice {
    /// A device for a guest with this context ID, served by this loop, and the host's side of it.
    pub fn new(guest_cid: u64, events: EventLoopHandle) -> Result<(VsockDevice, VsockHandle), VsockError> {
        // 0 to 2 and the largest are the hypervisor, the local loop, the host and "any"; the upper half is
        // reserved (section 5.10.4).
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::ContextId(guest_cid));
        }
        let shared = Shared::new()?;
        let handle = VsockHandle::new(shared.clone());
        Ok((VsockDevice { guest_cid, shared, events, worker: None }, handle))
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_VSOCK_F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter();
        let mut queue = |index| {
            let found = queues.find(|queue: &ActiveQueue| queue.index == index);
            found.map(Into::into).ok_or(ActivateError::MissingQueue(index))
        };
        let queues = [queue(0)?, queue(1)?, queue(2)?];
        let worker = Worker::new(self.guest_cid, memory, interrupt, queues, self.shared.clone());
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
