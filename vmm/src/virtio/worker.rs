//! What the workers of all devices have in common: how they get onto a loop and off it, and how they fail.
//!
//! A [`Worker`] says which events it waits for and what it does on each. Where it fails, or cannot even be told of
//! its events, the driver hears of it by DEVICE_NEEDS_RESET (virtio 1.2, section 2.1.2), and the queues are left
//! alone until the reset comes.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
use vm_memory::GuestMemoryMmap;

use super::Interrupt;
use super::virtqueue::{Chain, QueueError, Virtqueue};
use crate::event_loop::{EventLoopError, EventLoopHandle};

/// A device's work on the thread of its loop.
pub(crate) trait Worker: Send {
    /// The descriptors that it waits for, each with what is to be noticed of it.
    fn sources(&self) -> Vec<(RawFd, EventSet)>;

    /// One of them is ready. After an error no queue is to be trusted any more.
    fn process(&mut self, source: RawFd) -> Result<(), QueueError>;
}

/// Whether a worker is to come to its end. It looks between two requests, so that nobody waits for a whole batch.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether it is time.
    pub(crate) fn is_requested(&self) -> bool {
        // Relaxed: the flag only shortens the wait for the worker; what orders its end is the loop's answer.
        self.0.load(Ordering::Relaxed)
    }

    /// Now it is.
    pub(crate) fn request(&self) {
        // Relaxed: as above.
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A device's place on a loop: empty, or with the worker that runs there.
#[derive(Debug)]
pub(crate) struct Post {
    events: EventLoopHandle,
    worker: Option<(SubscriberId, Stop)>,
}

impl Post {
    /// An empty one.
    pub(crate) fn new(events: EventLoopHandle) -> Post {
        Post { events, worker: None }
    }

    /// Puts a worker there, which `make` makes.
    pub(crate) fn start<W: Worker + 'static>(
        &mut self,
        interrupt: Interrupt,
        make: impl FnOnce(Stop) -> W,
    ) -> Result<(), EventLoopError> {
        let stop = Stop::default();
        let worker = Guarded { worker: make(stop.clone()), interrupt, stop: stop.clone(), failed: false };
        self.worker = Some((self.events.add(Box::new(worker))?, stop));
        Ok(())
    }

    /// Takes the worker away, if there is one. When this returns it runs no more.
    pub(crate) fn stop(&mut self) {
        if let Some((worker, stop)) = self.worker.take() {
            stop.request();
            // It fails only when the loop has ended, and the worker with it.
            let _ = self.events.remove(worker);
        }
    }
}

/// A worker with what happens when it fails.
struct Guarded<W> {
    worker: W,
    interrupt: Interrupt,
    stop: Stop,
    failed: bool,
}

impl<W: Worker> Guarded<W> {
    fn fail(&mut self, ops: &mut EventOps<'_>) {
        self.failed = true;
        for (source, _) in self.worker.sources() {
            // It fails for those that could not be added.
            let _ = ops.remove(Events::empty_raw(source));
        }
        self.interrupt.needs_reset();
    }
}

impl<W: Worker> MutEventSubscriber for Guarded<W> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if !self.failed && self.worker.process(events.fd()).is_err() {
            self.fail(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (source, set) in self.worker.sources() {
            if ops.add(Events::new_raw(source, set)).is_err() {
                return self.fail(ops);
            }
        }
    }
}

impl<W> Drop for Guarded<W> {
    fn drop(&mut self) {
        // A worker that nobody called back went down with its loop, and its driver would wait for ever.
        if !self.stop.is_requested() {
            self.interrupt.needs_reset();
        }
    }
}

/// When the driver hears of requests that were served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notify {
    /// After each: somebody waits for just this one, and the next may take long.
    Each,
    /// After all that were there.
    Batch,
}

/// Serves requests of a queue that was kicked, up to `batch` of them, lest other devices of the loop or a reset wait.
/// `handle` returns how many bytes it wrote to the chain.
pub(crate) fn serve(
    queue: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    stop: &Stop,
    (batch, notify): (usize, Notify),
    mut handle: impl FnMut(Chain<'_>) -> u32,
) -> Result<(), QueueError> {
    queue.acknowledge_kick();
    queue.disable_kicks(memory)?;
    let mut more = true;
    for _ in 0..batch {
        if stop.is_requested() {
            return Ok(());
        }
        let Some(chain) = queue.pop(memory)? else {
            more = queue.enable_kicks(memory)?;
            if more {
                continue;
            }
            break;
        };
        let head = chain.head_index();
        let written = handle(chain);
        queue.push_used(memory, head, written)?;
        if notify == Notify::Each {
            queue.notify(memory, interrupt)?;
        }
    }
    queue.notify(memory, interrupt)?;
    if more {
        queue.kick_self();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Guest, Part};

    /// Serves a queue of three requests, the stop coming during one of them; returns how many came back.
    fn served(batch: usize, notify: Notify, stop_at: u32) -> (u32, bool) {
        let mut guest = Guest::new(&[4]);
        (0..3).for_each(|_| assert!(guest.push(0, &[Part::In(8)]) < 4));
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let (stop, mut count) = (Stop::default(), 0);
        serve(&mut queue, &guest.memory, &guest.interrupt, &stop, (batch, notify), |_| {
            count += 1;
            if count == stop_at {
                stop.request();
            }
            8
        })
        .unwrap();
        assert_eq!(guest.used_index(0), count as u16);
        (count, guest.interrupted())
    }

    #[test]
    fn a_stop_ends_a_batch_after_the_request_under_way() {
        assert_eq!(served(16, Notify::Batch, 1), (1, false));
        assert_eq!(served(16, Notify::Each, 2), (2, true));
    }

    #[test]
    fn a_batch_has_an_end() {
        assert_eq!(served(2, Notify::Batch, u32::MAX), (2, true));
        assert_eq!(served(16, Notify::Batch, u32::MAX), (3, true));
    }
}
