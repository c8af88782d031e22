//! A process that asks over TCP: messages with their lengths in front (RFC 1035, section 4.2.2), both ways.

use std::io::{self, Read};
use std::net::TcpStream;

use nix::sys::epoll::EpollFlags;
use rvm_protocol::write_available;

use crate::event::{Poller, Target};

/// How many bytes of answers may wait before no more is asked for this client.
const MAX_WAITING: usize = 128 << 10;
const READ_SIZE: usize = 4 << 10;

/// A connection of a process.
pub struct Client {
    id: u32,
    stream: TcpStream,
    interest: Option<EpollFlags>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Queries whose answers have not come.
    asked: usize,
    ended: bool,
}

impl Client {
    /// Takes a connection.
    pub fn new(id: u32, stream: TcpStream) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            id,
            stream,
            interest: None,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            asked: 0,
            ended: false,
        })
    }

    /// Reads once, and returns the queries that are whole now.
    pub fn read(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut bytes = [0; READ_SIZE];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.ended = true,
            Ok(length) => self.incoming.extend(&bytes[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        let mut queries = Vec::new();
        while let Some((&length, body)) = self.incoming.split_first_chunk::<2>()
            && let Some(query) = body.get(..u16::from_be_bytes(length).into())
        {
            queries.push(query.to_vec());
            self.incoming.drain(..2 + usize::from(u16::from_be_bytes(length)));
        }
        self.asked += queries.len();
        Ok(queries)
    }

    /// Takes the answer to one of its queries.
    pub fn answer(&mut self, message: &[u8]) {
        self.asked = self.asked.saturating_sub(1);
        // A lookup is never longer than its length can say.
        self.outgoing.extend((message.len() as u16).to_be_bytes());
        self.outgoing.extend(message);
    }

    /// Writes what the connection takes.
    pub fn write(&mut self) -> io::Result<()> {
        write_available(&mut self.stream, &mut self.outgoing)
    }

    /// Whether it has asked all that it wanted, and has all the answers.
    pub fn is_done(&self) -> bool {
        self.ended && self.asked == 0 && self.outgoing.is_empty()
    }

    /// Whether it asks no more.
    #[cfg(test)]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Tells epoll what it waits for.
    pub fn arm(&mut self, poller: &Poller) -> nix::Result<()> {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, !self.ended && self.outgoing.len() < MAX_WAITING);
        wanted.set(EpollFlags::EPOLLOUT, !self.outgoing.is_empty());
        let wanted = (!wanted.is_empty()).then_some(wanted);
        poller.change(&self.stream, Target::ResolverClient(self.id), &mut self.interest, wanted)
    }

    /// Takes it out of epoll, before it is dropped.
    pub fn release(&self, poller: &Poller) {
        poller.remove(&self.stream);
    }
}
