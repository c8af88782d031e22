//! Requests about names: look one up, take it away, move it, read where it leads.

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{Attr, AttrOut, EntryOut, ForgetOne};
use nix::errno::Errno;
use nix::fcntl::{RenameFlags, readlinkat, renameat2};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::attributes::{attributes_on_wire, attributes_reply};
use super::inodes::Inode;
use super::notices::Subject;
use super::pins::{Node, open_name};
use super::server::FileServer;
use super::watches::Validity;
use super::{system, wire};

/// The most inodes that one BATCH_FORGET names.
const MAX_FORGET: u32 = 1 << 16;

impl FileServer {
    /// LOOKUP: what a name stands for. That there is nothing is worth remembering too: compilers and loaders try
    /// many places.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        let parent = self.node(parent)?;
        let valid = self.watched(&parent);
        match self.find_within(&parent, name, valid) {
            Ok((entry, Some(inode))) => Ok(self.watch_found(&inode).map_or(entry, |attributes| EntryOut {
                attr_valid: attributes.attr_valid,
                attr_valid_nsec: attributes.attr_valid_nsec,
                attr: Attr { flags: entry.attr.flags, ..attributes.attr },
                ..entry
            })),
            Ok((entry, None)) => Ok(entry),
            Err(Errno::ENOENT) => Ok(EntryOut {
                entry_valid: valid.seconds,
                entry_valid_nsec: valid.nanoseconds,
                ..Default::default()
            }),
            Err(errno) => Err(errno),
        }
    }

    /// Looks a name up that the server has made; what it stands for is remembered once more.
    pub(super) fn find_made(&self, parent: &Node, name: &CStr) -> Result<EntryOut, Errno> {
        self.hear_changes();
        let valid = self.watched(parent);
        self.find_within(parent, name, valid).map(|(entry, _)| entry)
    }

    /// Looks a name up; what it stands for is remembered once more. Whoever asks has the directory's validity from
    /// before. Returns also the inode, if it is a directory that could be watched and is not.
    pub(super) fn find_within(
        &self,
        parent: &Node,
        name: &CStr,
        valid: Validity,
    ) -> Result<(EntryOut, Option<Arc<Inode>>), Errno> {
        let status = system::attributes_at(parent.file.as_fd(), name)?;
        // Mostly it is known, and need not be opened.
        let (inode, status) = match self.remember_known(parent, name, &status) {
            Some(inode) => (inode, status),
            None => {
                let (node, status) = self.remember(open_name(&parent.file, name)?, Some((parent, name)))?;
                (node.inode, status)
            }
        };
        let attributes = self.watched_since(valid, inode.id);
        let entry = entry((&parent.inode, valid), (&inode, attributes), &status);
        let unwatched = inode.kind() == libc::S_IFDIR && attributes == Validity::SHORT;
        Ok((entry, Some(inode).filter(|_| unwatched)))
    }

    /// Watches a directory that the guest has come to; returns what it is like since.
    fn watch_found(&self, inode: &Arc<Inode>) -> Option<AttrOut> {
        let file = inode.pinned()?;
        let node = Node { inode: inode.clone(), file };
        let valid = self.watched(&node);
        attributes_reply(&node, valid).ok().filter(|_| valid != Validity::SHORT)
    }

    /// FORGET and BATCH_FORGET.
    pub(super) fn forget(&self, forgotten: ForgetOne) {
        self.inodes.forget(forgotten.nodeid, forgotten.nlookup);
        if self.inodes.get(forgotten.nodeid).is_err() {
            self.watches.forget(forgotten.nodeid);
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
        let removed = self.losing(&parent, name);
        unlinkat(&parent.file, name, how)?;
        if let Some(removed) = removed {
            removed.inode.lose_place();
        }
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
        // What is moved is in use, too: it is nowhere until its new place is remembered.
        let (_moved, replaced) = (self.losing(&from, old), self.losing(&to, new));
        renameat2(&from.file, old, &to.file, new, flags)?;
        if let Some(replaced) = replaced {
            replaced.inode.lose_place();
        }
        self.unsynced.add(&from);
        self.unsynced.add(&to);
        self.moved((&from, old), (&to, new));
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            self.moved((&to, new), (&from, old));
        }
        // The guest takes what it believes of a name along to the other directory, which nobody may watch.
        for (directory, name) in [(&from, old), (&to, new)] {
            self.notices.give(Subject::Name(directory.inode.id, name.to_bytes()));
        }
        Ok(())
    }

    /// READLINK.
    pub(super) fn read_link(&self, id: u64) -> Result<CString, Errno> {
        let target = readlinkat(&self.node(id)?.file, c"")?;
        CString::new(target.as_bytes()).map_err(|_| Errno::EIO)
    }
}

/// An entry of a directory as the guest is told of it: how long the name is valid, and how long what it stands for.
pub(super) fn entry(
    (parent, name_valid): (&Inode, Validity),
    (inode, valid): (&Inode, Validity),
    status: &libc::statx,
) -> EntryOut {
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
        entry_valid: name_valid.seconds,
        attr_valid: valid.seconds,
        entry_valid_nsec: name_valid.nanoseconds,
        attr_valid_nsec: valid.nanoseconds,
        attr,
    }
}
