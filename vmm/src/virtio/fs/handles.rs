//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::inodes::lock;
use super::pins::Node;

/// The number of files that the guest reads without having opened them. The table has none of that number.
pub(super) const UNOPENED: u64 = 0;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    /// Its inode, which may lose its names as long as the file is open, and is pinned until then.
    pub(super) node: Node,
    /// The open file.
    pub(super) file: OwnedFd,
    /// Where a directory's next entries will be read from. Held while they are.
    pub(super) position: Mutex<u64>,
}

impl Handle {
    /// A file that was just opened.
    pub(super) fn new(node: Node, file: OwnedFd) -> Handle {
        Handle { node, file, position: Mutex::new(0) }
    }
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// The table of open files.
#[derive(Debug)]
pub(super) struct Handles {
    table: Mutex<Table>,
    limit: usize,
}

impl Handles {
    /// An empty table, for up to `limit` files.
    pub(super) fn new(limit: usize) -> Handles {
        Handles { table: Mutex::default(), limit }
    }

    /// Adds an open file of an inode; returns its number.
    pub(super) fn insert(&self, node: &Node, file: OwnedFd) -> Result<u64, Errno> {
        let mut table = lock(&self.table);
        if table.open.len() >= self.limit {
            return Err(Errno::ENFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(Handle::new(node.clone(), file)));
        Ok(number)
    }

    /// The open file of a number, which must be one of this inode.
    pub(super) fn get(&self, number: u64, inode: u64) -> Result<Arc<Handle>, Errno> {
        let table = lock(&self.table);
        table.open.get(&number).filter(|handle| handle.node.inode.id == inode).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a file.
    pub(super) fn remove(&self, number: u64) -> Result<(), Errno> {
        // The lock is released before the file is closed, which can take time.
        let handle = lock(&self.table).open.remove(&number);
        handle.map(drop).ok_or(Errno::EBADF)
    }

    /// Closes all files.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut lock(&self.table).open);
        drop(all);
    }

    /// How many files are open.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        lock(&self.table).open.len()
    }
}
