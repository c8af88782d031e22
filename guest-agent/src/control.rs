//! The control connection: frames in, frames out, never blocking.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::unistd;
use rvm_protocol::{FrameError, FrameReader, FromAgent, ToAgent, frame};

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

    /// Queues a message; it goes out with [`Control::flush`].
    pub fn send(&mut self, message: &FromAgent) {
        // Only a message above the limit fails to encode, and the agent caps what it puts into one.
        if let Ok(bytes) = frame::encode(message) {
            self.outgoing.extend(bytes);
        }
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

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
