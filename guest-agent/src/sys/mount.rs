//! The mount API of Linux 5.2 and later: mounts are made and changed detached, as descriptors, and attached
//! when they are complete. A path is looked up once, so there is nothing for a race to exchange.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd;

use super::{check, descriptor};

/// `MOUNT_ATTR_*`, the attributes of a mount. The C library's headers of some systems lack them.
pub mod attribute {
    /// No writing.
    pub const RDONLY: u64 = 0x01;
    /// Set-user-ID bits are ignored.
    pub const NOSUID: u64 = 0x02;
    /// Device files cannot be opened.
    pub const NODEV: u64 = 0x04;
    /// Programs cannot be executed.
    pub const NOEXEC: u64 = 0x08;
    /// The field that holds the way access times are kept; zero is `relatime`.
    pub const ATIME: u64 = 0x70;
    /// Access times are not kept.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always kept.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are not kept.
    pub const NODIRATIME: u64 = 0x80;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// A detached copy of what `place` shows: of the mount that it lies on, or with `recursive` of those below
/// it too.
pub fn clone_mount(place: impl AsFd, recursive: bool) -> nix::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | libc::AT_EMPTY_PATH as libc::c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: the descriptor is open for the whole call, and the path is a valid C string.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, place.as_fd().as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a detached mount on top of `place`.
pub fn attach(mount: impl AsFd, place: impl AsFd) -> nix::Result<()> {
    // SAFETY: both descriptors are open for the whole call, and the paths are valid C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            place.as_fd().as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
}

/// A change of a mount's attributes, as of `mount_setattr(2)`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear, before any is set.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`, or zero for no change.
    pub propagation: u64,
    user_namespace: u64,
}

impl Change {
    /// A change of attributes alone.
    pub fn attributes(set: u64, clear: u64) -> Self {
        Self { set, clear, ..Self::default() }
    }

    /// A change of propagation alone.
    pub fn propagation(propagation: u64) -> Self {
        Self { propagation, ..Self::default() }
    }
}

/// Changes the attributes of a mount, and with `recursive` of all below it.
pub fn change(mount: impl AsFd, change: Change, recursive: bool) -> nix::Result<()> {
    if change == Change::default() {
        return Ok(());
    }
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the descriptor is open, the path is a valid C string, and `change` has the layout of the
    // kernel's `struct mount_attr` in its first version, whose size is passed along.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<Change>(),
        )
    })
}

/// A file system that is being configured.
pub struct FileSystem {
    context: OwnedFd,
}

impl FileSystem {
    /// Starts to configure a file system of this type.
    pub fn open(kind: &str) -> nix::Result<Self> {
        let kind = c_string(kind)?;
        // SAFETY: the argument is a valid C string.
        let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
        Ok(Self { context })
    }

    /// Sets an option with a value, or without.
    pub fn set(&self, key: &str, value: Option<&str>) -> nix::Result<()> {
        let key = c_string(key)?;
        match value {
            Some(value) => self.configure(FSCONFIG_SET_STRING, Some(&key), Some(&c_string(value)?)),
            None => self.configure(FSCONFIG_SET_FLAG, Some(&key), None),
        }
    }

    /// Makes the file system and a detached mount of it.
    pub fn mount(&self) -> nix::Result<OwnedFd> {
        self.configure(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: the descriptor is an open file system context.
        descriptor(unsafe { libc::syscall(libc::SYS_fsmount, self.context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
    }

    /// What the kernel has to say about the last failure, where it says anything.
    pub fn complaint(&self) -> Option<String> {
        let mut line = [0; 512];
        let count = unistd::read(&self.context, &mut line).ok()?;
        let text = String::from_utf8_lossy(line.get(..count)?);
        // A line starts with its severity and a blank.
        Some(text.get(2..).unwrap_or_default().trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn configure(&self, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> nix::Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: the descriptor is an open file system context; key and value are null or valid C strings,
        // as each of the three commands wants them.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.context.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        })
    }
}

fn c_string(text: &str) -> nix::Result<CString> {
    CString::new(text).map_err(|_| Errno::EINVAL)
}
