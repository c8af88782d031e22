//! A thread that waits for file descriptors on behalf of devices.
//!
//! Devices whose work never blocks (network, vsock, entropy) share one loop; those that do blocking input and
//! output (block, file system) have one of their own, so that a slow disk delays no packet.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

use crate::confine;

/// How long the end of a loop is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

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

/// A running loop. It ends with this value and all its handles, and with it the workers that are still there.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
}

/// A way to add workers to a loop and take them back, from any thread but the loop's own.
#[derive(Clone)]
pub struct EventLoopHandle {
    running: Arc<Running>,
}

/// The loop's thread, seen from the others.
struct Running {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread ends.
    end: Mutex<mpsc::Receiver<()>>,
}

impl std::fmt::Debug for EventLoopHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("EventLoopHandle")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Relaxed: the wake-up that follows orders it.
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.endpoint.kick();
        let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        else {
            return;
        };
        let end = self.end.get_mut().unwrap_or_else(PoisonError::into_inner);
        // A worker may wait for a disk of the host that never answers.
        if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Disconnected) {
            // A worker that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl EventLoop {
    /// Starts a thread of this name (at most 15 bytes are shown by the kernel), with the capabilities that the
    /// calling one has.
    pub fn spawn(name: &str) -> Result<EventLoop, EventLoopError> {
        Self::spawn_with(name, || ())
    }

    /// Starts a thread of this name without any capability, which is enough for all devices but file systems.
    pub fn spawn_confined(name: &str) -> Result<EventLoop, EventLoopError> {
        Self::spawn_with(name, confine::drop_capabilities)
    }

    fn spawn_with(name: &str, prepare: fn()) -> Result<EventLoop, EventLoopError> {
        let create = |source| EventLoopError::Create { name: name.to_owned(), source };
        let mut manager = EventManager::<Subscriber>::new().map_err(create)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let (alive, end) = mpsc::channel();
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                let _alive: mpsc::Sender<()> = alive;
                prepare();
                run(&mut manager, &stopped);
            })
            .map_err(|source| EventLoopError::Thread { name: name.to_owned(), source })?;
        let running = Running { endpoint, stop, thread: Some(thread), end: Mutex::new(end) };
        Ok(EventLoop { handle: EventLoopHandle { running: Arc::new(running) } })
    }

    /// A handle for devices to keep.
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }
}

/// Drives the workers until the end is asked for.
fn run(manager: &mut EventManager<Subscriber>, stop: &AtomicBool) {
    // Relaxed: as for the other side.
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = manager.run() {
            // The epoll descriptor itself is broken, which nothing that a guest does can bring about. To go on would
            // leave it with devices that never answer.
            panic!("the events of devices cannot be waited for: {error}");
        }
    }
}

impl EventLoopHandle {
    /// Adds a worker; its `init` runs on the loop's thread before this returns.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.running
            .endpoint
            .call_blocking(|manager| Ok::<_, event_manager::Error>(manager.add_subscriber(subscriber)))
            .map_err(EventLoopError::Change)
    }

    /// Takes a worker back. When this returns the loop no longer runs it.
    pub fn remove(&self, id: SubscriberId) -> Result<Subscriber, EventLoopError> {
        self.running
            .endpoint
            .call_blocking(move |manager| manager.remove_subscriber(id))
            .map_err(EventLoopError::Change)
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_loop_ends_with_its_last_handle_and_takes_its_workers_along() {
        let events = EventLoop::spawn("test").unwrap();
        let device = events.handle();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (rang, heard) = mpsc::channel();
        device.add(Box::new(Bell { event: event.try_clone().unwrap(), rang })).unwrap();
        drop(events);
        event.write(5).unwrap();
        assert_eq!(heard.recv().unwrap(), 5, "a device still needs it");
        drop(device);
        assert_eq!(heard.try_recv(), Err(mpsc::TryRecvError::Disconnected), "it was waited for");
    }

    /// Tells of the capabilities of the thread that it is on.
    struct Capabilities(mpsc::Sender<usize>);

    impl MutEventSubscriber for Capabilities {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}

        fn init(&mut self, _: &mut EventOps<'_>) {
            self.0.send(caps::read(None, caps::CapSet::Permitted).unwrap().len()).unwrap();
        }
    }

    #[test]
    fn a_confined_loop_has_no_capabilities() {
        let (tell, hear) = mpsc::channel();
        let own = caps::read(None, caps::CapSet::Permitted).unwrap().len();
        for (events, expected) in
            [(EventLoop::spawn("test").unwrap(), own), (EventLoop::spawn_confined("test").unwrap(), 0)]
        {
            events.handle().add(Box::new(Capabilities(tell.clone()))).unwrap();
            assert_eq!(hear.recv().unwrap(), expected);
        }
    }
}
