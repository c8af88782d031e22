//! How an inode is reached: by the descriptor that pins it, or by the names that lead to it.
//!
//! An inode that is not in use may be released, provided that it is still found where it was seen last. When the
//! guest comes back to it, it is looked up there and recognized by its identity. Should the host have moved or
//! replaced it meanwhile, the guest hears `ESTALE`, upon which its kernel looks the path up anew. Inodes with open
//! files stay pinned: theirs can lose their last name and must work all the same.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::inodes::{Identity, Inode};
use super::server::FileServer;
use super::system;

/// How many directories on the way to an inode may have to be pinned again.
const MAX_DEPTH: usize = 4096;
/// How many inodes are released at a time.
const MAX_RELEASES: usize = 8;

/// An inode that can be worked with.
#[derive(Debug)]
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
            file = self.inodes.pin(&inode, find(&file, &inode)?);
        }
        Ok(file)
    }

    /// The inode that the guest is told of, which was seen under a name if that is given.
    pub(super) fn remember(
        &self,
        file: OwnedFd,
        seen: Option<(u64, &CStr)>,
    ) -> Result<(Arc<Inode>, libc::statx), Errno> {
        // First, because it may make the room that is needed.
        self.release_superfluous();
        let status = system::attributes(file.as_fd())?;
        let identity = Identity::from(&status);
        let inode = self.inodes.remember(file, identity)?;
        if let Some((parent, name)) = seen {
            self.inodes.seen_at(&identity, parent, name);
        }
        Ok((inode, status))
    }

    /// What the guest has under this name was elsewhere before.
    pub(super) fn moved(&self, parent: &Node, name: &CStr) {
        // If it is gone already, another request will find that out.
        let status = open_name(&parent.file, name).and_then(|file| system::attributes(file.as_fd()));
        if let Ok(status) = status {
            self.inodes.seen_at(&Identity::from(&status), parent.inode.id, name);
        }
    }

    /// Releases inodes if too many are pinned: a few at a time, but more than one request adds.
    fn release_superfluous(&self) {
        for _ in 0..MAX_RELEASES {
            let Some(inode) = self.inodes.superfluous() else { return };
            let parent = inode.place().and_then(|place| self.inodes.get(place.parent).ok());
            let found = parent.is_some_and(|parent| {
                self.pin_again(&parent).and_then(|parent| find(&parent, &inode)).is_ok()
            });
            self.inodes.release(&inode, found);
        }
    }
}

/// Opens an inode where it was seen last, if it is there.
fn find(parent: &OwnedFd, inode: &Inode) -> Result<OwnedFd, Errno> {
    let place = inode.place().ok_or(Errno::ESTALE)?;
    let file = match open_name(parent, &place.name) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => Err(Errno::ESTALE),
        result => result,
    }?;
    let identity = Identity::from(&system::attributes(file.as_fd())?);
    if identity == inode.identity() { Ok(file) } else { Err(Errno::ESTALE) }
}

/// Opens what a name stands for, as a mere reference: nothing is followed and nothing is opened for use.
pub(super) fn open_name(parent: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}
