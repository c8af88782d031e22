//! The thread's work: take requests from the queues, have them served, tell the driver.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::server::FileServer;
use super::{HIGH_PRIORITY_QUEUE, REQUEST_QUEUE, thread};
use crate::GuestMemory;
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::{Activation, Interrupt};

/// How many requests of a queue are served before the other queue gets its turn.
const BATCH: usize = 64;

/// What the device runs on its thread.
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    queues: Vec<Virtqueue>,
    server: Arc<FileServer>,
    /// Whether the thread may serve files.
    entered: bool,
}

impl Worker {
    /// A worker for an active device.
    pub(super) fn new(activation: Activation, server: Arc<FileServer>) -> Worker {
        let Activation { memory, queues, interrupt, .. } = activation;
        let known = [HIGH_PRIORITY_QUEUE, REQUEST_QUEUE];
        let queues = queues.into_iter().filter(|queue| known.contains(&queue.index));
        Worker { memory, interrupt, queues: queues.map(Virtqueue::from).collect(), server, entered: false }
    }

    /// Serves one batch of requests.
    fn serve(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(queue) else { return Ok(()) };
        queue.acknowledge_kick();
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(&self.memory)? else {
                if queue.enable_kicks(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let written = self.server.serve(&self.memory, chain);
            queue.push_used(&self.memory, head, written)?;
            // Somebody waits for just this one, and the next may take long.
            queue.notify(&self.memory, &self.interrupt)?;
        }
        queue.kick_self();
        Ok(())
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let kicked = self.queues.iter().position(|queue| queue.as_raw_fd() == events.fd());
        let Some(queue) = kicked else { return };
        if !self.entered || self.serve(queue).is_err() {
            // The queue cannot be used any more: leave it alone until the driver resets the device.
            let _ = ops.remove(Events::empty(&self.queues[queue]));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.entered = thread::enter(&self.server).is_ok();
        for queue in &self.queues {
            // It fails only for want of memory in the kernel, and then the mount in the guest does.
            let _ = ops.add(Events::new(queue, EventSet::IN));
        }
    }
}
