//! System calls that nix does not wrap, each behind a safe function.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Asks for a mount's number that is never used again, of kernels that have them (Linux 6.8).
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

/// The attributes of what a descriptor refers to, by `statx(2)`: unlike `stat(2)` it tells the mount.
pub(super) fn attributes(file: BorrowedFd<'_>) -> Result<libc::statx, Errno> {
    attributes_at(file, c"")
}

/// The attributes of what a name in a directory stands for, which is neither followed nor mounted by that.
pub(super) fn attributes_at(directory: BorrowedFd<'_>, name: &CStr) -> Result<libc::statx, Errno> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID | STATX_MNT_ID_UNIQUE;
    let fd = directory.as_raw_fd();
    // SAFETY: the path is a text that ends with zero, and `status` has room for the structure that is written.
    let result = unsafe { libc::statx(fd, name.as_ptr(), flags, mask, status.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: the structure consists of integers, which all have a value: zero, or what the kernel wrote.
    Ok(unsafe { status.assume_init() })
}

/// Reads entries of a directory as `linux_dirent64` structures; returns how many bytes of them.
pub(super) fn directory_entries(directory: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    let (fd, len) = (directory.as_raw_fd(), buffer.len());
    // SAFETY: the kernel writes at most `len` bytes to the buffer, which is borrowed for the call.
    let read = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), len) };
    Errno::result(read).map(|read| read as usize)
}

/// Sets an extended attribute of the file at a path, following links.
pub(super) fn set_attribute(path: &CStr, name: &CStr, value: &[u8], flags: i32) -> Result<(), Errno> {
    let (data, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: path and name are texts that end with zero, and `data` has `len` bytes.
    let result = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), data, len, flags) };
    Errno::result(result).map(drop)
}

/// Reads an extended attribute of the file at a path, following links. With an empty buffer returns its length.
pub(super) fn attribute(path: &CStr, name: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    let (data, len) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: path and name are texts that end with zero, and the kernel writes at most `len` bytes to `data`.
    let read = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), data, len) };
    Errno::result(read).map(|read| read as usize)
}

/// Reads the names of the extended attributes of the file at a path, following links.
pub(super) fn attribute_names(path: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    let (data, len) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the path is a text that ends with zero, and the kernel writes at most `len` bytes to `data`.
    let read = unsafe { libc::listxattr(path.as_ptr(), data, len) };
    Errno::result(read).map(|read| read as usize)
}

/// Removes an extended attribute of the file at a path, following links.
pub(super) fn remove_attribute(path: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: path and name are texts that end with zero.
    let result = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Whether this thread keeps its capabilities whatever its user IDs become.
pub(super) fn keeps_capabilities() -> bool {
    // SAFETY: the call takes integers only, and changes nothing.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    bits >= 0 && bits & libc::SECBIT_NO_SETUID_FIXUP != 0
}

/// Lets this thread keep its capabilities whatever its user IDs become.
pub(super) fn keep_capabilities() -> Result<(), Errno> {
    // SAFETY: the call takes integers only, and changes nothing but this thread's securebits.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP, 0, 0, 0) };
    Errno::result(result).map(drop)
}
