//! Bytes that the guest sent and the host end did not take yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use crate::virtio::buffers::GuestBuffers;

/// The most bytes in one piece of memory.
const CHUNK: usize = 16 << 10;
/// How many pieces are sent at once.
const MAX_SENT: usize = 32;

/// A queue of bytes. Its owner keeps it within the credit that the guest was granted; it takes memory only
/// while there is something in it, and no byte is moved once it is there.
#[derive(Debug, Default)]
pub struct Backlog {
    /// None of them is empty, and each but the last is full.
    chunks: VecDeque<Vec<u8>>,
    /// How many bytes of the first chunk are gone.
    start: usize,
    len: usize,
}

impl Backlog {
    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes wait.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends all bytes of a packet.
    pub fn append(&mut self, packet: &mut GuestBuffers<'_>) {
        self.len += packet.len();
        while !packet.is_empty() {
            if self.chunks.back().is_none_or(|chunk| chunk.len() == CHUNK) {
                self.chunks.push_back(Vec::new());
            }
            let Some(chunk) = self.chunks.back_mut() else { return };
            let end = chunk.len();
            chunk.resize(end + packet.len().min(CHUNK - end), 0);
            packet.read(&mut chunk[end..]);
        }
    }

    /// Sends what the socket takes now. A closed peer is an error, not a signal.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !self.is_empty() {
            let gone = std::iter::once(self.start).chain(std::iter::repeat(0));
            let pieces = self.chunks.iter().zip(gone).take(MAX_SENT);
            let pieces: Vec<_> = pieces.map(|(chunk, gone)| IoSlice::new(&chunk[gone..])).collect();
            match sendmsg::<()>(socket.as_raw_fd(), &pieces, &[], flags, None) {
                Ok(sent) => self.advance(sent),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.clear();
        Ok(())
    }

    /// Takes bytes away that were sent.
    fn advance(&mut self, sent: usize) {
        self.len -= sent;
        self.start += sent;
        while let Some(gone) = self.chunks.front().map(Vec::len).filter(|&len| len <= self.start) {
            self.start -= gone;
            self.chunks.pop_front();
        }
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
        assert_eq!(backlog.chunks.capacity(), 0, "an empty backlog takes no memory");
    }

    #[test]
    fn small_packets_take_as_much_memory_as_large_ones() {
        let mut guest = Guest::new(&[16]);
        let memory = guest.memory.clone();
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let mut backlog = Backlog::default();
        for round in 0..20_000 {
            let head = guest.push(0, &[Part::Out(vec![round as u8; 3])]);
            let chain = queue.pop(&memory).unwrap().unwrap();
            backlog.append(&mut GuestBuffers::readable(&memory, chain).unwrap());
            queue.push_used(&memory, head, 0).unwrap();
            guest.pop_used(0).unwrap();
        }
        assert_eq!(backlog.len(), 60_000);
        let held: usize = backlog.chunks.iter().map(Vec::capacity).sum();
        assert!(held < 60_000 + 2 * CHUNK, "{held}");
    }
}
