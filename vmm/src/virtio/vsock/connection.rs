//! One stream between a port of the guest and a port of the host.
//!
//! The host end is a Unix stream socket; what the connection does maps one to one:
//!
//! | host end                         | guest                      |
//! |----------------------------------|----------------------------|
//! | end of the stream (half close)   | SHUTDOWN(SEND)             |
//! | takes no more (EPIPE)            | SHUTDOWN(RECEIVE)          |
//! | `shutdown(Write)`                | SHUTDOWN(SEND), once all data before it was taken |
//! | `shutdown(Read)`                 | SHUTDOWN(RECEIVE)          |
//!
//! The socket is watched edge-triggered. That is what makes busy loops impossible: a socket with data for which
//! the guest has no credit or no buffers stays quiet, as does one that hung up, which a level-triggered epoll
//! reports for ever. The price is that `readable` has to be remembered until a read says otherwise.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use nix::sys::socket::{MsgFlags, recv};

use super::backlog::Backlog;
use super::credit::Credit;
use super::packet::{
    HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::virtio::buffers::GuestBuffers;

/// The two ports that name a connection (the context IDs are always the guest's and the host's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    /// Port in the guest.
    pub guest_port: u32,
    /// Port of the host.
    pub host_port: u32,
}

/// The guest broke the protocol; its connection is to be reset.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

/// The next packet that a connection has for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    Response,
    Data,
    Shutdown(u32),
    CreditUpdate,
    CreditRequest,
}

/// How far the handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handshake {
    /// We have to send a REQUEST.
    RequestDue,
    /// The guest has to answer our REQUEST.
    Requested,
    /// We have to send a RESPONSE.
    ResponseDue,
    /// Data may flow.
    Done,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    host: UnixStream,
    handshake: Handshake,
    credit: Credit,
    /// What the host end did not take yet.
    backlog: Backlog,
    /// A read of the host end may yield something.
    readable: bool,
    /// The host end hung up.
    hung_up: bool,
    /// SHUTDOWN flags that the host end brought about.
    host_shutdown: u32,
    /// Those of them that the guest was told of.
    announced: u32,
    /// SHUTDOWN flags that the guest sent.
    guest_shutdown: u32,
    /// The guest asked for our counters.
    update_due: bool,
    /// We asked for the guest's counters since it last had credit for us.
    credit_requested: bool,
}

impl Connection {
    /// A connection that the guest asked for, and that its `header` describes.
    pub fn accepted(id: ConnectionId, host: UnixStream, buf_alloc: u32, header: &Header) -> Self {
        let mut connection = Self::new(id, host, buf_alloc, Handshake::ResponseDue);
        connection.credit.learn(header);
        connection
    }

    /// A connection that the host asks for.
    pub fn requested(id: ConnectionId, host: UnixStream, buf_alloc: u32) -> Self {
        Self::new(id, host, buf_alloc, Handshake::RequestDue)
    }

    fn new(id: ConnectionId, host: UnixStream, buf_alloc: u32, handshake: Handshake) -> Self {
        Self {
            id,
            host,
            handshake,
            credit: Credit::new(buf_alloc),
            backlog: Backlog::default(),
            readable: false,
            hung_up: false,
            host_shutdown: 0,
            announced: 0,
            guest_shutdown: 0,
            update_due: false,
            credit_requested: false,
        }
    }

    /// The ports.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// The host end, to be watched.
    pub fn host(&self) -> &UnixStream {
        &self.host
    }

    /// The host end, for the connection is over.
    pub fn into_host(self) -> UnixStream {
        self.host
    }

    /// What to watch the host end for.
    pub fn interest(&self) -> EventSet {
        let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.backlog.is_empty() { always } else { always | EventSet::OUT }
    }

    /// Whether bytes wait for the host end.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether neither side has anything more to say to the other, so that the guest can forget the connection.
    /// What it sent may still wait for the host end.
    pub fn is_finished(&self) -> bool {
        let to_guest = self.announced & SHUTDOWN_SEND != 0 || self.guest_shutdown & SHUTDOWN_RECEIVE != 0;
        let to_host = self.guest_shutdown & SHUTDOWN_SEND != 0 || self.announced & SHUTDOWN_RECEIVE != 0;
        to_guest && to_host
    }

    /// Takes in a packet of the guest, except for a REQUEST or an RST, which are not for a connection to judge.
    pub fn receive(&mut self, header: &Header, payload: GuestBuffers<'_>) -> Result<(), Violation> {
        self.credit.learn(header);
        if self.credit.available() > 0 {
            self.credit_requested = false;
        }
        match (header.operation, self.handshake) {
            (Some(Operation::CreditUpdate), _) => Ok(()),
            (Some(Operation::CreditRequest), _) => {
                self.update_due = true;
                Ok(())
            }
            (Some(Operation::Response), Handshake::Requested) => {
                self.handshake = Handshake::Done;
                Ok(())
            }
            (Some(Operation::ReadWrite), Handshake::Done) => self.receive_data(header.len as usize, payload),
            (Some(Operation::Shutdown), Handshake::Done) => {
                self.receive_shutdown(header.flags & SHUTDOWN_BOTH);
                Ok(())
            }
            _ => Err(Violation),
        }
    }

    fn receive_data(&mut self, len: usize, mut payload: GuestBuffers<'_>) -> Result<(), Violation> {
        payload.truncate(len);
        let promised_no_more = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if payload.len() != len || promised_no_more || !self.credit.receive(len) {
            return Err(Violation);
        }
        if self.backlog.is_empty() && !payload.is_empty() && !self.is_deaf() {
            match payload.send(self.host.as_fd()) {
                Ok(sent) => self.credit.forward(sent),
                Err(error) if is_temporary(&error) => {}
                Err(_) => self.deafen(),
            }
        }
        if self.is_deaf() {
            // Nobody will read it; the guest is being told.
            self.credit.forward(payload.len());
        } else if !payload.is_empty() {
            self.backlog.append(&mut payload);
        }
        Ok(())
    }

    fn receive_shutdown(&mut self, flags: u32) {
        let new = flags & !self.guest_shutdown;
        self.guest_shutdown |= flags;
        if new & SHUTDOWN_RECEIVE != 0 {
            self.discard_unread();
        }
        if new & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            self.end_host_stream();
        }
    }

    /// Learns what happened to the host end.
    pub fn host_event(&mut self, events: EventSet) {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | gone) {
            self.readable = true;
        }
        if events.intersects(gone) {
            self.hung_up = true;
            // A host end that is gone takes nothing, but what it wrote before comes first.
            if (self.host_shutdown & SHUTDOWN_SEND) | (self.guest_shutdown & SHUTDOWN_RECEIVE) != 0 {
                self.deafen();
            }
        }
        if events.intersects(EventSet::OUT | gone) {
            self.flush();
        }
    }

    /// Hands the backlog to the host end, as far as it takes it.
    fn flush(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let before = self.backlog.len();
        let outcome = self.backlog.flush(self.host.as_fd());
        self.credit.forward(before - self.backlog.len());
        if outcome.is_err() {
            self.deafen();
        }
        if self.backlog.is_empty() && self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.end_host_stream();
        }
    }

    /// Whether there is a packet for the guest.
    pub fn has_packet(&self) -> bool {
        self.next().is_some()
    }

    /// Makes the next packet for the guest: puts data into `body`, which must not be empty, and returns the
    /// header. `None` if there turns out to be nothing to send.
    pub fn next_packet(&mut self, guest_cid: u64, body: &mut GuestBuffers<'_>) -> Option<Header> {
        loop {
            let (operation, len, flags) = match self.next()? {
                Next::Request => {
                    self.handshake = Handshake::Requested;
                    (Operation::Request, 0, 0)
                }
                Next::Response => {
                    self.handshake = Handshake::Done;
                    (Operation::Response, 0, 0)
                }
                Next::Data => match self.read_host(body) {
                    Some(len) => (Operation::ReadWrite, len, 0),
                    None => continue,
                },
                Next::Shutdown(flags) => {
                    self.announced = flags;
                    (Operation::Shutdown, 0, flags)
                }
                Next::CreditUpdate => (Operation::CreditUpdate, 0, 0),
                Next::CreditRequest => {
                    self.credit_requested = true;
                    (Operation::CreditRequest, 0, 0)
                }
            };
            return Some(self.header(guest_cid, operation, len, flags));
        }
    }

    fn next(&self) -> Option<Next> {
        match self.handshake {
            Handshake::RequestDue => return Some(Next::Request),
            Handshake::ResponseDue => return Some(Next::Response),
            Handshake::Requested => return None,
            Handshake::Done => {}
        }
        let wants_data = (self.host_shutdown & SHUTDOWN_SEND) | (self.guest_shutdown & SHUTDOWN_RECEIVE) == 0;
        let has_data = self.readable && wants_data;
        // A SHUTDOWN(SEND) is due only after the end of the stream was read, so it follows all data.
        if has_data && self.credit.available() > 0 {
            Some(Next::Data)
        } else if self.host_shutdown != self.announced {
            Some(Next::Shutdown(self.host_shutdown))
        } else if self.update_due || self.credit.is_worth_an_update() {
            Some(Next::CreditUpdate)
        } else if has_data && !self.credit_requested {
            Some(Next::CreditRequest)
        } else {
            None
        }
    }

    fn header(&mut self, guest_cid: u64, operation: Operation, len: usize, flags: u32) -> Header {
        let mut header = Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: self.id.host_port,
            destination_port: self.id.guest_port,
            len: len as u32,
            socket_type: TYPE_STREAM,
            operation: Some(operation),
            flags,
            buf_alloc: 0,
            fwd_cnt: 0,
        };
        self.credit.announce(&mut header);
        self.update_due = false;
        header
    }

    /// Moves data from the host end to the guest. `None` if there was none.
    fn read_host(&mut self, body: &mut GuestBuffers<'_>) -> Option<usize> {
        match body.receive(self.host.as_fd(), self.credit.available()) {
            Ok(len) if len > 0 => {
                self.credit.sent(len);
                return Some(len);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            // The end of the stream. An error (the host end was closed with something unread) is one as well.
            _ => {
                self.host_shutdown |= SHUTDOWN_SEND;
                if self.hung_up {
                    self.deafen();
                }
            }
        }
        None
    }

    /// Whether the host end takes no more.
    fn is_deaf(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// The host end takes no more: whatever waits for it will never be read.
    fn deafen(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        self.credit.forward(self.backlog.len());
        self.backlog.clear();
    }

    /// Lets the host end read the end of the stream.
    fn end_host_stream(&self) {
        // It fails only for a host end that is gone.
        let _ = self.host.shutdown(Shutdown::Write);
    }

    /// Makes writes to the host end fail, and throws away what was written but not sent: closing a socket with
    /// something unread would give the other end a "connection reset" in place of the end of the stream.
    fn discard_unread(&self) {
        // It fails only for a host end that is gone.
        let _ = self.host.shutdown(Shutdown::Read);
        let mut unread = [0; 4096];
        let flags = MsgFlags::MSG_DONTWAIT;
        while recv(self.host.as_raw_fd(), &mut unread, flags).is_ok_and(|len| len > 0) {}
    }

    /// Ends the part of the connection that the guest sees. What it sent before still goes to the host end.
    pub fn detach(&mut self) {
        self.guest_shutdown = SHUTDOWN_BOTH;
        self.discard_unread();
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
