//! The streams of processes: between a pipe or a terminal in the guest and a connection to the host.
//!
//! A stream is a small state machine without system state of its own beyond two descriptors and two bounded
//! buffers. Each event moves bytes once in each direction; [`Stream::arm`] then tells epoll what the stream
//! waits for next. What is not read is what holds the writer back: that is all of the flow control.
//!
//! The life of an output stream after its process has ended: what the process had written is *owed* to the
//! host. What its descendants write, such as the `tee` of a shell's process substitution, follows for a
//! [grace](GRACE) as long as the pipe is open. Then no more is read than is owed (*draining*), the connection
//! is closed, and what orphans of the process still write is thrown away (*discarding*), since a closed pipe
//! would kill them.

pub mod buffer;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{self, Shutdown as SocketShutdown};
use rvm_protocol::{STREAM_HEADER_LEN, StreamHeader, StreamToken};

use self::buffer::{Buffer, CAPACITY, Step};
use crate::event::{Poller, Target};
use crate::host::connection_error;
use crate::sys::process::readable_bytes;

/// Names a stream within the agent; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u32);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the process.
    Input,
    /// From the process to the host.
    Output,
    /// Both: a terminal.
    Terminal,
}

impl Direction {
    fn has_input(self) -> bool {
        self != Direction::Output
    }

    fn has_output(self) -> bool {
        self != Direction::Input
    }
}

/// What a terminal can hold back at most when its process has ended: the line discipline's buffer and the
/// flip buffers behind it. Orphans that write without end cannot prolong the draining beyond it.
const TERMINAL_BACKLOG: usize = 128 << 10;

/// How long a pipe is followed after its process has ended. A daemon that was left behind holds the pipe open
/// for good, and the host's end of a process waits for the end of its streams.
pub const GRACE: Duration = Duration::from_secs(2);

/// A descriptor and what epoll waits for on it.
struct End {
    descriptor: OwnedFd,
    interest: Option<EpollFlags>,
}

impl End {
    fn new(descriptor: OwnedFd) -> Self {
        Self { descriptor, interest: None }
    }
}

/// How far an output has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// The process runs, or has ended and is followed.
    Flowing,
    /// The process has ended; so many bytes are still to be read.
    Draining(usize),
    /// All is read that the host shall see; it may not all be sent yet.
    Read,
    /// All is sent.
    Sent,
}

/// One stream.
pub struct Stream {
    id: StreamId,
    direction: Direction,
    /// The agent's end of the pipe, or the master of the terminal.
    local: Option<End>,
    connection: Option<End>,
    connected: bool,
    to_host: Buffer,
    to_process: Buffer,
    input_ended: bool,
    output: Output,
    /// How much of the header is still to be sent. The host waits for every stream by its header, so until
    /// then the connection is kept, whatever becomes of the process.
    header_left: usize,
    /// When the process has ended: how many of the next bytes to the host are its own.
    owed: Option<usize>,
    /// When its descendants are no longer followed.
    deadline: Option<Instant>,
    /// Nobody has the terminal open. Its hang-up is reported as long as that lasts, so it is waited for by edge.
    unopened: bool,
    /// Ends that are done with, and still in epoll.
    dropped: Vec<End>,
}

impl Stream {
    /// A stream over a connection that may still be under way. `local` is absent for a terminal, which does
    /// not exist yet: see [`Stream::set_terminal`].
    pub fn new(
        id: StreamId,
        direction: Direction,
        connection: OwnedFd,
        local: Option<OwnedFd>,
        token: StreamToken,
    ) -> Self {
        Self {
            id,
            direction,
            local: local.map(End::new),
            connection: Some(End::new(connection)),
            connected: false,
            to_host: Buffer::holding(&StreamHeader { token }.to_bytes()),
            to_process: Buffer::default(),
            input_ended: !direction.has_input(),
            output: if direction.has_output() { Output::Flowing } else { Output::Read },
            header_left: STREAM_HEADER_LEN,
            owed: None,
            deadline: None,
            unopened: false,
            dropped: Vec::new(),
        }
    }

    /// Gives a terminal stream its terminal.
    pub fn set_terminal(&mut self, master: OwnedFd) {
        self.local = Some(End::new(master));
    }

    /// The master of the terminal, where the stream has one.
    pub fn terminal(&self) -> Option<&OwnedFd> {
        match self.direction {
            Direction::Terminal => self.local.as_ref().map(|end| &end.descriptor),
            _ => None,
        }
    }

    /// Whether the host has got all that the process itself has written.
    pub fn is_settled(&self) -> bool {
        self.output == Output::Sent
            || (self.direction == Direction::Output && self.header_left == 0 && self.owed == Some(0))
    }

    /// When [`Stream::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.local.is_none() && self.connection.is_none()
    }

    /// Something happened at the pipe or terminal.
    pub fn on_local(&mut self, ready: EpollFlags) {
        if self.connection.is_none() {
            self.discard();
            return;
        }
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if self.direction.has_output() && ready.intersects(readable) {
            self.read_local();
            self.write_connection();
        }
        if self.direction.has_input() {
            if self.direction == Direction::Input && ready.contains(EpollFlags::EPOLLERR) {
                // Nobody reads the pipe any more.
                self.close_input();
            } else if ready.contains(EpollFlags::EPOLLOUT) {
                self.write_local();
            }
        }
    }

    /// Something happened at the connection.
    pub fn on_connection(&mut self, ready: EpollFlags) {
        let Some(connection) = &self.connection else { return };
        if !self.connected {
            if connection_error(&connection.descriptor).is_err() {
                self.break_off();
                return;
            }
            self.connected = ready.contains(EpollFlags::EPOLLOUT);
        }
        self.write_connection();
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if self.wants_input() && ready.intersects(readable) {
            self.read_connection();
            self.write_local();
        } else if ready.contains(EpollFlags::EPOLLERR)
            || (self.direction == Direction::Output && ready.contains(EpollFlags::EPOLLHUP))
        {
            self.break_off();
        }
    }

    /// The process has ended: bring what it wrote to the host, and for a while what its descendants write.
    pub fn process_ended(&mut self) {
        match (self.direction, &self.local) {
            (Direction::Input, _) => self.close_input(),
            (_, None) => self.output_read(),
            (Direction::Output, Some(pipe)) => {
                // Whatever orphans write from here on comes behind these bytes.
                let left = readable_bytes(&pipe.descriptor).unwrap_or(0);
                self.owed = Some(self.to_host.len() + left);
                self.deadline = (self.output == Output::Flowing).then(|| Instant::now() + GRACE);
                self.read_local();
                self.write_connection();
            }
            (Direction::Terminal, Some(_)) => {
                self.input_ended = true;
                if self.output == Output::Flowing {
                    self.output = Output::Draining(TERMINAL_BACKLOG);
                }
                self.read_local();
                self.write_connection();
            }
        }
    }

    /// The grace of the process's descendants is over.
    pub fn expire(&mut self) {
        if self.deadline.take().is_none() || self.output != Output::Flowing {
            return;
        }
        match self.owed.unwrap_or(0).saturating_sub(self.to_host.len()) {
            0 => self.output_read(),
            left => self.output = Output::Draining(left),
        }
    }

    /// Tells epoll what the stream waits for next.
    pub fn arm(&mut self, poller: &Poller) -> nix::Result<()> {
        self.forget_dropped(poller);
        let (local_wants, connection_wants) = (self.local_interest(), self.connection_interest());
        if let Some(End { descriptor, interest }) = &mut self.local {
            poller.change(descriptor, Target::Local(self.id), interest, local_wants)?;
        }
        if let Some(End { descriptor, interest }) = &mut self.connection {
            poller.change(descriptor, Target::Connection(self.id), interest, connection_wants)?;
        }
        Ok(())
    }

    /// Takes the stream out of epoll, before it is dropped.
    pub fn release(&mut self, poller: &Poller) {
        self.drop_local();
        self.drop_connection();
        self.forget_dropped(poller);
    }

    /// Closing a descriptor is not enough for epoll: a child that was forked meanwhile may have a copy.
    fn forget_dropped(&mut self, poller: &Poller) {
        for End { descriptor, interest } in self.dropped.drain(..) {
            if interest.is_some() {
                poller.remove(&descriptor);
            }
        }
    }

    fn drop_local(&mut self) {
        self.dropped.extend(self.local.take());
    }

    fn drop_connection(&mut self) {
        self.dropped.extend(self.connection.take());
    }

    /// An end that is read is taken out of epoll while it is not: a hang-up would be reported without end.
    /// One that is only written stays, so that its breaking is noticed.
    fn local_interest(&self) -> Option<EpollFlags> {
        let discarding = self.connection.is_none();
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, discarding || (self.reads_local() && !self.to_host.is_full()));
        wanted.set(EpollFlags::EPOLLOUT, !self.to_process.is_empty());
        wanted.set(EpollFlags::EPOLLET, self.unopened);
        (!wanted.is_empty() || self.direction == Direction::Input).then_some(wanted)
    }

    fn connection_interest(&self) -> Option<EpollFlags> {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, self.wants_input());
        wanted.set(EpollFlags::EPOLLOUT, !self.connected || !self.to_host.is_empty());
        (!wanted.is_empty() || self.direction == Direction::Output).then_some(wanted)
    }

    fn reads_local(&self) -> bool {
        matches!(self.output, Output::Flowing | Output::Draining(1..))
    }

    fn wants_input(&self) -> bool {
        self.connected && !self.input_ended && !self.to_process.is_full() && self.local.is_some()
    }

    fn read_local(&mut self) {
        let Some(local) = &self.local else { return };
        let limit = match self.output {
            Output::Flowing => CAPACITY,
            Output::Draining(left) => left,
            Output::Read | Output::Sent => return,
        };
        let full = self.to_host.is_full();
        match (self.to_host.fill(&local.descriptor, limit), self.output) {
            // Its process may open the terminal again.
            (Step::Ended, Output::Flowing) if self.direction == Direction::Terminal => self.unopened = true,
            (Step::Ended, _) => {
                self.drop_local();
                self.output_read();
            }
            (Step::Moved(_), Output::Flowing) => self.unopened = false,
            (Step::Moved(count), Output::Draining(left)) if count < left => {
                self.output = Output::Draining(left - count);
            }
            // A terminal that has nothing to read once its process has ended has been read out.
            (Step::Blocked, Output::Draining(_)) if full => {}
            (_, Output::Draining(_)) => self.output_read(),
            _ => {}
        }
    }

    fn output_read(&mut self) {
        if self.output != Output::Sent {
            self.output = Output::Read;
        }
        self.settle();
    }

    /// Closes the connection once all is sent. A terminal's is closed with the terminal.
    fn settle(&mut self) {
        if self.output != Output::Read || !self.to_host.is_empty() {
            return;
        }
        if !self.direction.has_output() && self.local.is_some() {
            return;
        }
        self.output = Output::Sent;
        if let Some(connection) = &self.connection {
            // The connection may be broken already, which comes to the same.
            let _ = socket::shutdown(connection.descriptor.as_raw_fd(), SocketShutdown::Write);
        }
        self.drop_connection();
        if self.direction == Direction::Terminal {
            // As with any engine, who still sits at the terminal gets SIGHUP.
            self.drop_local();
        }
    }

    fn write_connection(&mut self) {
        let Some(connection) = &self.connection else { return };
        if self.connected && !self.to_host.is_empty() {
            match self.to_host.drain(&connection.descriptor) {
                Step::Moved(count) => {
                    self.header_left = self.header_left.saturating_sub(count);
                    self.owed = self.owed.map(|owed| owed.saturating_sub(count));
                }
                Step::Blocked => {}
                Step::Ended => {
                    self.break_off();
                    return;
                }
            }
        }
        self.settle();
    }

    fn read_connection(&mut self) {
        let Some(connection) = &self.connection else { return };
        if self.to_process.fill(&connection.descriptor, CAPACITY) == Step::Ended {
            self.input_ended = true;
        }
    }

    fn write_local(&mut self) {
        let Some(local) = &self.local else { return };
        if !self.to_process.is_empty() && self.to_process.drain(&local.descriptor) == Step::Ended {
            self.to_process = Buffer::default();
            // A terminal that nobody has open may be opened again.
            self.input_ended = self.direction == Direction::Input;
        }
        if self.input_ended && self.to_process.is_empty() && self.direction == Direction::Input {
            // The end of the input is passed on as a closed pipe.
            self.close_input();
        }
    }

    fn discard(&mut self) {
        let Some(local) = &self.local else { return };
        if Buffer::default().fill(&local.descriptor, CAPACITY) == Step::Ended {
            self.drop_local();
        }
    }

    /// Closes the pipe of an input, and the connection when the host knows it.
    fn close_input(&mut self) {
        self.drop_local();
        self.to_process = Buffer::default();
        self.input_ended = true;
        self.settle();
    }

    /// Drops both ends, whatever they still hold: the connection is of no use.
    fn break_off(&mut self) {
        self.drop_local();
        self.drop_connection();
        self.to_host = Buffer::default();
        self.input_ended = true;
        self.output = Output::Sent;
    }
}

#[cfg(test)]
mod tests;
