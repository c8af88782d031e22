//! A thread that waits for file descriptors on behalf of devices.
//!
//! Devices whose work never blocks (network, vsock, entropy) share one loop; those that do blocking input and
//! output (block, file system) have one of their own, so that a slow disk delays no packet.

use std::io;
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// What a loop drives: a device's worker, which owns the device's queues.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Why an event loop could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The epoll descriptor or the loop's wake-up descriptor could not be made.
    #[error("the event loop '{name}' could not be created: {source}")]
    Create {
        /// Name of the loop.
        name: String,
        /// What event-manager reported.
        source: event_manager::Error,
    },
    /// The thread could not be started.
    #[error("the thread of the event loop '{name}' could not be started: {source}")]
    Thread {
        /// Name of the loop.
        name: String,
        /// What the operating system reported.
        source: io::Error,
    },
    /// A worker could not be added to or taken from the loop.
    #[error("the event loop could not be changed: {0}")]
    Change(event_manager::Error),
}

/// A running loop. It lives until the process ends.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
    _thread: JoinHandle<()>,
}

/// A way to add workers to a loop and take them back, from any thread but the loop's own.
#[derive(Clone)]
pub struct EventLoopHandle {
    endpoint: RemoteEndpoint<Subscriber>,
}

impl std::fmt::Debug for EventLoopHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("EventLoopHandle")
    }
}

impl EventLoop {
    /// Starts a thread of this name (at most 15 bytes are shown by the kernel).
    pub fn spawn(name: &str) -> Result<EventLoop, EventLoopError> {
        let create = |source| EventLoopError::Create { name: name.to_owned(), source };
        let mut manager = EventManager::<Subscriber>::new().map_err(create)?;
        let handle = EventLoopHandle { endpoint: manager.remote_endpoint() };
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            // A failed wait leaves nothing to serve devices with: the thread ends, and so do its devices.
            .spawn(move || while manager.run().is_ok() {})
            .map_err(|source| EventLoopError::Thread { name: name.to_owned(), source })?;
        Ok(EventLoop { handle, _thread: thread })
    }

    /// A handle for devices to keep.
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }
}

impl EventLoopHandle {
    /// Adds a worker; its `init` runs on the loop's thread before this returns.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.endpoint
            .call_blocking(|manager| Ok::<_, event_manager::Error>(manager.add_subscriber(subscriber)))
            .map_err(EventLoopError::Change)
    }

    /// Takes a worker back. When this returns the loop no longer runs it.
    pub fn remove(&self, id: SubscriberId) -> Result<Subscriber, EventLoopError> {
        self.endpoint
            .call_blocking(move |manager| manager.remove_subscriber(id))
            .map_err(EventLoopError::Change)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use event_manager::{EventOps, EventSet, Events};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    struct Bell {
        event: EventFd,
        rang: mpsc::Sender<u64>,
    }

    impl MutEventSubscriber for Bell {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.rang.send(self.event.read().unwrap()).unwrap();
        }

        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
    }

    #[test]
    fn a_worker_is_driven_until_it_is_taken_back() {
        let events = EventLoop::spawn("test").unwrap().handle();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (rang, heard) = mpsc::channel();
        let id = events.add(Box::new(Bell { event: event.try_clone().unwrap(), rang })).unwrap();
        event.write(3).unwrap();
        assert_eq!(heard.recv().unwrap(), 3);

        drop(events.remove(id).unwrap());
        event.write(4).unwrap();
        assert!(heard.recv().is_err(), "the worker is gone, and its end of the channel with it");
        assert!(events.remove(id).is_err(), "it can be taken back once");
    }
}
