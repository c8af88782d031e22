//! Bytes that the guest sent and the host end did not take yet.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::virtio::buffers::GuestBuffers;

/// A queue of bytes. Its owner keeps it within the credit that the guest was granted; it takes memory only
/// while there is something in it.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether no bytes wait.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends all bytes of a packet.
    pub fn append(&mut self, packet: &mut GuestBuffers<'_>) {
        self.bytes.drain(..self.start);
        self.start = 0;
        let end = self.bytes.len();
        // Exactly: a guest that stalls many connections must not make us hold twice what it was granted.
        self.bytes.reserve_exact(packet.len());
        self.bytes.resize(end + packet.len(), 0);
        packet.read(&mut self.bytes[end..]);
    }

    /// Sends what the socket takes now. A closed peer is an error, not a signal.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !self.is_empty() {
            match send(socket.as_raw_fd(), &self.bytes[self.start..], flags) {
                Ok(sent) => self.start += sent,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.clear();
        Ok(())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::virtio::testing::{Guest, Part};
    use crate::virtio::virtqueue::Virtqueue;

    #[test]
    fn bytes_leave_in_order_while_others_arrive() {
        let mut guest = Guest::new(&[16]);
        let memory = guest.memory.clone();
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let pattern: Vec<u8> = (0..3_000_000u32).map(|index| (index / 251) as u8 ^ index as u8).collect();

        let mut backlog = Backlog::default();
        let mut arrived = Vec::new();
        for part in pattern.chunks(100_000) {
            let head = guest.push(0, &[Part::Out(part.to_vec())]);
            let chain = queue.pop(&memory).unwrap().unwrap();
            backlog.append(&mut GuestBuffers::readable(&memory, chain).unwrap());
            queue.push_used(&memory, head, 0).unwrap();
            guest.pop_used(0).unwrap();
            backlog.flush(ours.as_fd()).unwrap();
            let mut some = [0; 70_000];
            let read = (&theirs).read(&mut some).unwrap();
            arrived.extend_from_slice(&some[..read]);
        }
        assert!(!backlog.is_empty(), "the reader is slower than the writer");
        while arrived.len() < pattern.len() {
            backlog.flush(ours.as_fd()).unwrap();
            let mut some = [0; 70_000];
            let read = (&theirs).read(&mut some).unwrap();
            arrived.extend_from_slice(&some[..read]);
        }
        assert!(arrived == pattern);
        assert!(backlog.is_empty());
        assert_eq!(backlog.bytes.capacity(), 0, "an empty backlog takes no memory");
    }
}
