//! `sync(2)` in the guest.
//!
//! Nothing waits in this server to be written, but what it wrote waits in the host's page cache, and who calls
//! `sync` wants it to survive a power failure. To sync the host's file system would do that, and write out what all
//! other containers and the host have pending as well, which can take minutes. So the files and directories are
//! remembered that the guest changed since it synced last, and only these are synced; where they are many, the file
//! system is after all, since it costs less then.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{fsync, syncfs};

use super::inodes::{ROOT, lock};
use super::pins::Node;
use super::server::FileServer;
use super::system;

/// What the guest changed and did not sync since. It pins them.
#[derive(Debug)]
pub(super) struct Unsynced {
    limit: usize,
    changed: Mutex<Changed>,
    /// Held while a sync is under way: another one has to wait for it, though it finds nothing to do.
    syncing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Changed {
    nodes: HashMap<u64, Node>,
    /// One inode of each mount that has more changed ones than are remembered.
    mounts: HashMap<u64, Node>,
}

/// As long as it lives, an inode is being changed. Only what was changed by then counts as such: a sync in the
/// meantime may have missed it.
#[must_use]
pub(super) struct Changing<'n> {
    unsynced: &'n Unsynced,
    node: &'n Node,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.unsynced.add(self.node);
    }
}

impl Unsynced {
    /// None yet, and up to `limit` that are to be synced one by one.
    pub(super) fn new(limit: usize) -> Unsynced {
        Unsynced { limit, changed: Mutex::default(), syncing: Mutex::default() }
    }

    /// An inode will be changed as long as the result lives.
    pub(super) fn changing<'n>(&'n self, node: &'n Node) -> Changing<'n> {
        Changing { unsynced: self, node }
    }

    /// An inode was changed, or its entries were.
    pub(super) fn add(&self, node: &Node) {
        if !matches!(node.inode.kind(), libc::S_IFREG | libc::S_IFDIR) {
            return;
        }
        let mut changed = lock(&self.changed);
        if changed.nodes.contains_key(&node.inode.id) || changed.mounts.contains_key(&node.inode.mount()) {
            return;
        }
        if changed.nodes.len() < self.limit {
            changed.nodes.insert(node.inode.id, node.clone());
        } else {
            changed.mounts.insert(node.inode.mount(), node.clone());
        }
    }

    /// Takes an inode away, and tells whether it stood for its mount.
    fn remove(&self, id: u64) -> bool {
        let mut changed = lock(&self.changed);
        let before = changed.mounts.len();
        changed.nodes.remove(&id);
        changed.mounts.retain(|_, node| node.inode.id != id);
        changed.mounts.len() < before
    }

    fn node(&self, id: u64) -> Option<Node> {
        let changed = lock(&self.changed);
        let mut mounts = changed.mounts.values();
        changed.nodes.get(&id).or_else(|| mounts.find(|node| node.inode.id == id)).cloned()
    }

    fn add_mount(&self, node: &Node) {
        lock(&self.changed).mounts.entry(node.inode.mount()).or_insert_with(|| node.clone());
    }

    /// Forgets all of it.
    pub(super) fn clear(&self) {
        self.take();
    }

    fn take(&self) -> Changed {
        std::mem::take(&mut lock(&self.changed))
    }

    /// How many inodes are remembered.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let changed = lock(&self.changed);
        changed.nodes.len() + changed.mounts.len()
    }
}

impl FileServer {
    /// SYNCFS, of all mounts at once. Reports the first error after having tried everything.
    pub(super) fn sync_all(&self) -> Result<(), Errno> {
        let _syncing = lock(&self.unsynced.syncing);
        let Changed { nodes, mounts } = self.unsynced.take();
        let whole = mounts.values().map(|node| syncfs(self.open_to_sync(node)?.as_fd()));
        let files = nodes.values().filter(|node| !mounts.contains_key(&node.inode.mount()));
        let files = files.map(|node| fsync(self.open_to_sync(node)?.as_fd()));
        // Some file systems have nothing to sync.
        let results: Vec<_> = whole.chain(files).filter(|result| *result != Err(Errno::EINVAL)).collect();
        results.into_iter().collect()
    }

    /// The guest has forgotten an inode. If it has no names left either, nothing of it has to last, and the space
    /// that it takes is to be free.
    pub(super) fn forget_unsynced(&self, id: u64) {
        let Some(node) = self.unsynced.node(id) else { return };
        let status = system::attributes(node.file.as_fd());
        if !status.is_ok_and(|status| status.stx_nlink == 0) || !self.unsynced.remove(id) {
            return;
        }
        // Something else has to stand for its mount.
        let parent = node.inode.place().map_or(ROOT, |place| place.parent);
        let others = [parent, ROOT].into_iter().filter_map(|id| self.node(id).ok());
        if let Some(other) = others.into_iter().find(|other| other.inode.mount() == node.inode.mount()) {
            self.unsynced.add_mount(&other);
        }
    }

    fn open_to_sync(&self, node: &Node) -> Result<OwnedFd, Errno> {
        // To sync a file any descriptor will do. Not everybody may read a file that they may write.
        self.open_inode(node, OFlag::O_RDONLY).or_else(|_| self.open_inode(node, OFlag::O_WRONLY))
    }
}
