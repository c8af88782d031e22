//! How an inode is reached: by the descriptor that pins it, or by the names that lead to it.
//!
//! An inode that is not in use may be released, provided that it is still found where it was seen last. When the
//! guest comes back to it, it is looked up there and recognized by its identity. Should the host have moved or
//! replaced it meanwhile, the guest hears `ESTALE`, upon which its kernel looks the path up anew. Inodes with open
//! files stay pinned: theirs can lose their last name and must work all the same. So do those that lose a name by the
//! guest's own doing: it may read on in them without having opened them.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::identity::{Identity, Link};
use super::inodes::Inode;
use super::server::FileServer;
use super::system;

/// How many directories on the way to an inode may have to be pinned again.
const MAX_DEPTH: usize = 4096;
/// How many inodes are released at a time.
const MAX_RELEASES: usize = 8;

/// An inode that can be worked with.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// The inode.
    pub(super) inode: Arc<Inode>,
    /// The same, opened with `O_PATH`, and pinned as long as this is kept.
    pub(super) file: Arc<OwnedFd>,
}

impl FileServer {
    /// The inode of a number that the guest was told.
    pub(super) fn node(&self, id: u64) -> Result<Node, Errno> {
        let inode = self.inodes.get(id)?;
        if let Some(file) = inode.pinned() {
            return Ok(Node { inode, file });
        }
        let file = self.pin_again(&inode)?;
        self.release_superfluous();
        Ok(Node { inode, file })
    }

    /// Finds an inode that was released, and the directories on the way to it that were.
    fn pin_again(&self, inode: &Arc<Inode>) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(file) = inode.pinned() {
            return Ok(file);
        }
        let mut released = vec![inode.clone()];
        let mut file = loop {
            let place = released.last().and_then(|inode| inode.place()).ok_or(Errno::ESTALE)?;
            let parent = self.inodes.get(place.parent)?;
            match parent.pinned() {
                Some(file) => break file,
                None if released.len() == MAX_DEPTH => return Err(Errno::ESTALE),
                None => released.push(parent),
            }
        };
        while let Some(inode) = released.pop() {
            file = self.inodes.pin(&inode, self.find_again(&file, &inode)?);
        }
        Ok(file)
    }

    /// The inode that the guest is told of, which was seen under a name if that is given.
    pub(super) fn remember(
        &self,
        file: OwnedFd,
        seen: Option<(&Node, &CStr)>,
    ) -> Result<(Node, libc::statx), Errno> {
        // First, because it may make the room that is needed.
        self.release_superfluous();
        let status = system::attributes(file.as_fd())?;
        let identity = self.named(self.mounts.identify_file(file.as_fd(), &status), &status, seen);
        let node = self.inodes.remember(file, identity.clone())?;
        if let Some((parent, name)) = seen {
            self.inodes.seen_at(&identity, parent.inode.id, name);
        }
        Ok((node, status))
    }

    /// The inode of these attributes, if it is known. The guest is told of it, and of this name.
    pub(super) fn remember_known(
        &self,
        parent: &Node,
        name: &CStr,
        status: &libc::statx,
    ) -> Option<Arc<Inode>> {
        let identity = self.named(self.mounts.identify(status)?, status, Some((parent, name)));
        let inode = self.inodes.remember_known(&identity)?;
        self.inodes.seen_at(&identity, parent.inode.id, name);
        Some(inode)
    }

    /// What a name stands for, pinned, if the guest knows it, for who is about to take the name away.
    pub(super) fn losing(&self, parent: &Node, name: &CStr) -> Option<Node> {
        let status = system::attributes_at(parent.file.as_fd(), name).ok()?;
        let identity = self.named(self.mounts.identify(&status)?, &status, Some((parent, name)));
        let inode = self.inodes.find(&identity)?;
        self.inodes.seen_at(&identity, parent.inode.id, name);
        let file = match inode.pinned() {
            Some(file) => file,
            // A guest that removes much and forgets nothing has to look it up anew.
            None if !self.inodes.has_room() => return None,
            None => self.inodes.pin(&inode, self.find_again(&parent.file, &inode).ok()?),
        };
        Some(Node { inode, file })
    }

    /// The identity of a file that was seen under a name, with this name if it must be a part of it.
    fn named(&self, plain: Identity, status: &libc::statx, seen: Option<(&Node, &CStr)>) -> Identity {
        let Some((parent, name)) = seen.filter(|_| plain.kind != libc::S_IFDIR) else { return plain };
        let link = Link::new(&parent.inode.identity(), name);
        if let Some(inode) = self.inodes.linked(&link) {
            self.follow(&inode);
        }
        // A file that is known without a name had only one, or got more in the upper layer. Those stay together.
        match self.mounts.may_part(status) && self.inodes.find(&plain).is_none() {
            true => plain.with_link(link),
            false => plain,
        }
    }

    /// Notices that a file which is known by one name alone was copied to the upper layer, and is on its own; or that the
    /// guest itself has changed a symbolic link, which leads where it led.
    pub(super) fn follow(&self, inode: &Inode) {
        let known = inode.identity();
        let file = inode.pinned().filter(|_| known.link.is_some() || inode.kind() == libc::S_IFLNK);
        let Some(file) = file else { return };
        let Ok(status) = system::attributes(file.as_fd()) else { return };
        let now = self.mounts.identify_file(file.as_fd(), &status);
        if !now.is_same_file(&known) {
            self.inodes.rename(inode, now);
        }
    }

    /// What the guest has under the name `to` was elsewhere before.
    pub(super) fn moved(&self, from: (&Node, &CStr), to: (&Node, &CStr)) {
        // To move a file is to copy it to the upper layer.
        if let Some(inode) = self.inodes.linked(&Link::new(&from.0.inode.identity(), from.1)) {
            self.follow(&inode);
        }
        // If it is gone already, another request will find that out.
        let status = system::attributes_at(to.0.file.as_fd(), to.1);
        let found = status.ok().and_then(|status| Some((self.mounts.identify(&status)?, status)));
        if let Some((identity, status)) = found {
            self.inodes.seen_at(&self.named(identity, &status, Some(to)), to.0.inode.id, to.1);
        }
    }

    /// Releases inodes if too many are pinned: a few at a time, but more than one request adds.
    fn release_superfluous(&self) {
        for _ in 0..MAX_RELEASES {
            let Some(inode) = self.inodes.superfluous() else { return };
            let parent = inode.place().and_then(|place| self.inodes.get(place.parent).ok());
            let found = parent.is_some_and(|parent| {
                self.pin_again(&parent).and_then(|parent| self.find_again(&parent, &inode)).is_ok()
            });
            self.inodes.release(&inode, found);
        }
    }

    /// Opens an inode where it was seen last, if it is there.
    fn find_again(&self, parent: &OwnedFd, inode: &Inode) -> Result<OwnedFd, Errno> {
        let place = inode.place().ok_or(Errno::ESTALE)?;
        let file = match open_name(parent, &place.name) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => Err(Errno::ESTALE),
            result => result,
        }?;
        let identity = self.mounts.identify_file(file.as_fd(), &system::attributes(file.as_fd())?);
        // An inode that is known by a name has not been seen at any other place.
        if identity.is_same_file(&inode.identity()) { Ok(file) } else { Err(Errno::ESTALE) }
    }
}

/// Opens what a name stands for, as a mere reference: nothing is followed and nothing is opened for use.
pub(super) fn open_name(parent: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}
