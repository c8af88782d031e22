//! The control connection: frames in, frames out, never blocking.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::unistd;
use rvm_protocol::{FrameError, FrameReader, FromAgent, ToAgent, frame};

use crate::error::other;
use crate::event::{Poller, Target};
use crate::host::connection_error;

/// Why the control connection is of no further use. The guest has nothing left to do then.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The host closed it.
    #[error("the host closed the control connection")]
    Closed,
    /// It could not be established, or it broke.
    #[error("the control connection to the host failed: {0}")]
    Io(#[from] Errno),
    /// The host sent what is no message of this version.
    #[error("the host sent an unusable message: {0}")]
    Frame(#[from] FrameError),
}

/// The agent's end of the control connection.
pub struct Control {
    connection: OwnedFd,
    interest: Option<EpollFlags>,
    incoming: FrameReader,
    outgoing: VecDeque<u8>,
    connected: bool,
}

impl Control {
    /// Takes a connection that may still be under way.
    pub fn new(connection: OwnedFd, poller: &Poller) -> nix::Result<Self> {
        let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
        poller.add(&connection, Target::Control, wanted)?;
        Ok(Self {
            connection,
            interest: Some(wanted),
            incoming: FrameReader::new(),
            outgoing: VecDeque::new(),
            connected: false,
        })
    }

    /// Whether an error means that the connection, which was there, is not any more.
    pub fn was_reset(&self, error: &ControlError) -> bool {
        self.connected && matches!(error, ControlError::Io(Errno::ECONNRESET | Errno::ENOTCONN))
    }

    /// Queues a message; it goes out with [`Control::flush`].
    pub fn send(&mut self, message: &FromAgent) {
        // Nothing but a message over the limit fails to encode, and only answers can grow that large.
        let encoded = match frame::encode(message) {
            Ok(bytes) => Some(bytes),
            Err(error) => instead_of(message, &error).and_then(|message| frame::encode(&message).ok()),
        };
        self.outgoing.extend(encoded.into_iter().flatten());
    }

    /// Takes what arrived and returns the whole messages.
    pub fn receive(&mut self, ready: EpollFlags) -> Result<Vec<ToAgent>, ControlError> {
        if !self.connected {
            connection_error(&self.connection)?;
            self.connected = ready.contains(EpollFlags::EPOLLOUT);
        }
        if !ready.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            return Ok(Vec::new());
        }
        let mut bytes = [0; 16 << 10];
        match unistd::read(&self.connection, &mut bytes) {
            Ok(0) => return Err(ControlError::Closed),
            Ok(count) => self.incoming.push(&bytes[..count]),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut messages = Vec::new();
        while let Some(message) = self.incoming.next_message()? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Writes as much as the connection takes, and waits for the rest.
    pub fn flush(&mut self, poller: &Poller) -> Result<(), ControlError> {
        while self.connected && !self.outgoing.is_empty() {
            match unistd::write(&self.connection, self.outgoing.as_slices().0) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut wanted = EpollFlags::EPOLLIN;
        wanted.set(EpollFlags::EPOLLOUT, !self.connected || !self.outgoing.is_empty());
        poller.change(&self.connection, Target::Control, &mut self.interest, Some(wanted))?;
        Ok(())
    }
}

/// What the host gets in place of a message that cannot be sent: whoever asked waits for an answer.
fn instead_of(message: &FromAgent, error: &FrameError) -> Option<FromAgent> {
    match message {
        FromAgent::Reply { request, .. } => {
            let error = other(format!("the answer cannot be sent: {error}"));
            Some(FromAgent::Reply { request: *request, result: Err(error) })
        }
        _ => None,
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::net::UnixStream;

    use rvm_protocol::{GuestProcess, MAX_FRAME, Reply, read_frame};

    use super::*;

    #[test]
    fn an_answer_that_is_too_long_becomes_an_error_for_the_same_request() {
        let (guest, mut host) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let poller = Poller::new().unwrap();
        let mut control = Control::new(guest.into(), &poller).unwrap();
        control.receive(EpollFlags::EPOLLOUT).unwrap();
        let process = GuestProcess { pid: 1, parent: 0, user: 0, command: "x".repeat(MAX_FRAME) };
        control.send(&FromAgent::Reply { request: 7, result: Ok(Reply::Processes(vec![process])) });
        control.flush(&poller).unwrap();
        let FromAgent::Reply { request, result } = read_frame(&mut host).unwrap() else { panic!("no reply") };
        assert_eq!(request, 7);
        assert!(result.unwrap_err().message.contains("over the limit"));
        host.set_nonblocking(true).unwrap();
        let nothing = std::io::Read::read(&mut host, &mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_connection_that_is_reset_is_told_from_one_that_is_closed() {
        let after = |is_reset: bool| {
            let (guest, host) = UnixStream::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            let poller = Poller::new().unwrap();
            let mut control = Control::new(guest.into(), &poller).unwrap();
            control.receive(EpollFlags::EPOLLOUT).unwrap();
            if is_reset {
                // A socket that goes with something unread resets its connection.
                control.send(&FromAgent::OutOfMemory);
                control.flush(&poller).unwrap();
            }
            drop(host);
            let error = control.receive(EpollFlags::EPOLLIN).unwrap_err();
            control.was_reset(&error)
        };
        assert!(after(true));
        assert!(!after(false));
    }
}
