//! Queries that are under way.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::unistd::{read, write};
use rvm_protocol::{Lookup, MAX_DNS_MESSAGE};

use super::sockets::{connect_anew, dissolve};

/// Length of the header of a DNS message (RFC 1035, section 4.1.1).
const DNS_HEADER: usize = 12;
/// How many queries over TCP may wait for a socket.
const MAX_QUEUE: usize = 64;

/// Queries over UDP: one a socket.
pub struct UdpLookups<'s> {
    server: SocketAddrV4,
    free: Vec<&'s OwnedFd>,
    /// The oldest first.
    asked: VecDeque<(&'s OwnedFd, Lookup)>,
    /// Where answers are received.
    buffer: Vec<u8>,
}

impl<'s> UdpLookups<'s> {
    pub fn new(sockets: &'s [OwnedFd], server: SocketAddrV4) -> Self {
        let buffer = vec![0; MAX_DNS_MESSAGE];
        Self { server, free: sockets.iter().collect(), asked: VecDeque::new(), buffer }
    }

    /// What to poll for.
    pub fn interest(&self) -> impl Iterator<Item = PollFd<'s>> {
        self.asked
            .iter()
            .map(|(socket, _): &(&'s OwnedFd, _)| PollFd::new((*socket).as_fd(), PollFlags::POLLIN))
    }

    /// Sends a query. Returns the answer where it cannot be sent.
    pub fn ask(&mut self, query: Lookup) -> Vec<Lookup> {
        // Whoever asked so long ago has asked again, or has given up.
        let mut oldest = || self.asked.pop_front().map(|(socket, _)| socket);
        let Some(socket) = self.free.pop().or_else(&mut oldest) else { return Vec::new() };
        match self.send(socket, &query.message) {
            Ok(()) => {
                self.asked.push_back((socket, query));
                Vec::new()
            }
            Err(_) => {
                self.free.push(socket);
                failure(query).into_iter().collect()
            }
        }
    }

    fn send(&mut self, socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
        // What came too late for the last query is not the answer to this one. Nothing more comes in between.
        dissolve(socket)?;
        while !matches!(read(socket, &mut self.buffer), Err(Errno::EAGAIN)) {}
        connect_anew(socket, self.server)?;
        write(socket, message)?;
        Ok(())
    }

    /// Takes the answers that have come.
    pub fn receive(&mut self) -> Vec<Lookup> {
        let mut answers = Vec::new();
        for (socket, query) in std::mem::take(&mut self.asked) {
            match read(socket, &mut self.buffer) {
                Ok(length) if is_answer(&self.buffer[..length], &query.message) => {
                    answers.push(Lookup { message: self.buffer[..length].to_vec(), ..query });
                    self.free.push(socket);
                }
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => self.asked.push_back((socket, query)),
                // Nobody listens there (any more).
                Err(_) => {
                    answers.extend(failure(query));
                    self.free.push(socket);
                }
            }
        }
        answers
    }
}

/// Queries over TCP: one a connection.
pub struct TcpLookups<'s> {
    server: SocketAddrV4,
    free: Vec<&'s OwnedFd>,
    asked: Vec<TcpLookup<'s>>,
    waiting: VecDeque<Lookup>,
}

struct TcpLookup<'s> {
    socket: &'s OwnedFd,
    query: Lookup,
    /// What of the query, with its length in front, is still to be sent.
    unsent: Vec<u8>,
    /// What has come of the answer, with its length in front.
    received: Vec<u8>,
}

impl<'s> TcpLookups<'s> {
    pub fn new(sockets: &'s [OwnedFd], server: SocketAddrV4) -> Self {
        Self { server, free: sockets.iter().collect(), asked: Vec::new(), waiting: VecDeque::new() }
    }

    /// What to poll for.
    pub fn interest(&self) -> impl Iterator<Item = PollFd<'s>> {
        self.asked.iter().map(|lookup| {
            let flags = if lookup.unsent.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            PollFd::new(lookup.socket.as_fd(), flags)
        })
    }

    /// Takes a query. Returns answers to those that cannot be sent.
    pub fn ask(&mut self, query: Lookup) -> Vec<Lookup> {
        self.waiting.push_back(query);
        let too_many = self.waiting.len() > MAX_QUEUE;
        if too_many && let Some(stuck) = (!self.asked.is_empty()).then(|| self.asked.remove(0)) {
            // The server has taken it and says nothing: it would keep all others waiting.
            self.release(stuck.socket);
            let mut answers: Vec<_> = failure(stuck.query).into_iter().collect();
            answers.extend(self.connect());
            return answers;
        }
        self.connect()
    }

    /// Moves everything on as far as it goes without waiting, and returns the answers.
    pub fn advance(&mut self) -> Vec<Lookup> {
        let mut answers = Vec::new();
        for mut lookup in std::mem::take(&mut self.asked) {
            match lookup.step() {
                Err(Errno::EAGAIN | Errno::EINTR) => self.asked.push(lookup),
                Ok(message) => {
                    self.release(lookup.socket);
                    answers.push(Lookup { message, ..lookup.query });
                }
                Err(_) => {
                    self.release(lookup.socket);
                    answers.extend(failure(lookup.query));
                }
            }
        }
        answers.extend(self.connect());
        answers
    }

    /// Gives free sockets to those that wait.
    fn connect(&mut self) -> Vec<Lookup> {
        let mut failures = Vec::new();
        while let Some(socket) = self.free.pop() {
            let Some(query) = self.waiting.pop_front() else {
                self.free.push(socket);
                break;
            };
            if connect_anew(socket, self.server).is_err() {
                self.free.push(socket);
                failures.extend(failure(query));
                continue;
            }
            let mut unsent = (query.message.len() as u16).to_be_bytes().to_vec();
            unsent.extend(&query.message);
            self.asked.push(TcpLookup { socket, query, unsent, received: Vec::new() });
        }
        failures
    }

    fn release(&mut self, socket: &'s OwnedFd) {
        // One whose connection could not be ended is connected anew all the same.
        let _ = dissolve(socket);
        self.free.push(socket);
    }
}

impl TcpLookup<'_> {
    /// Sends and receives until it has to wait (`EAGAIN`) or the answer is whole.
    fn step(&mut self) -> nix::Result<Vec<u8>> {
        while !self.unsent.is_empty() {
            let length = write(self.socket, &self.unsent)?;
            self.unsent.drain(..length);
        }
        loop {
            if let Some((length, message)) = self.received.split_first_chunk::<2>()
                && let Some(message) = message.get(..u16::from_be_bytes(*length).into())
            {
                let is_whole = is_answer(message, &self.query.message);
                return if is_whole { Ok(message.to_vec()) } else { Err(Errno::EPROTO) };
            }
            let mut bytes = vec![0; MAX_DNS_MESSAGE];
            match read(self.socket, &mut bytes)? {
                0 => return Err(Errno::ECONNRESET),
                length => self.received.extend(&bytes[..length]),
            }
        }
    }
}

/// Whether a message is one that can be answered.
pub fn is_query(message: &[u8]) -> bool {
    message.len() >= DNS_HEADER && message[2] & RESPONSE == 0
}

/// Whether a message is a response with the query's number.
fn is_answer(message: &[u8], query: &[u8]) -> bool {
    message.len() >= DNS_HEADER && message[2] & RESPONSE != 0 && query.get(..2) == message.get(..2)
}

// Bits of the third and fourth byte of the header.
const RESPONSE: u8 = 0x80;
const AUTHORITATIVE_OR_CUT: u8 = 0x06;
const SERVER_FAILURE: u8 = 2;

/// The server cannot be asked: said at once, so that nobody waits for an answer. Nothing is said to what is no query.
fn failure(query: Lookup) -> Option<Lookup> {
    let mut answer = query;
    if !is_query(&answer.message) {
        return None;
    }
    answer.message[2] = (answer.message[2] | RESPONSE) & !AUTHORITATIVE_OR_CUT;
    answer.message[3] = SERVER_FAILURE;
    Some(answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rvm_protocol::Transport;

    use super::*;

    proptest! {
        #[test]
        fn a_failure_is_an_answer_to_a_query_and_to_nothing_else(message in proptest::collection::vec(any::<u8>(), 0..64)) {
            let query = Lookup { number: 7, transport: Transport::Udp, message: message.clone() };
            match failure(query) {
                Some(answer) => {
                    prop_assert!(is_query(&message));
                    prop_assert!(is_answer(&answer.message, &message));
                    prop_assert_eq!((answer.number, answer.message[3] & 15), (7, SERVER_FAILURE));
                    prop_assert_eq!(&answer.message[4..], &message[4..], "the question comes back");
                }
                None => prop_assert!(!is_query(&message)),
            }
        }
    }
}
