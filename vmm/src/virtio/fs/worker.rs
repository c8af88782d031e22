//! The thread's work: take requests from the queues, have them served, tell the driver.

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use nix::errno::Errno;
use vm_memory::GuestMemory as _;

use super::server::FileServer;
use super::{FEATURE_NOTICES, FsError, HIGH_PRIORITY_QUEUE, NOTICES_QUEUE, REQUEST_QUEUE, notices, thread};
use crate::GuestMemory;
use crate::event_loop::EventLoop;
use crate::virtio::buffers::Descriptors;
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
}

impl Worker {
    /// A worker for an active device.
    pub(super) fn new(activation: Activation, server: Arc<FileServer>) -> Worker {
        let Activation { memory, queues, interrupt, features } = activation;
        let takes_notices = features & 1 << FEATURE_NOTICES != 0;
        let known = [HIGH_PRIORITY_QUEUE, REQUEST_QUEUE];
        let known = known.into_iter().chain(takes_notices.then_some(NOTICES_QUEUE));
        let queues = queues.into_iter().filter(|queue| known.clone().any(|index| index == queue.index));
        Worker { memory, interrupt, queues: queues.map(Virtqueue::from).collect(), server }
    }

    /// Serves one batch of requests.
    fn serve(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(queue) else { return Ok(()) };
        queue.acknowledge_kick();
        if queue.index() == NOTICES_QUEUE {
            return self.server.borrow_memory(&self.memory, queue);
        }
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

    /// Leaves the queues alone until the driver resets the device, which it is told.
    fn stop(&self, ops: &mut EventOps<'_>) {
        self.interrupt.needs_reset();
        for queue in &self.queues {
            let _ = ops.remove(Events::empty(queue));
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let kicked = self.queues.iter().position(|queue| queue.as_raw_fd() == events.fd());
        let Some(queue) = kicked else { return };
        if self.serve(queue).is_err() {
            // The queue cannot be used any more: leave all of them alone until the driver resets the device.
            self.stop(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = |queue| ops.add(Events::new(queue, EventSet::IN)).is_ok();
        if !self.queues.iter().all(added) {
            // For want of memory in the kernel. A driver that waits for nothing should hear of it.
            self.stop(ops);
        }
    }
}

impl FileServer {
    /// Takes the memory for notices that the driver lends. It does not come back by the queue. What makes no sense is
    /// left where it is, and the driver without notices.
    fn borrow_memory(&self, memory: &GuestMemory, queue: &mut Virtqueue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop(memory)? {
            let Some(Ok(lent)) = Descriptors::of(chain).next() else { continue };
            let is_there = memory.get_slice(lent.addr(), notices::LEN).is_ok();
            let is_aligned = lent.addr().0.is_multiple_of(align_of::<u64>() as u64);
            if is_there && is_aligned && lent.is_write_only() && lent.len() as usize >= notices::LEN {
                self.notices.lend(memory.clone(), lent.addr());
            }
        }
        Ok(())
    }
}

/// Makes the thread of a loop one that serves files.
pub(super) fn enter(events: &EventLoop, server: &Arc<FileServer>) -> Result<(), FsError> {
    let (outcome, entered) = mpsc::channel();
    let entrance = Entrance { server: server.clone(), outcome };
    let id = events.handle().add(Box::new(entrance))?;
    drop(events.handle().remove(id)?);
    // It is there, because `init` has run.
    let entered = entered.recv().unwrap_or(Err(Errno::ESRCH));
    entered.map_err(|errno| FsError::Thread(errno.into()))
}

/// What a loop runs to get its thread ready.
struct Entrance {
    server: Arc<FileServer>,
    outcome: mpsc::Sender<Result<(), Errno>>,
}

impl MutEventSubscriber for Entrance {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}

    fn init(&mut self, _: &mut EventOps<'_>) {
        // It fails only when the device is not wanted any more.
        let _ = self.outcome.send(thread::enter(&self.server));
    }
}
