//! Requests about names: look one up, take it away, move it, read where it leads.

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, ForgetOne};
use nix::errno::Errno;
use nix::fcntl::{RenameFlags, readlinkat, renameat2};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::attributes::attributes_on_wire;
use super::inodes::Inode;
use super::pins::{Node, open_name};
use super::server::FileServer;
use super::{VALIDITY, system, wire};

/// The most inodes that one BATCH_FORGET names.
const MAX_FORGET: u32 = 1 << 16;

impl FileServer {
    /// LOOKUP: what a name stands for. That there is nothing is worth remembering too: compilers and loaders try
    /// many places.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        let parent = self.node(parent)?;
        match self.find(&parent, name) {
            Err(Errno::ENOENT) => {
                Ok(EntryOut { entry_valid_nsec: VALIDITY.subsec_nanos(), ..Default::default() })
            }
            result => result,
        }
    }

    /// Looks a name up; what it stands for is remembered once more.
    pub(super) fn find(&self, parent: &Node, name: &CStr) -> Result<EntryOut, Errno> {
        let status = system::attributes_at(parent.file.as_fd(), name)?;
        // Mostly it is known, and need not be opened.
        if let Some(inode) = self.remember_known(parent, name, &status) {
            return Ok(entry(&parent.inode, &inode, &status));
        }
        let file = open_name(&parent.file, name)?;
        let (node, status) = self.remember(file, Some((parent, name)))?;
        Ok(entry(&parent.inode, &node.inode, &status))
    }

    /// FORGET and BATCH_FORGET.
    pub(super) fn forget(&self, forgotten: ForgetOne) {
        self.inodes.forget(forgotten.nodeid, forgotten.nlookup);
        if self.inodes.get(forgotten.nodeid).is_err() {
            self.forget_unsynced(forgotten.nodeid);
        }
    }

    /// How many inodes a BATCH_FORGET may name.
    pub(super) fn forget_count(&self, count: u32) -> u32 {
        count.min(MAX_FORGET)
    }

    /// UNLINK and RMDIR.
    pub(super) fn unlink(&self, parent: u64, name: &CStr, how: UnlinkatFlags) -> Result<(), Errno> {
        let parent = self.node(parent)?;
        unlinkat(&parent.file, name, how)?;
        self.unsynced.add(&parent);
        Ok(())
    }

    /// RENAME and RENAME2.
    pub(super) fn rename(
        &self,
        (from, old): (u64, &CStr),
        (to, new): (u64, &CStr),
        flags: u32,
    ) -> Result<(), Errno> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        let (from, to) = (self.node(from)?, self.node(to)?);
        renameat2(&from.file, old, &to.file, new, flags)?;
        self.unsynced.add(&from);
        self.unsynced.add(&to);
        self.moved((&from, old), (&to, new));
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            self.moved((&to, new), (&from, old));
        }
        Ok(())
    }

    /// READLINK.
    pub(super) fn read_link(&self, id: u64) -> Result<CString, Errno> {
        let target = readlinkat(&self.node(id)?.file, c"")?;
        CString::new(target.as_bytes()).map_err(|_| Errno::EIO)
    }
}

/// An entry of a directory as the guest is told of it.
pub(super) fn entry(parent: &Inode, inode: &Inode, status: &libc::statx) -> EntryOut {
    let mut attr = attributes_on_wire(status);
    // The guest mounts what is mounted here as well, so that numbers of inodes stay unique on each `st_dev`, a
    // rename across is refused as it must be, and `df` shows each volume.
    if inode.kind() == libc::S_IFDIR && inode.crosses_mount(parent) {
        attr.flags |= wire::ATTR_SUBMOUNT;
    }
    EntryOut {
        nodeid: inode.id,
        // Numbers are never used twice, so there is one generation.
        generation: 0,
        entry_valid: VALIDITY.as_secs(),
        attr_valid: VALIDITY.as_secs(),
        entry_valid_nsec: VALIDITY.subsec_nanos(),
        attr_valid_nsec: VALIDITY.subsec_nanos(),
        attr,
    }
}
