//! The bounded buffer between the two ends of a stream.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd;

/// How much a buffer holds: as much as a pipe, so that one read may empty one.
pub const CAPACITY: usize = 64 << 10;

/// What came of a read or a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many bytes were moved.
    Moved(usize),
    /// The other side is not ready.
    Blocked,
    /// The other side has ended, or is broken.
    Ended,
}

/// Bytes that were read at one end and not yet written at the other.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// A buffer that holds `bytes`, which are fewer than [`CAPACITY`].
    pub fn holding(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), start: 0, end: bytes.len() }
    }

    /// How many bytes it holds.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether it takes nothing more.
    pub fn is_full(&self) -> bool {
        self.end - self.start >= CAPACITY
    }

    /// Reads once, at most `limit` bytes and at most what there is room for.
    pub fn fill(&mut self, source: impl AsFd, limit: usize) -> Step {
        if self.is_full() || limit == 0 {
            return Step::Blocked;
        }
        self.compact();
        let room = limit.min(CAPACITY - self.end);
        match unistd::read(source, &mut self.bytes[self.end..self.end + room]) {
            Ok(0) => Step::Ended,
            Ok(count) => {
                self.end += count;
                Step::Moved(count)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Step::Blocked,
            Err(_) => Step::Ended,
        }
    }

    /// Writes once.
    pub fn drain(&mut self, sink: impl AsFd) -> Step {
        match unistd::write(sink, &self.bytes[self.start..self.end]) {
            Ok(count) => {
                self.start += count;
                Step::Moved(count)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Step::Blocked,
            Err(_) => Step::Ended,
        }
    }

    /// Makes the free room one piece at the end.
    fn compact(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.bytes.resize(CAPACITY, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
        std::io::pipe().unwrap()
    }

    #[test]
    fn never_holds_more_than_its_capacity() {
        let (reader, mut writer) = pipe();
        let mut buffer = Buffer::holding(&[1; 16]);
        // Exactly what a pipe holds by default; the buffer has 16 bytes less of room.
        writer.write_all(&vec![2; CAPACITY]).unwrap();
        assert_eq!(buffer.fill(&reader, usize::MAX), Step::Moved(CAPACITY - 16));
        assert!(buffer.is_full());
        assert_eq!(buffer.fill(&reader, usize::MAX), Step::Blocked);
    }

    #[test]
    fn tells_the_end_of_the_source() {
        let (reader, writer) = pipe();
        drop(writer);
        assert_eq!(Buffer::default().fill(&reader, usize::MAX), Step::Ended);
    }

    proptest! {
        #[test]
        fn bytes_keep_their_order(
            pieces in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 1..2000), 1..3000usize), 1..30),
        ) {
            let (source, mut feed) = pipe();
            let (mut result, sink) = pipe();
            let mut buffer = Buffer::default();
            let (mut fed, mut seen) = (Vec::new(), Vec::new());
            for (piece, limit) in pieces {
                feed.write_all(&piece).unwrap();
                fed.extend_from_slice(&piece);
                let _ = buffer.fill(&source, limit);
                if !buffer.is_empty() && let Step::Moved(count) = buffer.drain(&sink) {
                    let mut part = vec![0; count];
                    result.read_exact(&mut part).unwrap();
                    seen.extend_from_slice(&part);
                }
            }
            prop_assert_eq!(&fed[..seen.len()], &seen[..]);
        }
    }
}
