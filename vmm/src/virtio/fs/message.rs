//! One FUSE request and its reply in a chain of descriptors.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use nix::errno::Errno;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::pace::Pace;
use crate::virtio::buffers::{ChainError, GuestBuffers};
use crate::virtio::virtqueue::KeptChain;

/// The most bytes that one WRITE moves.
pub(super) const MAX_WRITE: u32 = 1 << 20;
/// So many pages a request touches at most: as much as that, wherever in a page it begins.
pub(super) const MAX_PAGES: u16 = (MAX_WRITE / PAGE) as u16 + 1;
/// The most bytes that one READ moves. A driver takes a shorter answer for the end of the file, so that is all that its
/// pages hold.
pub(super) const MAX_READ: u32 = MAX_PAGES as u32 * PAGE;
/// The size of a page of memory.
const PAGE: u32 = 4096;
/// The most bytes of text that come with a request: an extended attribute's name and value are the longest.
const MAX_TEXT: usize = 68 << 10;
/// Longest name of a file (NAME_MAX).
const MAX_NAME: usize = 255;

/// What the guest asks for.
pub(super) struct Request<'m> {
    /// The header, as it was when the request was taken.
    pub(super) header: InHeader,
    /// The arguments that were not read yet.
    pub(super) arguments: GuestBuffers<'m>,
}

/// The answer, written straight to the guest's memory.
pub(super) struct Reply<'m> {
    header: GuestBuffers<'m>,
    body: GuestBuffers<'m>,
    written: usize,
}

/// Takes a chain apart. The header must say as much as there is.
pub(super) fn decode(
    memory: &GuestMemoryMmap,
    chain: KeptChain,
) -> Result<(Option<Request<'_>>, Reply<'_>), ChainError> {
    let (mut arguments, mut body) = GuestBuffers::both(memory, chain)?;
    let header = body.split_front(size_of::<OutHeader>());
    let reply = Reply { header, body, written: 0 };
    let request = arguments.read_object::<InHeader>().and_then(|header| {
        let rest = (header.len as usize).checked_sub(size_of::<InHeader>())?;
        if rest > arguments.len() {
            return None;
        }
        arguments.truncate(rest);
        Some(Request { header, arguments })
    });
    Ok((request, reply))
}

impl Request<'_> {
    /// The next structure of the arguments.
    pub(super) fn take<T: ByteValued + Default>(&mut self) -> Result<T, Errno> {
        self.arguments.read_object().ok_or(Errno::EINVAL)
    }

    /// The rest of the arguments, which are bytes.
    pub(super) fn rest(&mut self) -> Result<Vec<u8>, Errno> {
        if self.arguments.len() > MAX_TEXT {
            return Err(Errno::E2BIG);
        }
        let mut bytes = vec![0; self.arguments.len()];
        self.arguments.read(&mut bytes);
        Ok(bytes)
    }

    /// The name of a file in a directory, which ends the arguments.
    pub(super) fn name(&mut self) -> Result<CString, Errno> {
        let bytes = self.rest()?;
        let (name, _) = split_text(&bytes)?;
        component(name)
    }

    /// Two names of files.
    pub(super) fn two_names(&mut self) -> Result<(CString, CString), Errno> {
        let bytes = self.rest()?;
        let (first, rest) = split_text(&bytes)?;
        let (second, _) = split_text(rest)?;
        Ok((component(first)?, component(second)?))
    }
}

/// Splits bytes after the first text, which ends with a zero.
pub(super) fn split_text(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let text = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::EINVAL)?;
    Ok((text, &bytes[text.count_bytes() + 1..]))
}

/// A name that can only mean an entry of the directory it is looked up in.
pub(super) fn component(name: &CStr) -> Result<CString, Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::EINVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::EINVAL),
        bytes if bytes.len() > MAX_NAME => Err(Errno::ENAMETOOLONG),
        _ => Ok(name.to_owned()),
    }
}

impl Reply<'_> {
    /// Adds a structure.
    pub(super) fn object<T: ByteValued>(&mut self, object: &T) -> Result<(), Errno> {
        self.bytes(object.as_slice())
    }

    /// Adds bytes, all or none.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.len() > self.body.len() {
            return Err(Errno::EINVAL);
        }
        self.written += self.body.write(bytes);
        Ok(())
    }

    /// Adds up to `len` bytes of a file.
    pub(super) fn file(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        pace: Pace,
    ) -> Result<(), Errno> {
        self.body.truncate(len);
        let read = match pace {
            Pace::AtOnce => self.body.read_cached_file_at(file, offset),
            Pace::Any => self.body.read_file_at(file, offset),
        };
        self.written += read.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EINVAL))?;
        Ok(())
    }

    /// How many more bytes fit.
    pub(super) fn room(&self) -> usize {
        self.body.len()
    }

    /// Writes the header; returns how many bytes the reply has in all. Where not even a header fits the request
    /// stays without an answer.
    pub(super) fn finish(mut self, unique: u64, result: Result<(), Errno>) -> u32 {
        let (error, written) = match result {
            Ok(()) => (0, self.written),
            Err(errno) => (-(errno as i32), 0),
        };
        let len = (size_of::<OutHeader>() + written) as u32;
        let header = OutHeader { len, error, unique };
        if self.header.len() < size_of::<OutHeader>() {
            return 0;
        }
        self.header.write(header.as_slice());
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [c"", c".", c"..", c"/", c"a/b", c"../x", c"/etc"] {
            assert_eq!(component(name), Err(Errno::EINVAL), "{name:?}");
        }
        let long = CString::new(vec![b'a'; 256]).unwrap();
        assert_eq!(component(&long), Err(Errno::ENAMETOOLONG));
        for name in [c"a", c"...", c"..a", c"\xff\n", c" "] {
            assert_eq!(component(name).as_deref(), Ok(name));
        }
    }

    #[test]
    fn text_needs_its_end() {
        assert_eq!(split_text(b"ab\0cd"), Ok((c"ab", &b"cd"[..])));
        assert_eq!(split_text(b"abcd"), Err(Errno::EINVAL));
        assert_eq!(split_text(b""), Err(Errno::EINVAL));
    }
}
