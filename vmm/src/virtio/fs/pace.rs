//! Which requests are quick.

use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use nix::errno::Errno;

use super::server::FileServer;
use super::wire::opcode;

/// How a request may be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Only without waiting.
    AtOnce,
    /// As it has to be.
    Any,
}

/// When vCPUs no longer serve requests at once, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// What takes longer has waited for something.
    pub(super) long: Duration,
    /// So long nothing is served at once after that.
    pub(super) rest: Duration,
}

impl Default for Patience {
    /// A large directory takes a few milliseconds of the processor alone.
    fn default() -> Patience {
        Patience { long: Duration::from_millis(20), rest: Duration::from_millis(100) }
    }
}

impl FileServer {
    /// Whether a request of this kind can be expected to be served without waiting.
    pub(super) fn is_quick(&self, request: &InHeader) -> bool {
        let quick = matches!(
            request.opcode,
            opcode::LOOKUP
                | opcode::GETATTR
                | opcode::STATX
                | opcode::SETATTR
                | opcode::READLINK
                | opcode::SYMLINK
                | opcode::MKNOD
                | opcode::MKDIR
                | opcode::UNLINK
                | opcode::RMDIR
                | opcode::RENAME
                | opcode::RENAME2
                | opcode::LINK
                | opcode::OPEN
                | opcode::RELEASE
                | opcode::OPENDIR
                | opcode::READDIR
                | opcode::READDIRPLUS
                | opcode::RELEASEDIR
                | opcode::CREATE
                | opcode::READ
                | opcode::WRITE
                | opcode::GETXATTR
                | opcode::LISTXATTR
                | opcode::STATFS
        );
        quick && self.is_own(request.nodeid)
    }

    /// Whether an inode lies on a file system of this host alone, which does not wait for others.
    fn is_own(&self, id: u64) -> bool {
        self.inodes.get(id).is_ok_and(|inode| self.mounts.is_local(inode.mount()))
    }
}

/// Whether a write with these flags of its file goes further than to the host's page cache.
pub(super) fn waits_for_disk(flags: u32) -> bool {
    flags & (libc::O_SYNC | libc::O_DSYNC | libc::O_DIRECT).cast_unsigned() != 0
}

/// Whether an error only means that a request has to wait, and nothing was done.
pub(super) fn has_to_wait(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EINTR)
}
