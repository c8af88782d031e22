//! Bytes between files and the guest's memory, without a copy in between.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestMemory as _, GuestMemoryMmap};

use super::{ChainError, Descriptors, GuestBuffers};

impl<'m> GuestBuffers<'m> {
    /// The two halves of a chain: what the device reads, and after it the room that it writes (virtio 1.2,
    /// section 2.7.4.2).
    pub fn both<M: Deref<Target = GuestMemoryMmap> + Clone>(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<(Self, Self), ChainError> {
        let (mut readable, mut writable) = (Self::empty(), Self::empty());
        for descriptor in Descriptors::of(chain) {
            let descriptor = descriptor?;
            let half = match descriptor.is_write_only() {
                true => &mut writable,
                false if writable.is_empty() => &mut readable,
                false => return Err(ChainError::Direction),
            };
            if descriptor.len() > 0 {
                let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize);
                half.push_back(Ok(slice.map_err(|_| ChainError::Address)?));
            }
        }
        Ok((readable, writable))
    }

    /// No bytes at all.
    pub fn empty() -> Self {
        Self { slices: Default::default(), len: 0 }
    }

    /// Takes a structure off the front, if all its bytes are there. They are read exactly once.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        let bytes = object.as_mut_slice();
        let wanted = bytes.len();
        (self.read(bytes) == wanted).then_some(object)
    }

    /// Reads from a file at an offset until the room is full or the file ends; returns how many bytes.
    pub fn read_file_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.read_file(file, file_offset(offset)?, 0)
    }

    /// The same if all of that is in the page cache, and EAGAIN if not: then what was read is not worth anything. A file
    /// system may not be able to tell, and reads.
    pub fn read_cached_file_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let mut read = 0;
        while !self.is_empty() {
            let offset = file_offset(offset.saturating_add(read as u64))?;
            let more = match self.read_file(file, offset, libc::RWF_NOWAIT) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.read_file(file, offset, 0)?
                }
                result => result?,
            };
            // A short read may be due to the end of the file, or of what is cached.
            if more == 0 {
                break;
            }
            read += more;
        }
        Ok(read)
    }

    fn read_file(&mut self, file: BorrowedFd<'_>, offset: i64, flags: i32) -> io::Result<usize> {
        let vectors = self.vectors();
        let (descriptor, count) = (file.as_raw_fd(), vectors.len() as i32);
        // SAFETY: each vector refers to guest memory that stays mapped as long as `self` borrows it. Guest memory
        // may change at any time by its nature: nothing in this process holds a reference to it.
        let read = unsafe { libc::preadv2(descriptor, vectors.as_ptr(), count, offset, flags) };
        self.consume(read)
    }

    /// Writes to a file at an offset; returns how many bytes it took.
    pub fn write_file_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.write_file(file, file_offset(offset)?, 0)
    }

    /// Writes to the end of a file, wherever that is at the time; returns how many bytes it took.
    pub fn append_file(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        self.write_file(file, 0, libc::RWF_APPEND)
    }

    /// Reads what a device or pipe has, up to `limit` bytes; returns how many. Their room is not consumed.
    pub fn read_stream(&self, file: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let (vectors, _) = self.message_up_to(limit);
        // SAFETY: as for `read_file`.
        let read = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes to a device or pipe; returns how many bytes it took.
    pub fn write_stream(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        // SAFETY: each vector refers to guest memory that stays mapped as long as `self` borrows it. The kernel
        // only reads there.
        let written = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32) };
        self.consume(written)
    }

    fn write_file(&mut self, file: BorrowedFd<'_>, offset: i64, flags: i32) -> io::Result<usize> {
        let vectors = self.vectors();
        let (descriptor, count) = (file.as_raw_fd(), vectors.len() as i32);
        // SAFETY: as for `write_stream`.
        let written = unsafe { libc::pwritev2(descriptor, vectors.as_ptr(), count, offset, flags) };
        self.consume(written)
    }

    fn vectors(&self) -> Vec<libc::iovec> {
        self.message().0
    }
}

/// Offsets beyond 2^63 make no sense for a file.
fn file_offset(offset: u64) -> io::Result<i64> {
    offset.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;
    use crate::virtio::testing::{Descriptor, Guest, MEMORY, NEXT, Part, WRITE};
    use crate::virtio::virtqueue::{Chain, Virtqueue};

    fn pop<'m>(guest: &Guest, memory: &'m GuestMemoryMmap) -> Chain<'m> {
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        queue.pop(memory).unwrap().unwrap()
    }

    #[test]
    fn what_is_cached_is_read_up_to_the_end_of_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut guest = Guest::new(&[8]);
        guest.push(0, &[Part::In(4), Part::In(8)]);
        let memory = guest.memory.clone();
        let (_, room) = GuestBuffers::both(&memory, pop(&guest, &memory)).unwrap();
        let read = |offset| room.clone().read_cached_file_at(file.as_fd(), offset).unwrap();
        assert_eq!([read(0), read(3), read(10), read(u64::from(u32::MAX))], [10, 7, 0, 0]);
        assert!(room.clone().read_cached_file_at(file.as_fd(), u64::MAX).is_err());
    }

    #[test]
    fn a_chain_is_split_where_the_device_may_write() {
        let mut guest = Guest::new(&[8]);
        guest.push(0, &[Part::Out(b"ab".to_vec()), Part::Out(b"c".to_vec()), Part::In(4), Part::In(1)]);
        let memory = guest.memory.clone();
        let (mut readable, writable) = GuestBuffers::both(&memory, pop(&guest, &memory)).unwrap();
        assert_eq!(readable.read_object::<[u8; 2]>(), Some(*b"ab"));
        assert_eq!(readable.read_object::<[u8; 2]>(), None, "a structure cut short is none");
        assert_eq!(writable.len(), 5);
    }

    #[test]
    fn a_chain_that_makes_no_sense_is_refused() {
        let refusal = |descriptors: &[Descriptor]| {
            let mut guest = Guest::new(&[2048]);
            guest.push_raw(0, descriptors);
            let memory = guest.memory.clone();
            GuestBuffers::both(&memory, pop(&guest, &memory)).unwrap_err()
        };
        let mixed = [Descriptor::new(0x10_0000, 8, WRITE | NEXT, 1), Descriptor::new(0x10_0000, 8, 0, 0)];
        assert_eq!(refusal(&mixed), ChainError::Direction);
        assert_eq!(refusal(&[Descriptor::new(MEMORY - 4, 8, WRITE, 0)]), ChainError::Address);
        assert_eq!(refusal(&[Descriptor::new(0x10_0000, 0, NEXT, 0)]), ChainError::TooLong);
    }

    #[test]
    fn bytes_go_to_and_from_files() {
        let mut guest = Guest::new(&[8]);
        guest.push(
            0,
            &[Part::Out(b"hello".to_vec()), Part::Out(b" world".to_vec()), Part::In(6), Part::In(100)],
        );
        let memory = guest.memory.clone();
        let file = tempfile::tempfile().unwrap();
        let (mut data, mut room) = GuestBuffers::both(&memory, pop(&guest, &memory)).unwrap();
        let mut again = data.split_front(5);
        assert_eq!(again.write_file_at(file.as_fd(), 10).unwrap(), 5);
        assert_eq!(data.append_file(file.as_fd()).unwrap(), 6);
        assert_eq!(file.metadata().unwrap().len(), 21);
        assert_eq!(room.read_file_at(file.as_fd(), 9).unwrap(), 12);
        assert_eq!(room.len(), 94);
        assert_eq!(room.read_file_at(file.as_fd(), 100).unwrap(), 0, "beyond the end");
        assert!(room.read_file_at(file.as_fd(), u64::MAX).is_err());
    }

    #[test]
    fn bytes_go_through_pipes() {
        let mut guest = Guest::new(&[8]);
        guest.push(0, &[Part::Out(b"ping".to_vec()), Part::In(2), Part::In(2)]);
        let memory = guest.memory.clone();
        let (mut data, room) = GuestBuffers::both(&memory, pop(&guest, &memory)).unwrap();
        let (mut reader, mut writer) = io::pipe().unwrap();
        assert_eq!(data.write_stream(writer.as_fd()).unwrap(), 4);
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        writer.write_all(b"abc").unwrap();
        assert_eq!(room.read_stream(reader.as_fd(), 1).unwrap(), 1);
        assert_eq!(room.read_stream(reader.as_fd(), 4).unwrap(), 2);
        assert_eq!(room.len(), 4, "not consumed");
    }
}
