//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::inodes::lock;
use super::pins::Node;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    /// The number of its inode.
    inode: u64,
    /// Pins the inode, which may lose its names as long as the file is open.
    _pin: Arc<OwnedFd>,
    /// The open file.
    pub(super) file: OwnedFd,
    /// Where a directory's next entries will be read from. Held while they are.
    pub(super) position: Mutex<u64>,
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
        let (inode, pin) = (node.inode.id, node.file.clone());
        table.open.insert(number, Arc::new(Handle { inode, _pin: pin, file, position: Mutex::new(0) }));
        Ok(number)
    }

    /// The open file of a number, which must be one of this inode.
    pub(super) fn get(&self, number: u64, inode: u64) -> Result<Arc<Handle>, Errno> {
        let table = lock(&self.table);
        table.open.get(&number).filter(|handle| handle.inode == inode).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a file.
    pub(super) fn remove(&self, number: u64) -> Result<(), Errno> {
        // The lock is released before the file is closed, which can take time.
        let handle = lock(&self.table).open.remove(&number);
        handle.map(drop).ok_or(Errno::EBADF)
    }

    /// Closes all files.
    pub(super) fn clear(&self) {
        lock(&self.table).open.clear();
    }
}
