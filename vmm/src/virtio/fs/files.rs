//! Requests about the contents of files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::SystemTime;

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, FallocateIn, FsyncIn, LseekIn, LseekOut, OpenOut, ReadIn, WriteIn, WriteOut,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, copy_file_range, fallocate};
use nix::unistd::{Whence, fdatasync, fsync, lseek};

use super::handles::{Handle, UNOPENED};
use super::identity::Version;
use super::message::{MAX_READ, MAX_WRITE, Reply};
use super::pace::{Pace, waits_for_disk};
use super::pins::Node;
use super::server::FileServer;
use super::{system, wire};
use crate::virtio::buffers::GuestBuffers;

/// The most bytes that one COPY_FILE_RANGE copies, so that other requests get their turn.
const MAX_COPY: u64 = 16 << 20;

/// The flags of a file opened by the guest that matter on the host. `O_APPEND` comes with each write, and would
/// spoil writes from a shared mapping here. `O_DIRECT` is about the guest's cache; the host's stays in use.
pub(super) fn open_flags(flags: u32) -> OFlag {
    let kept = OFlag::O_ACCMODE | OFlag::O_TRUNC | OFlag::O_SYNC | OFlag::O_DSYNC | OFlag::O_NOATIME;
    OFlag::from_bits_truncate(flags as i32) & kept
}

impl FileServer {
    /// OPEN.
    pub(super) fn open(&self, id: u64, flags: u32, fuse_flags: u32) -> Result<OpenOut, Errno> {
        let node = self.node(id)?;
        if node.inode.kind() != libc::S_IFREG {
            return Err(Errno::EPERM);
        }
        let flags = open_flags(flags);
        let truncated_by_user = flags.contains(OFlag::O_TRUNC) && fuse_flags & wire::OPEN_KILL_SUIDGID != 0;
        let unprivileged = match truncated_by_user {
            true => self.unprivileged(&node.file)?,
            false => None,
        };
        let file = match flags & (OFlag::O_ACCMODE | OFlag::O_TRUNC) == OFlag::O_RDONLY {
            true => self.open_to_read(&node, flags)?,
            false => {
                // All that the guest writes would be an event.
                self.watches.lose(id, &self.notices);
                self.open_inode(&node, flags)?
            }
        };
        drop(unprivileged);
        if flags.contains(OFlag::O_TRUNC) {
            self.unsynced.add(&node);
        }
        let version = Version::of(&system::attributes(node.file.as_fd())?, SystemTime::now());
        let keep = node.inode.unchanged_since_last_open(version);
        let fh = self.handles.insert(&node, file)?;
        let open_flags = if keep { wire::FOPEN_KEEP_CACHE } else { 0 };
        Ok(OpenOut { fh, open_flags, ..Default::default() })
    }

    fn open_to_read(&self, node: &Node, flags: OFlag) -> Result<OwnedFd, Errno> {
        self.watches.open_to_read(node.inode.id, &self.notices, |more| self.open_inode(node, flags | more))
    }

    /// The file of a request that reads. The guest need not have opened one that it knows not to have changed, see
    /// [`super::watches`]: all of it is in its cache mostly, or comes there by one request.
    fn readable(&self, id: u64, number: u64) -> Result<Arc<Handle>, Errno> {
        if number != UNOPENED {
            return self.handles.get(number, id);
        }
        let node = self.node(id)?;
        if node.inode.kind() != libc::S_IFREG {
            return Err(Errno::EBADF);
        }
        let file = self.open_to_read(&node, OFlag::O_RDONLY)?;
        Ok(Arc::new(Handle::new(node, file)))
    }

    /// READ.
    pub(super) fn read(&self, id: u64, what: ReadIn, reply: &mut Reply<'_>, pace: Pace) -> Result<(), Errno> {
        let handle = self.readable(id, what.fh)?;
        reply.file(handle.file.as_fd(), what.offset, what.size.min(MAX_READ) as usize, pace)
    }

    /// WRITE.
    pub(super) fn write(
        &self,
        id: u64,
        what: WriteIn,
        data: &mut GuestBuffers<'_>,
        pace: Pace,
    ) -> Result<WriteOut, Errno> {
        if pace == Pace::AtOnce && waits_for_disk(what.flags) {
            return Err(Errno::EAGAIN);
        }
        if what.size > MAX_WRITE || data.len() != what.size as usize {
            return Err(Errno::EINVAL);
        }
        let handle = self.handles.get(what.fh, id)?;
        let _changing = self.unsynced.changing(&handle.node);
        let _unprivileged = match what.fuse_flags & wire::WRITE_KILL_SUIDGID != 0 {
            true => self.unprivileged(&handle.file)?,
            false => None,
        };
        // A write from a shared mapping has its place in the file, whatever the file was opened for.
        let mapped = what.fuse_flags & wire::WRITE_CACHE != 0;
        let written = match what.flags & libc::O_APPEND as u32 != 0 && !mapped {
            true => data.append_file(handle.file.as_fd()),
            false => data.write_file_at(handle.file.as_fd(), what.offset),
        };
        let written = written.map_err(|error| Errno::try_from(error).unwrap_or(Errno::EINVAL))?;
        Ok(WriteOut { size: written as u32, padding: 0 })
    }

    /// RELEASE and RELEASEDIR.
    pub(super) fn release(&self, number: u64) -> Result<(), Errno> {
        self.handles.remove(number)
    }

    /// FSYNC and FSYNCDIR.
    pub(super) fn sync(&self, id: u64, what: FsyncIn) -> Result<(), Errno> {
        let handle = self.readable(id, what.fh)?;
        match what.fsync_flags & wire::FSYNC_DATA_ONLY != 0 {
            true => fdatasync(&handle.file),
            false => fsync(&handle.file),
        }
    }

    /// FALLOCATE.
    pub(super) fn allocate(&self, id: u64, what: FallocateIn) -> Result<(), Errno> {
        let handle = self.handles.get(what.fh, id)?;
        let mode = FallocateFlags::from_bits(what.mode as i32).ok_or(Errno::EOPNOTSUPP)?;
        let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::EFBIG);
        let _changing = self.unsynced.changing(&handle.node);
        // The request does not tell whether the caller may keep set-user-ID bits, so nobody may.
        let _unprivileged = self.unprivileged(&handle.file)?;
        fallocate(&handle.file, mode, signed(what.offset)?, signed(what.length)?)
    }

    /// LSEEK: where data or holes are. Other positions are the guest's business.
    pub(super) fn seek(&self, id: u64, what: LseekIn) -> Result<LseekOut, Errno> {
        let handle = self.readable(id, what.fh)?;
        let whence = match what.whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL),
        };
        let offset = i64::try_from(what.offset).map_err(|_| Errno::ENXIO)?;
        // Directories keep their position between requests.
        let mut position = super::inodes::lock(&handle.position);
        let offset = lseek(&handle.file, offset, whence)? as u64;
        *position = offset;
        Ok(LseekOut { offset })
    }

    /// COPY_FILE_RANGE: copies within the host, less than asked for where that is much.
    pub(super) fn copy(&self, id: u64, what: CopyFileRangeIn) -> Result<WriteOut, Errno> {
        let from = self.readable(id, what.fh_in)?;
        let to = self.handles.get(what.fh_out, what.nodeid_out)?;
        let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::EFBIG);
        let (mut source, mut target) = (signed(what.offset_in)?, signed(what.offset_out)?);
        let len = what.len.min(MAX_COPY) as usize;
        let _changing = self.unsynced.changing(&to.node);
        let _unprivileged = self.unprivileged(&to.file)?;
        let copied = copy_file_range(&from.file, Some(&mut source), &to.file, Some(&mut target), len)?;
        Ok(WriteOut { size: copied as u32, padding: 0 })
    }
}
