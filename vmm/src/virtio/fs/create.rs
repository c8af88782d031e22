//! Requests that create something. It belongs to the user and group of the request from the start.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, EntryOut, InHeader, MkdirIn, MknodIn, OpenOut};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
use nix::unistd::{linkat, symlinkat};

use super::files::open_flags;
use super::names::entry;
use super::pins::Node;
use super::server::{FileServer, descriptor_path};
use super::thread::Owner;
use super::watches::Validity;
use super::wire;

impl FileServer {
    /// MKDIR.
    pub(super) fn make_directory(
        &self,
        who: &InHeader,
        name: &CStr,
        how: MkdirIn,
    ) -> Result<EntryOut, Errno> {
        let parent = self.node(who.nodeid)?;
        let owner = Owner::assume(who.uid, who.gid, how.umask)?;
        mkdirat(&parent.file, name, mode(how.mode))?;
        drop(owner);
        self.unsynced.add(&parent);
        self.find_made(&parent, name)
    }

    /// MKNOD: a file, FIFO, socket or device node. The node of a device is only a name here: nothing on the host
    /// opens it on behalf of the guest.
    pub(super) fn make_node(&self, who: &InHeader, name: &CStr, how: MknodIn) -> Result<EntryOut, Errno> {
        let parent = self.node(who.nodeid)?;
        let kind = SFlag::from_bits_truncate(how.mode & libc::S_IFMT);
        let owner = Owner::assume(who.uid, who.gid, how.umask)?;
        mknodat(&parent.file, name, kind, mode(how.mode), how.rdev.into())?;
        drop(owner);
        self.unsynced.add(&parent);
        self.find_made(&parent, name)
    }

    /// SYMLINK.
    pub(super) fn make_link(&self, who: &InHeader, name: &CStr, target: &CStr) -> Result<EntryOut, Errno> {
        let parent = self.node(who.nodeid)?;
        let owner = Owner::assume(who.uid, who.gid, 0)?;
        symlinkat(target, &parent.file, name)?;
        drop(owner);
        self.unsynced.add(&parent);
        self.find_made(&parent, name)
    }

    /// LINK.
    pub(super) fn link(&self, id: u64, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        let (node, parent) = (self.node(id)?, self.node(parent)?);
        // By this path the link is followed to the inode and no further, symbolic link or not.
        let path = descriptor_path(&node.file);
        linkat(&self.descriptors, path.as_c_str(), &parent.file, name, AtFlags::AT_SYMLINK_FOLLOW)?;
        // What has a new name is in the upper layer now, if there are any, and will not part again. The change that a
        // symbolic link has had by this makes it no other one.
        self.follow(&node.inode);
        self.unsynced.add(&parent);
        self.find_made(&parent, name)
    }

    /// CREATE: makes a file and opens it. Where it came into being since the guest looked, it is opened.
    pub(super) fn create(
        &self,
        who: &InHeader,
        name: &CStr,
        how: CreateIn,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let parent = self.node(who.nodeid)?;
        let new = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let owner = Owner::assume(who.uid, who.gid, how.umask)?;
        let created = openat(&parent.file, name, open_flags(how.flags) | new, mode(how.mode));
        drop(owner);
        match created {
            Ok(file) => {
                self.unsynced.add(&parent);
                self.created(&parent, file, Some(name))
            }
            Err(Errno::EEXIST) if how.flags & libc::O_EXCL as u32 == 0 => {
                let entry = self.find_made(&parent, name)?;
                let opened = self.open(entry.nodeid, how.flags, how.fuse_flags);
                let opened = opened.inspect_err(|_| self.inodes.forget(entry.nodeid, 1))?;
                Ok((entry, opened))
            }
            Err(errno) => Err(errno),
        }
    }

    /// TMPFILE: makes a file without a name and opens it.
    pub(super) fn create_unnamed(&self, who: &InHeader, how: CreateIn) -> Result<(EntryOut, OpenOut), Errno> {
        let parent = self.node(who.nodeid)?;
        let unnamed = OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
        let owner = Owner::assume(who.uid, who.gid, how.umask)?;
        let file = openat(&parent.file, c".", open_flags(how.flags) | unnamed, mode(how.mode))?;
        drop(owner);
        self.created(&parent, file, None)
    }

    /// The reply for a new file. It is found by the open file and not by its name, which may mean something else
    /// by now.
    fn created(
        &self,
        parent: &Node,
        file: OwnedFd,
        name: Option<&CStr>,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let seen = name.map(|name| (parent, name));
        self.hear_changes();
        let valid = self.watched(parent);
        let (node, status) = self.remember(self.reopen(&file, OFlag::O_PATH)?, seen)?;
        let fh = self.handles.insert(&node, file).inspect_err(|_| self.inodes.forget(node.inode.id, 1))?;
        let opened = OpenOut { fh, open_flags: wire::FOPEN_KEEP_CACHE, ..Default::default() };
        self.unsynced.add(&node);
        Ok((entry((&parent.inode, valid), (&node.inode, Validity::SHORT), &status), opened))
    }
}

/// The permissions of something new, before the umask.
fn mode(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode)
}
