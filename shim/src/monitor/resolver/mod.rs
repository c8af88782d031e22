//! Docker's name server for the guest.
//!
//! dockerd answers names at 127.0.0.11 in the container's network namespace, and the guest's loopback is its own. So the
//! agent takes what is sent there in the guest, and the monitor, which lives in the namespace, asks on.
//! It asks at port 53, behind which dockerd keeps its socket by a rule of the namespace: the socket's own port changes
//! whenever dockerd is started anew.
//!
//! The monitor can make no sockets once it is confined, so there is a fixed number of them from before. That also
//! bounds what a guest can ask at a time; the oldest question gives way to the next.

mod lookup;
mod sockets;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvm_protocol::{Lookup, LookupReader, Transport, write_available};

use lookup::{TcpLookups, UdpLookups, is_query};
use sockets::Sockets;

/// Where dockerd answers.
const DOCKER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// How many answers (in bytes) may wait for a guest that does not take them, before nothing more is asked for it.
const MAX_WAITING: usize = 128 << 10;
const READ_SIZE: usize = 16 << 10;
const STACK: usize = 128 << 10;

/// Asks dockerd what the guest's resolver is asked.
#[derive(Debug)]
pub struct Resolver {
    sockets: Arc<Sockets>,
    busy: Arc<AtomicBool>,
    server: SocketAddrV4,
}

impl Resolver {
    /// Makes its sockets in the calling thread's network namespace.
    pub fn open() -> io::Result<Resolver> {
        Resolver::asking(DOCKER)
    }

    fn asking(server: SocketAddrV4) -> io::Result<Resolver> {
        Ok(Resolver { sockets: Arc::new(Sockets::open()?), busy: Arc::default(), server })
    }

    /// Serves a connection of the guest on a thread of its own, until it closes. The agent has one at a time; others are
    /// closed, so that the container's processes gain nothing by making many.
    pub fn serve(&self, guest: UnixStream) -> io::Result<()> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let (sockets, busy, server) = (self.sockets.clone(), self.busy.clone(), self.server);
        let served = thread::Builder::new().name("resolver".into()).stack_size(STACK).spawn(move || {
            // However it ends, the agent connects again when it has the next query.
            let _ = Conversation::new(guest, &sockets, server).run();
            busy.store(false, Ordering::Release);
        });
        served.map(drop).inspect_err(|_| self.busy.store(false, Ordering::Release))
    }
}

/// One connection of the guest's resolver.
struct Conversation<'s> {
    guest: UnixStream,
    incoming: LookupReader,
    outgoing: Vec<u8>,
    udp: UdpLookups<'s>,
    tcp: TcpLookups<'s>,
}

impl<'s> Conversation<'s> {
    fn new(guest: UnixStream, sockets: &'s Sockets, server: SocketAddrV4) -> Self {
        Self {
            guest,
            incoming: LookupReader::default(),
            outgoing: Vec::new(),
            udp: UdpLookups::new(&sockets.udp, server),
            tcp: TcpLookups::new(&sockets.tcp, server),
        }
    }

    fn run(mut self) -> io::Result<()> {
        self.guest.set_nonblocking(true)?;
        loop {
            let [guest, udp, tcp] = self.wait()?;
            if udp {
                let answers = self.udp.receive();
                self.answer(answers);
            }
            if tcp {
                let answers = self.tcp.advance();
                self.answer(answers);
            }
            if guest && !self.read()? {
                return Ok(());
            }
            write_available(&mut self.guest, &mut self.outgoing)?;
        }
    }

    /// Waits until something can be done, and tells for whom: the guest, lookups over UDP, and over TCP.
    fn wait(&self) -> io::Result<[bool; 3]> {
        let taken = self.outgoing.len() < MAX_WAITING;
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, taken);
        flags.set(PollFlags::POLLOUT, !self.outgoing.is_empty());
        let mut fds = vec![PollFd::new(self.guest.as_fd(), flags)];
        if taken {
            fds.extend(self.udp.interest());
            fds.extend(self.tcp.interest());
        }
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => break,
            }
        }
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let behind = if taken { 1 + self.udp.interest().count() } else { fds.len() };
        Ok([
            events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR),
            fds[1..behind].iter().any(is_ready),
            fds[behind..].iter().any(is_ready),
        ])
    }

    /// Takes queries; false at the end of the connection.
    fn read(&mut self) -> io::Result<bool> {
        let mut bytes = [0; READ_SIZE];
        match self.guest.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(length) => self.incoming.push(&bytes[..length]),
            Err(error) if is_passing(&error) => return Ok(true),
            Err(error) => return Err(error),
        }
        let lookups = self.incoming.take().map_err(io::Error::other)?;
        for query in lookups.into_iter().filter(|lookup| is_query(&lookup.message)) {
            let answers = match query.transport {
                Transport::Udp => self.udp.ask(query),
                Transport::Tcp => self.tcp.ask(query),
            };
            self.answer(answers);
        }
        Ok(true)
    }

    fn answer(&mut self, answers: Vec<Lookup>) {
        for answer in answers {
            self.outgoing.extend(answer.to_bytes());
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
