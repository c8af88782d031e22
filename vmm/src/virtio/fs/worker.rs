//! The thread's work: take requests from the queues, have them served, tell the driver.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use nix::errno::Errno;
use vm_memory::GuestMemory as _;

use super::pace::Pace;
use super::requests::Requests;
use super::server::FileServer;
use super::{FEATURE_NOTICES, FsError, HIGH_PRIORITY_QUEUE, NOTICES_QUEUE, REQUEST_QUEUE, notices, thread};
use crate::GuestMemory;
use crate::event_loop::EventLoop;
use crate::virtio::buffers::Descriptors;
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::{ActivateError, Activation, Interrupt};

/// How many requests of a queue are served before the other queue gets its turn.
const BATCH: usize = 64;

/// What the device runs on its thread.
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    requests: Arc<Requests>,
    /// The other queues.
    queues: Vec<Virtqueue>,
    server: Arc<FileServer>,
}

impl Worker {
    /// A worker for an active device.
    pub(super) fn new(mut activation: Activation, server: Arc<FileServer>) -> Result<Worker, ActivateError> {
        let queues = std::mem::take(&mut activation.queues);
        let mut queues: Vec<_> = queues.into_iter().map(Virtqueue::from).collect();
        let requests = queues.iter().position(|queue| queue.index() == REQUEST_QUEUE);
        let requests = queues.swap_remove(requests.ok_or(ActivateError::MissingQueue(REQUEST_QUEUE))?);
        let requests = Arc::new(Requests::new(&activation, requests, server.clone()));
        let takes_notices = activation.features & 1 << FEATURE_NOTICES != 0;
        queues.retain(|queue| match queue.index() {
            HIGH_PRIORITY_QUEUE => true,
            NOTICES_QUEUE => takes_notices,
            _ => false,
        });
        let Activation { memory, interrupt, .. } = activation;
        Ok(Worker { memory, interrupt, requests, queues, server })
    }

    /// The queue of requests, which other threads may serve as well.
    pub(super) fn requests(&self) -> Arc<Requests> {
        self.requests.clone()
    }

    /// Serves one batch of what came by another queue than that of requests.
    fn serve_other(&mut self, kicked: RawFd) -> Result<(), QueueError> {
        let kicked = self.queues.iter_mut().find(|queue| queue.as_raw_fd() == kicked);
        let Some(queue) = kicked else { return Ok(()) };
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
            let written = self.server.serve(&self.memory, chain, Pace::Any).unwrap_or(0);
            queue.push_used(&self.memory, head, written)?;
            // Somebody waits for just this one, and the next may take long.
            queue.notify(&self.memory, &self.interrupt)?;
        }
        queue.kick_self();
        Ok(())
    }

    /// Leaves the queues alone until the driver resets the device, which it is told.
    fn stop(&self, ops: &mut EventOps<'_>) {
        self.requests.end_at_once();
        self.interrupt.needs_reset();
        for event in self.events() {
            let _ = ops.remove(Events::empty_raw(event));
        }
    }

    /// What tells of something to do.
    fn events(&self) -> Vec<RawFd> {
        let others = self.queues.iter().map(AsRawFd::as_raw_fd);
        others.chain([self.requests.event()]).collect()
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let served = match events.fd() == self.requests.event() {
            true => self.requests.serve(),
            false => self.serve_other(events.fd()),
        };
        if served.is_err() {
            // The queue cannot be used any more: leave all of them alone until the driver resets the device.
            self.stop(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = |event| ops.add(Events::new_raw(event, EventSet::IN)).is_ok();
        if !self.events().into_iter().all(added) {
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
