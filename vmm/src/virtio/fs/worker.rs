//! The thread's work: take requests from the queues, have them served, tell the driver.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use nix::errno::Errno;
use vm_memory::GuestMemory as _;

use super::requests::Requests;
use super::server::FileServer;
use super::{FEATURE_NOTICES, FsError, HIGH_PRIORITY_QUEUE, NOTICES_QUEUE, REQUEST_QUEUE, notices, thread};
use crate::GuestMemory;
use crate::event_loop::EventLoop;
use crate::virtio::buffers::Descriptors;
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::{ActivateError, Activation, Interrupt};

/// What the device runs on its thread.
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    server: Arc<FileServer>,
    requests: Arc<Requests>,
    /// Those that must not wait for others.
    urgent: Option<Requests>,
    /// By which memory for notices is lent.
    notices: Option<Virtqueue>,
}

impl Worker {
    /// A worker for an active device.
    pub(super) fn new(mut activation: Activation, server: Arc<FileServer>) -> Result<Worker, ActivateError> {
        let queues = std::mem::take(&mut activation.queues);
        let mut queues: Vec<_> = queues.into_iter().map(Virtqueue::from).collect();
        let mut take = |index| {
            let place = queues.iter().position(|queue| queue.index() == index)?;
            Some(queues.swap_remove(place))
        };
        let requests = |queue| Requests::new(&activation, queue, server.clone());
        let urgent = take(HIGH_PRIORITY_QUEUE).map(requests);
        let requests = requests(take(REQUEST_QUEUE).ok_or(ActivateError::MissingQueue(REQUEST_QUEUE))?);
        let takes_notices = activation.features & 1 << FEATURE_NOTICES != 0;
        let notices = take(NOTICES_QUEUE).filter(|_| takes_notices);
        let Activation { memory, interrupt, .. } = activation;
        Ok(Worker { memory, interrupt, server, requests: Arc::new(requests), urgent, notices })
    }

    /// The queue of requests, which other threads may serve as well.
    pub(super) fn requests(&self) -> Arc<Requests> {
        self.requests.clone()
    }

    /// Serves one batch of what came by a queue.
    fn serve(&mut self, kicked: RawFd) -> Result<(), QueueError> {
        let mut queues = [Some(&*self.requests), self.urgent.as_ref()].into_iter().flatten();
        if let Some(requests) = queues.find(|requests| requests.event() == kicked) {
            return requests.serve();
        }
        let Some(queue) = &mut self.notices else { return Ok(()) };
        queue.acknowledge_kick();
        self.server.borrow_memory(&self.memory, queue)
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
        let urgent = self.urgent.iter().map(Requests::event);
        let notices = self.notices.iter().map(AsRawFd::as_raw_fd);
        urgent.chain(notices).chain([self.requests.event()]).collect()
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.serve(events.fd()).is_err() {
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
