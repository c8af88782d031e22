//! The thread's work: take requests from the queue, do them, tell the driver.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::disk::Disk;
use super::request;
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::virtqueue::{QueueError, Virtqueue};

/// How many requests are done before the loop looks whether the device was reset.
const BATCH: usize = 64;

/// What the device runs on its thread.
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    queue: Virtqueue,
    disk: Arc<Disk>,
    write_through: bool,
}

impl Worker {
    /// A worker for an active device.
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Interrupt,
        queue: Virtqueue,
        disk: Arc<Disk>,
        write_through: bool,
    ) -> Worker {
        Worker { memory, interrupt, queue, disk, write_through }
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.acknowledge_kick();
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if self.queue.enable_kicks(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let written = request::serve(&self.disk, self.write_through, &self.memory, chain);
            self.queue.push_used(&self.memory, head, written)?;
            // Somebody waits for just this one, and the next may take long.
            self.queue.notify(&self.memory, &self.interrupt)?;
        }
        self.queue.kick_self();
        Ok(())
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, _: Events, ops: &mut EventOps<'_>) {
        if self.serve().is_err() {
            // The queue cannot be used any more: leave it alone until the driver resets the device.
            let _ = ops.remove(Events::empty(&self.queue));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // It fails only for want of memory in the kernel, and then the disk answers nothing.
        let _ = ops.add(Events::new(&self.queue, EventSet::IN));
    }
}
