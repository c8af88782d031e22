//! All connections, and which of them has a packet for the guest.
//!
//! The muxer knows neither queues nor epoll. The [worker](super::worker) feeds it packets and events, asks it for
//! packets, and applies the [changes](Change) to what has to be watched.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::EventSet;

use super::connection::{Connection, ConnectionId};
use super::handle::Shared;
use super::packet::{HEADER_LEN, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::virtio::buffers::GuestBuffers;

/// The most connections there can be, those included whose guest end is gone but whose last bytes were not read.
pub const MAX_CONNECTIONS: usize = 1024;
/// As long as so many replies wait for a buffer of the guest, nothing is done that could bring more of them, but
/// for one of each connection that ends. The device has to be able to take in a whole queue while the guest offers
/// no buffers, and not more (section 5.10.6.1.2).
pub const MAX_REPLIES: usize = 256;

/// What the guest may send ahead on each of the first connections ...
const BUFFER: u32 = 256 << 10;
/// ... of which there are this many ...
const LARGE_BUFFERS: usize = 64;
/// ... and on further ones, so that all of them together stay below 80 MiB even if nobody reads.
const SMALL_BUFFER: u32 = 64 << 10;

/// Ports of connections that the host asks for start here.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Smaller tokens are free for other things that the worker watches.
pub const FIRST_TOKEN: u32 = 16;

/// Names a connection towards epoll.
pub type Token = u32;

/// What has to be changed about the watched sockets, in this order.
#[derive(Debug)]
pub enum Change {
    /// Watch the socket of a new connection, if it still exists.
    Add(Token),
    /// Its interest may have changed.
    Modify(Token),
    /// Watch a socket no more, and close it.
    Remove(UnixStream),
}

/// A connection with what the muxer keeps about it.
struct Entry {
    connection: Connection,
    /// It is among the ready ones.
    queued: bool,
    /// What its socket is watched for, once all changes are applied.
    interest: EventSet,
}

/// The connections.
pub struct Muxer {
    guest_cid: u64,
    shared: Arc<Shared>,
    entries: HashMap<Token, Entry>,
    /// Connections that the guest knows of.
    tokens: HashMap<ConnectionId, Token>,
    /// Connections with a packet for the guest, each once, in the order of their turn.
    ready: VecDeque<Token>,
    /// Resets, which come before all packets of connections: their ports may be in use again.
    replies: VecDeque<Header>,
    changes: Vec<Change>,
    next_token: Token,
    next_host_port: u32,
}

impl Muxer {
    /// A muxer without connections, which offers those of the guest to the listeners.
    pub fn new(guest_cid: u64, shared: Arc<Shared>) -> Self {
        Self {
            guest_cid,
            shared,
            entries: HashMap::new(),
            tokens: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            changes: Vec::new(),
            next_token: FIRST_TOKEN,
            next_host_port: FIRST_HOST_PORT,
        }
    }

    /// Takes in a packet of the guest.
    pub fn receive(&mut self, mut packet: GuestBuffers<'_>) {
        // Without a whole header, or with a sender that it is not, there is nobody to answer.
        let Some(header) = Header::read(&mut packet) else { return };
        if header.source_cid != self.guest_cid {
            return;
        }
        let id = ConnectionId { guest_port: header.source_port, host_port: header.destination_port };
        let for_us = header.destination_cid == HOST_CID && header.socket_type == TYPE_STREAM;
        let token = self.tokens.get(&id).copied().filter(|_| for_us);
        match (header.operation, token) {
            (Some(Operation::Reset), Some(token)) => self.end(token),
            // A reset is never answered with a reset.
            (Some(Operation::Reset), None) => {}
            (Some(Operation::Request), None) if for_us => self.accept(id, &header),
            // The guest has forgotten the connection that it now asks for again.
            (Some(Operation::Request), Some(token)) => self.abort(token, header.reset()),
            (_, Some(token)) => self.deliver(token, &header, packet),
            (_, None) => self.replies.push_back(header.reset()),
        }
    }

    fn deliver(&mut self, token: Token, header: &Header, packet: GuestBuffers<'_>) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        match entry.connection.receive(header, packet) {
            Ok(()) => self.settle(token),
            Err(_) => self.abort(token, header.reset()),
        }
    }

    fn accept(&mut self, id: ConnectionId, header: &Header) {
        let host = if self.is_full() { None } else { self.shared.offer(id.host_port) };
        match host {
            Some(host) => self.insert(Connection::accepted(id, host, self.buffer(), header)),
            None => self.replies.push_back(header.reset()),
        }
    }

    /// Asks the guest for a connection to one of its ports. If there are too many connections, or the guest
    /// refuses or does not listen to what was said before, `host` is closed.
    pub fn connect(&mut self, guest_port: u32, host: UnixStream) {
        if self.is_full() || self.is_congested() {
            return;
        }
        let mut id = ConnectionId { guest_port, host_port: self.next_host_port };
        while self.tokens.contains_key(&id) {
            id.host_port = id.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        self.next_host_port = id.host_port.wrapping_add(1).max(FIRST_HOST_PORT);
        self.insert(Connection::requested(id, host, self.buffer()));
    }

    /// Learns what happened to the socket of a connection.
    pub fn host_event(&mut self, token: Token, events: EventSet) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        entry.connection.host_event(events);
        self.settle(token);
    }

    /// Resets a connection for which the host has no means. It must not be watched.
    pub fn refuse(&mut self, token: Token) {
        if let Some(entry) = self.entries.remove(&token) {
            let id = entry.connection.id();
            self.tokens.remove(&id);
            self.ready.retain(|&ready| ready != token);
            self.replies.push_back(self.reset_of(id));
        }
    }

    /// Whether no packet of the guest may be taken in before it has taken some of ours.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// How many replies wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.replies.len()
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet for the guest into a buffer, which must be larger than a header. Returns its
    /// length, or `None` if there turns out to be nothing to send; then the buffer is as it was.
    pub fn next_packet(&mut self, mut buffer: GuestBuffers<'_>) -> Option<usize> {
        let mut head = buffer.split_front(HEADER_LEN);
        let header = match self.replies.pop_front() {
            Some(reply) => reply,
            None => self.next_of_connections(&mut buffer)?,
        };
        head.write(&header.to_bytes());
        Some(HEADER_LEN + header.len as usize)
    }

    fn next_of_connections(&mut self, body: &mut GuestBuffers<'_>) -> Option<Header> {
        while let Some(token) = self.ready.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else { continue };
            entry.queued = false;
            let header = entry.connection.next_packet(self.guest_cid, body);
            self.settle(token);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// The changes since the last call.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// What to watch a connection's socket for.
    pub fn watched(&self, token: Token) -> Option<(&UnixStream, EventSet)> {
        self.entries.get(&token).map(|entry| (entry.connection.host(), entry.interest))
    }

    /// Closes all connections without a word to the guest.
    pub fn clear(&mut self) {
        let hosts = self.entries.drain().map(|(_, entry)| entry.connection.into_host());
        self.changes.extend(hosts.map(Change::Remove));
        self.tokens.clear();
        self.ready.clear();
        self.replies.clear();
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= MAX_CONNECTIONS
    }

    fn buffer(&self) -> u32 {
        if self.entries.len() < LARGE_BUFFERS { BUFFER } else { SMALL_BUFFER }
    }

    fn insert(&mut self, connection: Connection) {
        while self.entries.contains_key(&self.next_token) {
            self.advance_token();
        }
        let token = self.next_token;
        self.advance_token();
        let interest = connection.interest();
        self.tokens.insert(connection.id(), token);
        self.entries.insert(token, Entry { connection, queued: false, interest });
        self.changes.push(Change::Add(token));
        self.settle(token);
    }

    fn advance_token(&mut self) {
        self.next_token = self.next_token.wrapping_add(1).max(FIRST_TOKEN);
    }

    /// Brings everything in line with the state of a connection that was touched.
    fn settle(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        let connection = &entry.connection;
        let id = connection.id();
        let is_detached = self.tokens.get(&id) != Some(&token);
        if is_detached && !connection.has_backlog() {
            self.remove(token);
            return;
        }
        if !is_detached && connection.is_finished() {
            self.replies.push_back(self.reset_of(id));
            self.end(token);
            return;
        }
        if !is_detached && !entry.queued && connection.has_packet() {
            entry.queued = true;
            self.ready.push_back(token);
        }
        if entry.interest != connection.interest() {
            entry.interest = connection.interest();
            self.changes.push(Change::Modify(token));
        }
    }

    /// Forgets a connection on the guest's side. What the guest sent before is still handed to the host end.
    fn end(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        entry.connection.detach();
        self.tokens.remove(&entry.connection.id());
        if std::mem::take(&mut entry.queued) {
            self.ready.retain(|&ready| ready != token);
        }
        self.settle(token);
    }

    /// Ends a connection at once, because the guest broke the protocol.
    fn abort(&mut self, token: Token, reply: Header) {
        self.replies.push_back(reply);
        self.remove(token);
    }

    fn remove(&mut self, token: Token) {
        let Some(entry) = self.entries.remove(&token) else { return };
        let id = entry.connection.id();
        if self.tokens.get(&id) == Some(&token) {
            self.tokens.remove(&id);
        }
        if entry.queued {
            self.ready.retain(|&ready| ready != token);
        }
        self.changes.push(Change::Remove(entry.connection.into_host()));
    }

    fn reset_of(&self, id: ConnectionId) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: id.host_port,
            destination_port: id.guest_port,
            len: 0,
            socket_type: TYPE_STREAM,
            operation: Some(Operation::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}
