//! The host's side of the device: listeners on ports of the host, and connections to ports of the guest.
//!
//! These live as long as the device is plugged, through every reset of it by the driver; connections do not.

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Connections of the guest that may wait to be accepted, on each port.
const MAX_WAITING: usize = 128;
/// Requests of the host that may wait for the guest's driver.
const MAX_COMMANDS: usize = 1024;

/// Why the host's side of the device refused.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context ID has a meaning of its own.
    #[error("{0} cannot be the context ID of a guest: choose one from 3 to 4294967294")]
    ContextId(u64),
    /// Somebody listens there already.
    #[error("somebody listens on vsock port {0} already")]
    PortInUse(u32),
    /// The guest's driver is not there to take requests.
    #[error("{MAX_COMMANDS} requests wait for the guest's vsock driver: it does not run")]
    NotTaken,
    /// The operating system refused something.
    #[error("a vsock connection could not be made: {0}")]
    Io(#[from] io::Error),
}

/// What the host asks of the device.
#[derive(Debug)]
pub enum Command {
    /// Connect to a port of the guest, with the device's end of the stream.
    Connect(u32, UnixStream),
    /// End all connections, and tell the driver that they are gone.
    ResetTransport,
}

/// What the worker and the host's side share.
#[derive(Debug)]
pub struct Shared {
    ports: Mutex<HashMap<u32, Arc<Waiting>>>,
    commands: Mutex<Vec<Command>>,
    wake: EventFd,
}

/// Streams that wait to be accepted.
#[derive(Debug)]
struct Waiting {
    streams: Mutex<VecDeque<UnixStream>>,
    /// Readable while there is one.
    ready: EventFd,
}

impl Shared {
    /// Nobody listens yet.
    pub fn new() -> io::Result<Arc<Shared>> {
        let wake = event()?;
        Ok(Arc::new(Self { ports: Mutex::default(), commands: Mutex::default(), wake }))
    }

    /// Readable when there are commands.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The commands since the last call.
    pub fn take_commands(&self) -> Vec<Command> {
        let mut commands = lock(&self.commands);
        // It fails only when nothing was written.
        let _ = self.wake.read();
        std::mem::take(&mut commands)
    }

    /// Makes a stream for the listener on a port and returns the other end of it. `None` if nobody listens or
    /// too many wait.
    pub fn offer(&self, port: u32) -> Option<UnixStream> {
        let waiting = lock(&self.ports).get(&port).cloned()?;
        let mut streams = lock(&waiting.streams);
        if streams.len() >= MAX_WAITING {
            return None;
        }
        let (device, host) = UnixStream::pair().ok()?;
        streams.push_back(host);
        // A write to an eventfd fails only when its counter is full, and then it is readable already.
        let _ = waiting.ready.write(1);
        Some(device)
    }

    fn command(&self, command: Command) -> Result<(), VsockError> {
        let mut commands = lock(&self.commands);
        if commands.len() >= MAX_COMMANDS {
            return Err(VsockError::NotTaken);
        }
        commands.push(command);
        // As above.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// The host's side of the device.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

impl VsockHandle {
    /// The host's side of a device that has this state.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Listens on a port of the host, until the listener is dropped.
    pub fn listen(&self, port: u32) -> Result<VsockListener, VsockError> {
        let waiting = Arc::new(Waiting { streams: Mutex::default(), ready: event()? });
        match lock(&self.shared.ports).entry(port) {
            Entry::Occupied(_) => return Err(VsockError::PortInUse(port)),
            Entry::Vacant(vacant) => vacant.insert(waiting.clone()),
        };
        Ok(VsockListener { port, waiting, shared: self.shared.clone() })
    }

    /// Connects to a port of the guest. Returns at once: what is written waits until the guest accepts; if it
    /// refuses, the stream ends. Before the guest's driver runs, the request waits for it.
    pub fn connect(&self, port: u32) -> Result<UnixStream, VsockError> {
        let (device, host) = UnixStream::pair()?;
        self.shared.command(Command::Connect(port, device))?;
        Ok(host)
    }

    /// Ends all connections and tells the guest that they are gone, which a guest that was restored from a
    /// snapshot has no other way to know. Nothing is sent to the guest until it has taken note.
    pub fn reset_transport(&self) -> Result<(), VsockError> {
        self.shared.command(Command::ResetTransport)
    }
}

/// A port of the host that the guest can connect to. As a file descriptor it is readable while a connection
/// waits, and never to be read by anybody else.
#[derive(Debug)]
pub struct VsockListener {
    port: u32,
    waiting: Arc<Waiting>,
    shared: Arc<Shared>,
}

impl VsockListener {
    /// The next connection that waits, if any.
    pub fn accept(&self) -> Option<UnixStream> {
        let mut streams = lock(&self.waiting.streams);
        let stream = streams.pop_front();
        if streams.is_empty() {
            // It fails only when nothing was written.
            let _ = self.waiting.ready.read();
        }
        stream
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiting.ready.as_fd()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        lock(&self.shared.ports).remove(&self.port);
    }
}

fn event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// What a thread that panicked left behind is whole: no lock here is held over anything that can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn is_readable(listener: &VsockListener) -> bool {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_listener_is_readable_while_a_connection_waits() {
        let shared = Shared::new().unwrap();
        let listener = VsockHandle::new(shared.clone()).listen(7).unwrap();
        assert!(!is_readable(&listener));
        assert!(listener.accept().is_none());
        let mut device = shared.offer(7).unwrap();
        let _other = shared.offer(7).unwrap();
        assert!(is_readable(&listener));
        let mut host = listener.accept().unwrap();
        assert!(is_readable(&listener));
        listener.accept().unwrap();
        assert!(!is_readable(&listener));

        device.write_all(b"x").unwrap();
        host.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_port_has_one_listener_and_is_free_after_it() {
        let shared = Shared::new().unwrap();
        let handle = VsockHandle::new(shared.clone());
        assert!(shared.offer(7).is_none());
        let listener = handle.listen(7).unwrap();
        assert!(matches!(handle.listen(7), Err(VsockError::PortInUse(7))));
        let mut device = shared.offer(7).unwrap();
        drop(listener);
        assert_eq!(device.read(&mut [0]).unwrap(), 0, "a stream that nobody accepted ends");
        assert!(shared.offer(7).is_none());
        handle.listen(7).unwrap();
    }

    #[test]
    fn waiting_connections_and_commands_are_capped() {
        let shared = Shared::new().unwrap();
        let handle = VsockHandle::new(shared.clone());
        let _listener = handle.listen(7).unwrap();
        let held: Vec<_> = (0..MAX_WAITING).map(|_| shared.offer(7).unwrap()).collect();
        assert!(shared.offer(7).is_none());
        drop(held);
        for _ in 0..MAX_COMMANDS {
            handle.reset_transport().unwrap();
        }
        assert!(matches!(handle.connect(1), Err(VsockError::NotTaken)));
        assert_eq!(shared.take_commands().len(), MAX_COMMANDS);
        handle.connect(1).unwrap();
    }
}
