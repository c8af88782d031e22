//! What the FUSE protocol says in numbers: operations and flags that fuse-backend-rs leaves out or keeps to itself.
//! The structures of the messages are fuse-backend-rs's, see `linux/fuse.h` for both.

use vm_memory::ByteValued;

/// Operations (`enum fuse_opcode`).
pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

/// Which fields of a `fuse_setattr_in` are meant.
pub(super) mod setattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// The caller may not keep set-user-ID and set-group-ID bits (`fuse_open_in.open_flags`).
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// What the guest caches of the file's contents is still right (`fuse_open_out.open_flags`).
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// The write comes from the page cache, of a shared mapping (`fuse_write_in.write_flags`).
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// The writer may not keep set-user-ID and set-group-ID bits (`fuse_write_in.write_flags`).
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// Only data, not attributes, has to be on the disk (`fuse_fsync_in.fsync_flags`).
pub(super) const FSYNC_DATA_ONLY: u32 = 1 << 0;
/// SETXATTR has two more fields (an option of INIT).
pub(super) const SETXATTR_EXT: u32 = 1 << 29;
/// The caller may not keep the set-group-ID bit of the file whose access control list it sets
/// (`fuse_setxattr_in.setxattr_flags`).
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// Another file system is mounted here (`fuse_attr.flags`).
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Arguments of STATX (`struct fuse_statx_in`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct StatxIn {
    getattr_flags: u32,
    reserved: u32,
    fh: u64,
    flags: u32,
    mask: u32,
}

/// The fields of `struct fuse_setxattr_in` that came later.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct SetxattrMore {
    pub(super) flags: u32,
    pub(super) padding: u32,
}

/// Reply to STATX (`struct fuse_statx_out`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct StatxOut {
    pub(super) attr_valid: u64,
    pub(super) attr_valid_nsec: u32,
    pub(super) flags: u32,
    pub(super) spare: [u64; 2],
    pub(super) mask: u32,
    pub(super) blksize: u32,
    pub(super) attributes: u64,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u16,
    pub(super) spare0: u16,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) attributes_mask: u64,
    pub(super) atime: Time,
    pub(super) btime: Time,
    pub(super) ctime: Time,
    pub(super) mtime: Time,
    pub(super) rdev: [u32; 2],
    pub(super) dev: [u32; 2],
    pub(super) spare2: [u64; 14],
}

/// A time in [`StatxOut`] (`struct fuse_sx_time`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
    pub(super) reserved: i32,
}

impl From<libc::statx_timestamp> for Time {
    fn from(time: libc::statx_timestamp) -> Self {
        Self { seconds: time.tv_sec, nanoseconds: time.tv_nsec, reserved: 0 }
    }
}

// SAFETY: it consists of integers, and their sizes leave no padding.
unsafe impl ByteValued for StatxIn {}
// SAFETY: it consists of integers, and their sizes leave no padding.
unsafe impl ByteValued for SetxattrMore {}
// SAFETY: it consists of integers, and their sizes leave no padding.
unsafe impl ByteValued for StatxOut {}

const _: () = assert!(size_of::<StatxIn>() == 24 && size_of::<StatxOut>() == 288);
