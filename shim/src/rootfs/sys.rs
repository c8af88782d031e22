//! The mount system calls that work on descriptors, so that no path is looked up twice (open_tree(2)).

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::bundle::options::{Attributes, Propagation};

/// A detached copy of the mount at a path, with those below it if `recursive`.
pub(super) fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: the path is a NUL-terminated string that outlives the call; the others are numbers.
    let result = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let descriptor = Errno::result(result)? as RawFd;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Mounts a detached tree on what a descriptor stands for.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (tree, target, empty) = (tree.as_raw_fd(), target.as_raw_fd(), c"".as_ptr());
    // SAFETY: both paths are the same static empty string; the descriptors are open.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree, empty, target, empty, flags) };
    Errno::result(result).map(drop)
}

/// Changes the attributes of a mount, and of those below it if `recursive`.
pub(super) fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> Result<(), Errno> {
    if attributes.is_empty() {
        return Ok(());
    }
    set(mount, attributes, 0, recursive)
}

/// Changes the propagation of a mount.
pub(super) fn set_propagation(mount: BorrowedFd<'_>, propagation: Propagation) -> Result<(), Errno> {
    set(mount, Attributes::default(), propagation.kind, propagation.recursive)
}

fn set(
    mount: BorrowedFd<'_>,
    attributes: Attributes,
    propagation: u64,
    recursive: bool,
) -> Result<(), Errno> {
    let change =
        libc::mount_attr { attr_set: attributes.set, attr_clr: attributes.clear, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let (mount, empty, size) = (mount.as_raw_fd(), c"".as_ptr(), size_of_val(&change));
    // SAFETY: `change` outlives the call, and its size is what the kernel is told.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, mount, empty, flags, &raw const change, size) };
    Errno::result(result).map(drop)
}

/// Mounts a new file system on what a descriptor stands for.
pub(super) fn mount_on(
    target: BorrowedFd<'_>,
    file_system: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), Errno> {
    mount(Some("rvm"), &through(target), Some(file_system), flags, Some(data))
}

/// A path to what a descriptor stands for, which no rename can turn elsewhere.
pub(super) fn through(descriptor: BorrowedFd<'_>) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}
