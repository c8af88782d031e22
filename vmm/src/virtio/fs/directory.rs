//! Requests about the entries of a directory.

use std::ffi::CStr;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::{Dirent, EntryOut, OpenOut, ReadIn};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};
use vm_memory::ByteValued;

use super::inodes::lock;
use super::message::Reply;
use super::pins::Node;
use super::server::FileServer;
use super::system;
use super::watches::Validity;

/// Where the name is in a `linux_dirent64`.
const NAME_OFFSET: usize = 19;
/// Room for at least one entry, with the longest name.
const MIN_ENTRIES: usize = 512;
/// The most bytes of entries that are read at once.
const MAX_ENTRIES: usize = 64 << 10;

/// An entry as the host has it.
struct HostEntry<'b> {
    inode: u64,
    /// Where the next one is.
    next: u64,
    kind: u8,
    name: &'b CStr,
}

impl FileServer {
    /// OPENDIR.
    pub(super) fn open_directory(&self, id: u64) -> Result<OpenOut, Errno> {
        let node = self.node(id)?;
        if node.inode.kind() != libc::S_IFDIR {
            return Err(Errno::ENOTDIR);
        }
        let file = self.open_inode(&node, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        Ok(OpenOut { fh: self.handles.insert(&node, file)?, ..Default::default() })
    }

    /// READDIR, and READDIRPLUS, which looks every entry up at once.
    pub(super) fn read_directory(
        &self,
        id: u64,
        what: ReadIn,
        plus: bool,
        reply: &mut Reply<'_>,
    ) -> Result<(), Errno> {
        let directory = self.node(id)?;
        let handle = self.handles.get(what.fh, id)?;
        let room = reply.room().min(what.size as usize);
        // With attributes an entry takes several times the space that it has here, and what does not fit is read
        // again next time.
        let wanted = if plus { room / 4 } else { room };
        let mut buffer = vec![0; wanted.clamp(MIN_ENTRIES, MAX_ENTRIES)];
        let mut position = lock(&handle.position);
        if *position != what.offset {
            let offset = i64::try_from(what.offset).map_err(|_| Errno::EINVAL)?;
            lseek(&handle.file, offset, Whence::SeekSet)?;
        }
        // Until all is done the position is unknown.
        *position = u64::MAX;
        let read = system::directory_entries(handle.file.as_fd(), &mut buffer)?;
        let full = reply.room() - room;
        let valid = if plus { self.watched(&directory) } else { Validity::SHORT };
        let mut end = what.offset;
        for (count, entry) in host_entries(&buffer[..read]).enumerate() {
            if reply.room() - full < wire_len(&entry, plus) {
                // Nothing in a reply means the end of the directory.
                return if count == 0 { Err(Errno::EINVAL) } else { Ok(()) };
            }
            if plus {
                reply.object(&self.attributes_of(&directory, &entry, valid))?;
            }
            add(reply, &entry)?;
            end = entry.next;
        }
        *position = end;
        Ok(())
    }

    /// What READDIRPLUS tells of an entry. Of "." and "..", and of what is gone since, nothing but the name.
    fn attributes_of(&self, directory: &Node, entry: &HostEntry<'_>, valid: Validity) -> EntryOut {
        match entry.name.to_bytes() {
            b"." | b".." => EntryOut::default(),
            _ => self.find_within(directory, entry.name, valid).map(|(entry, _)| entry).unwrap_or_default(),
        }
    }
}

fn wire_len(entry: &HostEntry<'_>, plus: bool) -> usize {
    let attributes = if plus { size_of::<EntryOut>() } else { 0 };
    attributes + (size_of::<Dirent>() + entry.name.count_bytes()).next_multiple_of(8)
}

fn add(reply: &mut Reply<'_>, entry: &HostEntry<'_>) -> Result<(), Errno> {
    let name = entry.name.to_bytes();
    let header =
        Dirent { ino: entry.inode, off: entry.next, namelen: name.len() as u32, type_: entry.kind.into() };
    let padding = name.len().next_multiple_of(8) - name.len();
    let mut bytes = Vec::with_capacity(wire_len(entry, false));
    bytes.extend_from_slice(header.as_slice());
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(&[0; 8][..padding]);
    reply.bytes(&bytes)
}

/// The entries in what `getdents64(2)` returned.
fn host_entries(mut bytes: &[u8]) -> impl Iterator<Item = HostEntry<'_>> {
    std::iter::from_fn(move || {
        let (inode, rest) = bytes.split_first_chunk::<8>()?;
        let (next, rest) = rest.split_first_chunk::<8>()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let kind = *rest.first()?;
        let len = usize::from(u16::from_ne_bytes(*len));
        let name = CStr::from_bytes_until_nul(bytes.get(NAME_OFFSET..len)?).ok()?;
        bytes = &bytes[len..];
        Some(HostEntry { inode: u64::from_ne_bytes(*inode), next: u64::from_ne_bytes(*next), kind, name })
    })
}
