//! The directory tree that is served, and how a process gets ready to serve it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicU32;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;

use super::handles::Handles;
use super::identity::Mounts;
use super::inodes::{Inodes, Limits};
use super::notices::Notices;
use super::pace::Patience;
use super::pins::Node;
use super::sync::Unsynced;
use super::watches::Watches;
use super::{FsError, proc, system, watches};

/// What the limit of open files is raised to, where that is allowed: the usual `fs.nr_open`.
const WANTED_FILES: u64 = 1 << 20;
/// How many inodes the guest may know, pinned or not. They take 280 bytes each, and this process is to do with
/// 64 MiB. The guest forgets inodes when its memory gets short: this is what it has in 200 MiB of its own.
const MAX_KNOWN: usize = 3 << 16;
/// How many files the guest may have open. Each takes 100 bytes here, and up to 2 KiB in the host's kernel.
const MAX_OPEN: usize = 1 << 16;
/// How many inodes are pinned at a time, apart from those of open files. They take up to 2 KiB each in the host's
/// kernel.
const MAX_PINNED: usize = 16 << 10;
/// How many changed files are synced one by one when the guest syncs all.
const MAX_UNSYNCED: usize = 64;
/// Descriptors that are left to the rest of the process, or a quarter of them where there are few.
const RESERVED_FILES: u64 = 1024;

/// A process that is ready to serve files, and has yet to say which.
#[derive(Debug)]
pub struct PreparedFileServer {
    descriptors: OwnedFd,
    files: usize,
    watches: usize,
}

/// A directory tree that is served to a guest.
#[derive(Debug)]
pub struct FileServer {
    /// The directory /proc/self/fd, by which a file opened with `O_PATH` is opened for use.
    pub(super) descriptors: OwnedFd,
    pub(super) mounts: Mounts,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) unsynced: Unsynced,
    pub(super) notices: Notices,
    pub(super) watches: Watches,
    pub(super) patience: Patience,
    /// What the driver agreed to at its start.
    pub(super) options: AtomicU32,
}

impl FileServer {
    /// Gets the process ready. To be called where /proc is mounted, so before `pivot_root`, and in the process
    /// that will serve: the descriptor of /proc/self/fd means this process for ever, also after a fork.
    ///
    /// Raises the process's limit of open files as far as it may, since open files of the guest and inodes that it
    /// uses take one each; programs that this process executes inherit it.
    pub fn prepare() -> Result<PreparedFileServer, FsError> {
        let descriptors = proc::open_descriptors().map_err(FsError::Proc)?;
        let limit = raise_file_limit();
        let files = limit - RESERVED_FILES.min(limit / 4);
        Ok(PreparedFileServer { descriptors, files: files as usize, watches: watches::limit() })
    }

    /// Forgets all that the guest referred to.
    pub(super) fn reset(&self) {
        self.unsynced.clear();
        self.handles.clear();
        self.inodes.clear();
        self.watches.clear();
    }

    /// Opens the file of an inode for use. Only regular files and directories are ever opened: to open a device
    /// or a FIFO of the host has effects, and may block.
    pub(super) fn open_inode(&self, node: &Node, flags: OFlag) -> Result<OwnedFd, Errno> {
        match node.inode.kind() {
            libc::S_IFREG | libc::S_IFDIR => self.reopen(&node.file, flags),
            _ => Err(Errno::EPERM),
        }
    }

    /// Opens what a descriptor refers to once more, with other flags.
    pub(super) fn reopen(&self, file: &OwnedFd, flags: OFlag) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        openat(&self.descriptors, descriptor_path(file).as_c_str(), flags, Mode::empty())
    }
}

impl PreparedFileServer {
    /// Serves the tree below a directory, with whatever is mounted in it. After `pivot_root` that is "/".
    pub fn serve_root(self, path: &Path) -> Result<FileServer, FsError> {
        let failed = |source: io::Error| FsError::Root { path: path.to_owned(), source };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        let status = system::attributes(root.as_fd()).map_err(|errno| failed(errno.into()))?;
        // An open file takes a descriptor, and another one for its inode.
        let open_files = MAX_OPEN.min(self.files / 4);
        let idle = MAX_PINNED.min(self.files / 2);
        let limits = Limits { known: MAX_KNOWN, idle, in_use: open_files + MAX_UNSYNCED };
        let mounts = Mounts::default();
        let identity = mounts.identify_file(root.as_fd(), &status);
        let inodes = Inodes::new(root, identity, limits);
        let (handles, unsynced) = (Handles::new(open_files), Unsynced::new(MAX_UNSYNCED));
        let (notices, watches) = (Notices::default(), Watches::new(&self.descriptors, self.watches));
        let (descriptors, patience, options) = (self.descriptors, Patience::default(), AtomicU32::default());
        Ok(FileServer { descriptors, mounts, inodes, handles, unsynced, notices, watches, patience, options })
    }
}

/// The path of an open file for a thread whose working directory is /proc/self/fd, and relative to that.
pub(super) fn descriptor_path(file: &OwnedFd) -> CString {
    CString::new(file.as_raw_fd().to_string()).unwrap_or_default()
}

/// Raises the limit of open files; returns what it is now.
fn raise_file_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return RESERVED_FILES };
    let wanted = [(WANTED_FILES, hard.max(WANTED_FILES)), (hard.min(WANTED_FILES), hard)];
    let raised = wanted.into_iter().filter(|(limit, _)| *limit > soft);
    let raised =
        raised.into_iter().find(|&(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, soft, hard).is_ok());
    raised.map_or(soft, |(soft, _)| soft)
}
