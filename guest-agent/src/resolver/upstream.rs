//! The connection to the monitor's side of the resolver, which is made when there is something to ask.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::unistd;
use rvm_protocol::{Lookup, LookupReader, RESOLVER_PORT};

use crate::event::{Poller, Target};
use crate::host::{Host, connection_error};

/// How many bytes of queries may wait for the host.
const MAX_WAITING: usize = 256 << 10;

/// The connection, or none.
#[derive(Default)]
pub struct Upstream {
    connection: Option<OwnedFd>,
    interest: Option<EpollFlags>,
    connected: bool,
    incoming: LookupReader,
    outgoing: Vec<u8>,
}

impl Upstream {
    /// Queues a query, which [`flush`](Self::flush) sends.
    pub fn send(&mut self, host: &dyn Host, query: &Lookup) -> nix::Result<()> {
        if self.outgoing.len() > MAX_WAITING {
            return Err(Errno::ENOBUFS);
        }
        if self.connection.is_none() {
            self.connection = Some(host.connect(RESOLVER_PORT)?);
        }
        self.outgoing.extend(query.to_bytes());
        Ok(())
    }

    /// Reads once, and returns the answers that are whole now. After an error the connection is of no use.
    pub fn receive(&mut self, ready: EpollFlags) -> nix::Result<Vec<Lookup>> {
        let Some(connection) = &self.connection else { return Ok(Vec::new()) };
        if !self.connected {
            connection_error(connection)?;
            self.connected = ready.contains(EpollFlags::EPOLLOUT);
        }
        if ready.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            let mut bytes = [0; 16 << 10];
            match unistd::read(connection, &mut bytes) {
                Ok(0) => return Err(Errno::ECONNRESET),
                Ok(length) => self.incoming.push(&bytes[..length]),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.incoming.take().map_err(|_| Errno::EPROTO)
    }

    /// Writes what the connection takes, and tells epoll what it waits for.
    pub fn flush(&mut self, poller: &Poller) -> nix::Result<()> {
        let Some(connection) = &self.connection else { return Ok(()) };
        while self.connected && !self.outgoing.is_empty() {
            match unistd::write(connection, &self.outgoing) {
                Ok(length) => drop(self.outgoing.drain(..length)),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let mut wanted = EpollFlags::EPOLLIN;
        wanted.set(EpollFlags::EPOLLOUT, !self.connected || !self.outgoing.is_empty());
        poller.change(connection, Target::Resolver, &mut self.interest, Some(wanted))
    }

    /// Closes the connection.
    pub fn disconnect(&mut self, poller: &Poller) {
        if let Some(connection) = self.connection.take() {
            poller.remove(&connection);
        }
        *self = Upstream::default();
    }
}
