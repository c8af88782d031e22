//! The bytes of a descriptor chain, wherever they lie in the guest's memory.
//!
//! [`GuestBuffers`] hides how many descriptors carry them: header and data may be split at any place (virtio 1.2,
//! section 2.7.4). Data can go between a socket and the guest's memory without a copy in between.

mod descriptors;
mod file;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemory as _, GuestMemoryMmap, VolatileSlice};

use super::virtqueue::Chain;
pub(crate) use descriptors::Descriptors;

/// The most descriptors that a chain may have: as many as one system call takes (IOV_MAX). No queue
/// of ours is longer, and a driver must not make chains longer than the queue (virtio 1.2, section 2.7.5.3.1).
pub const MAX_DESCRIPTORS: usize = 1024;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A buffer that the device has to read may only be written, or the other way round.
    #[error("the driver offered a buffer for the wrong direction")]
    Direction,
    /// A buffer does not lie in the guest's memory.
    #[error("the driver offered a buffer outside of its memory")]
    Address,
    /// There are more descriptors than a driver may chain.
    #[error("the driver offered a chain of more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// The chain breaks off: a descriptor names a next one that does not exist, cannot be read, or was there before.
    #[error("the driver offered a chain that breaks off")]
    Broken,
}

/// A sequence of bytes in the guest's memory, consumed from its start.
#[derive(Debug, Clone)]
pub struct GuestBuffers<'m> {
    slices: VecDeque<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> GuestBuffers<'m> {
    /// The bytes of a chain that the device only reads.
    pub fn readable(memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> Result<Self, ChainError> {
        Self::collect(memory, chain, false)
    }

    /// The room of a chain that the device only writes.
    pub fn writable(memory: &'m GuestMemoryMmap, chain: Chain<'m>) -> Result<Self, ChainError> {
        Self::collect(memory, chain, true)
    }

    fn collect(memory: &'m GuestMemoryMmap, chain: Chain<'m>, writable: bool) -> Result<Self, ChainError> {
        let mut buffers = Self::empty();
        buffers.extend(memory, chain, writable)?;
        Ok(buffers)
    }

    /// Adds the room of another chain at the end, or nothing if that makes no sense. Returns how much it is.
    pub(crate) fn extend_writable(
        &mut self,
        memory: &'m GuestMemoryMmap,
        chain: Chain<'m>,
    ) -> Result<usize, ChainError> {
        let before = self.len;
        match self.extend(memory, chain, true) {
            Ok(()) => Ok(self.len - before),
            Err(error) => {
                self.truncate(before);
                Err(error)
            }
        }
    }

    fn extend(
        &mut self,
        memory: &'m GuestMemoryMmap,
        chain: Chain<'m>,
        writable: bool,
    ) -> Result<(), ChainError> {
        for descriptor in Descriptors::of(chain) {
            let descriptor = descriptor?;
            if descriptor.is_write_only() != writable {
                return Err(ChainError::Direction);
            }
            if descriptor.len() == 0 {
                continue;
            }
            // The sum fits: a chain of virtio-queue ends where it would exceed 2^32 bytes.
            let len = descriptor.len() as usize;
            let slice = memory.get_slice(descriptor.addr(), len).map_err(|_| ChainError::Address)?;
            self.slices.push_back(slice);
            self.len += len;
        }
        Ok(())
    }

    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// In how many pieces they lie.
    pub(crate) fn pieces(&self) -> usize {
        self.slices.len()
    }

    /// Keeps the first `len` bytes at most.
    pub fn truncate(&mut self, len: usize) {
        while self.len > len {
            let surplus = self.len - len;
            let Some(last) = self.slices.pop_back() else { return };
            self.len -= last.len();
            if let Some(kept) = last.len().checked_sub(surplus).filter(|&kept| kept > 0) {
                self.push_back(last.subslice(0, kept));
            }
        }
    }

    /// Takes the first `len` bytes off, or all there are.
    pub fn split_front(&mut self, len: usize) -> GuestBuffers<'m> {
        let mut front = GuestBuffers { slices: VecDeque::new(), len: 0 };
        while front.len < len {
            let Some(first) = self.slices.pop_front() else { break };
            self.len -= first.len();
            let wanted = first.len().min(len - front.len);
            front.push_back(first.subslice(0, wanted));
            self.push_front(first.offset(wanted));
        }
        front
    }

    /// Drops the first `len` bytes, or all there are.
    pub fn skip(&mut self, mut len: usize) {
        while len > 0 {
            let Some(first) = self.slices.pop_front() else { return };
            self.len -= first.len();
            let dropped = first.len().min(len);
            len -= dropped;
            self.push_front(first.offset(dropped));
        }
    }

    /// Copies bytes out of the guest's memory until `to` is full or nothing is left; returns how many.
    pub fn read(&mut self, mut to: &mut [u8]) -> usize {
        let wanted = to.len().min(self.len);
        for slice in &self.slices {
            if to.is_empty() {
                break;
            }
            let copied = slice.copy_to(to);
            to = &mut to[copied..];
        }
        self.skip(wanted);
        wanted
    }

    /// Copies bytes into the guest's memory until `from` ends or no room is left; returns how many.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let written = self.write_at(0, from);
        self.skip(written);
        written
    }

    /// The same from an offset on, whose room is not consumed.
    pub(crate) fn write_at(&self, mut offset: usize, from: &[u8]) -> usize {
        let mut rest = from;
        for slice in &self.slices {
            if rest.is_empty() {
                break;
            }
            let before = offset.min(slice.len());
            offset -= before;
            if let Ok(room) = slice.offset(before) {
                let (now, later) = rest.split_at(rest.len().min(room.len()));
                room.copy_from(now);
                rest = later;
            }
        }
        from.len() - rest.len()
    }

    /// Sends as many bytes as a socket takes now, and consumes them. A closed peer is an error, not a signal.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (mut vectors, message) = self.message();
        let message = libc::msghdr { msg_iov: vectors.as_mut_ptr(), ..message };
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `message` refers to `vectors`, which outlives the call, and each vector to guest memory that
        // stays mapped as long as `self` borrows it. The kernel only reads there.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        self.consume(sent)
    }

    /// Receives as many bytes as a socket has now and fit, `limit` at most, and consumes their room. Zero is the
    /// end of the stream, as long as there was room.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let (mut vectors, message) = self.message_up_to(limit);
        let mut message = libc::msghdr { msg_iov: vectors.as_mut_ptr(), ..message };
        // SAFETY: `message` refers to `vectors`, which outlives the call, and each vector to guest memory that
        // stays mapped as long as `self` borrows it. Guest memory may change at any time by its nature: nothing
        // in this process holds a reference to it.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        self.consume(received)
    }

    /// The vectors for a system call, and a message whose `msg_iov` has yet to point to them.
    fn message(&self) -> (Vec<libc::iovec>, libc::msghdr) {
        self.message_up_to(usize::MAX)
    }

    fn message_up_to(&self, mut limit: usize) -> (Vec<libc::iovec>, libc::msghdr) {
        let mut vectors = Vec::with_capacity(self.slices.len().min(MAX_DESCRIPTORS));
        for slice in self.slices.iter().take(MAX_DESCRIPTORS) {
            let len = slice.len().min(limit);
            vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
            limit -= len;
            if limit == 0 {
                break;
            }
        }
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: std::ptr::null_mut(),
            msg_iovlen: vectors.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        (vectors, message)
    }

    /// Turns what a system call returned into a result, and drops the bytes that it moved.
    fn consume(&mut self, moved: isize) -> io::Result<usize> {
        let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
        self.skip(moved);
        Ok(moved)
    }

    fn push_back(&mut self, slice: Result<VolatileSlice<'m>, vm_memory::VolatileMemoryError>) {
        if let Some(slice) = slice.ok().filter(|slice| !slice.is_empty()) {
            self.len += slice.len();
            self.slices.push_back(slice);
        }
    }

    fn push_front(&mut self, slice: Result<VolatileSlice<'m>, vm_memory::VolatileMemoryError>) {
        if let Some(slice) = slice.ok().filter(|slice| !slice.is_empty()) {
            self.len += slice.len();
            self.slices.push_front(slice);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Descriptor, Guest, MEMORY, NEXT, Part, WRITE};
    use crate::virtio::virtqueue::Virtqueue;

    fn pop<'m>(guest: &Guest, memory: &'m GuestMemoryMmap) -> Chain<'m> {
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        queue.pop(memory).unwrap().unwrap()
    }

    fn refusal(descriptors: &[Descriptor]) -> ChainError {
        let mut guest = Guest::new(&[2048]);
        guest.push_raw(0, descriptors);
        let memory = guest.memory.clone();
        GuestBuffers::readable(&memory, pop(&guest, &memory)).unwrap_err()
    }

    #[test]
    fn buffers_for_the_wrong_direction_or_out_of_memory_are_refused() {
        assert_eq!(refusal(&[Descriptor::new(0x10_0000, 8, WRITE, 0)]), ChainError::Direction);
        assert_eq!(refusal(&[Descriptor::new(MEMORY, 8, 0, 0)]), ChainError::Address);
        assert_eq!(refusal(&[Descriptor::new(MEMORY - 4, 8, 0, 0)]), ChainError::Address);
        assert_eq!(refusal(&[Descriptor::new(u64::MAX, 2, 0, 0)]), ChainError::Address);
        let endless = Descriptor::new(0x10_0000, 1, NEXT, 0);
        assert_eq!(refusal(&[endless]), ChainError::TooLong);
    }

    #[test]
    fn bytes_go_to_and_from_sockets() {
        let mut guest = Guest::new(&[8]);
        guest.push(0, &[Part::Out(b"ab".to_vec()), Part::Out(vec![]), Part::Out(b"cde".to_vec())]);
        let memory = guest.memory.clone();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffers = GuestBuffers::readable(&memory, pop(&guest, &memory)).unwrap();
        assert_eq!(buffers.read(&mut [0]), 1);
        assert_eq!(buffers.send(ours.as_fd()).unwrap(), 4);
        assert!(buffers.is_empty());
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"bcde");

        let mut guest = Guest::new(&[8]);
        guest.push(0, &[Part::In(1), Part::In(2), Part::In(4)]);
        let memory = guest.memory.clone();
        let mut room = GuestBuffers::writable(&memory, pop(&guest, &memory)).unwrap();
        let mut again = GuestBuffers::writable(&memory, pop(&guest, &memory)).unwrap();
        let nothing = room.receive(ours.as_fd(), 7).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        theirs.write_all(b"12345").unwrap();
        assert_eq!(room.receive(ours.as_fd(), 2).unwrap(), 2);
        assert_eq!(room.receive(ours.as_fd(), 7).unwrap(), 3);
        assert_eq!(room.len(), 2);
        let mut written = [0; 5];
        again.read(&mut written);
        assert_eq!(&written, b"12345");

        drop(theirs);
        assert_eq!(room.receive(ours.as_fd(), 2).unwrap(), 0, "the end of the stream");
        assert!(room.send(ours.as_fd()).is_err(), "no SIGPIPE");
    }

    proptest! {
        #[test]
        fn any_split_carries_the_same_bytes(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..20),
            front in 0..100usize,
            kept in 0..200usize,
        ) {
            let whole = parts.concat();
            let mut guest = Guest::new(&[32]);
            guest.push(0, &parts.into_iter().map(Part::Out).collect::<Vec<_>>());
            let memory = guest.memory.clone();
            let mut buffers = GuestBuffers::readable(&memory, pop(&guest, &memory)).unwrap();
            prop_assert_eq!(buffers.len(), whole.len());
            let mut head = buffers.split_front(front);
            let mut bytes = vec![0; head.len()];
            head.read(&mut bytes);
            prop_assert_eq!(&bytes, &whole[..front.min(whole.len())]);
            buffers.truncate(kept);
            let mut rest = vec![0; 400];
            let read = buffers.read(&mut rest);
            let expected = &whole[front.min(whole.len())..];
            prop_assert_eq!(&rest[..read], &expected[..kept.min(expected.len())]);
        }
    }
}
