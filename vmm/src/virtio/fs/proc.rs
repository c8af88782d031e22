//! The descriptors of this process, as a directory.
//!
//! A file that was opened with `O_PATH` is opened for use by its path in /proc/self/fd, so the server keeps that
//! directory open. From a directory of the host's /proc the way leads up to all of it, /proc/sys with its programs
//! for the kernel to run included, and a server that a guest took over could go there. So the directory is one of a
//! proc file system of its own, mounted nowhere, that has nothing but processes in it.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{io, ptr};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

const FLAGS: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// Opens the directory, in the host's /proc where the kernel or its policy has no other.
pub(super) fn open_descriptors() -> io::Result<OwnedFd> {
    let own = mount().and_then(|mount| openat(&mount, c"self/fd", FLAGS, Mode::empty()));
    Ok(own.or_else(|_| open(c"/proc/self/fd", FLAGS, Mode::empty()))?)
}

/// A proc file system with processes alone, and of those only the ones that this one may trace.
fn mount() -> Result<OwnedFd, Errno> {
    // SAFETY: the name is a text that ends with zero.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), libc::FSOPEN_CLOEXEC) };
    let context = descriptor(context)?;
    configure(context.as_fd(), libc::FSCONFIG_SET_STRING, Some((c"subset", c"pid")))?;
    configure(context.as_fd(), libc::FSCONFIG_SET_STRING, Some((c"hidepid", c"2")))?;
    configure(context.as_fd(), libc::FSCONFIG_CMD_CREATE, None)?;
    // What a descriptor leads to lies on a mount of its own, which this says nothing about.
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let flags = libc::FSMOUNT_CLOEXEC;
    // SAFETY: the call takes integers only.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), flags, attributes) };
    descriptor(mount)
}

fn configure(
    context: BorrowedFd<'_>,
    command: libc::fsconfig_command,
    option: Option<(&CStr, &CStr)>,
) -> Result<(), Errno> {
    let (key, value) =
        option.map_or((ptr::null(), ptr::null()), |(key, value)| (key.as_ptr(), value.as_ptr()));
    let fd = context.as_raw_fd();
    // SAFETY: key and value are texts that end with zero, or null where the command takes none.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
    Errno::result(result).map(drop)
}

fn descriptor(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_way_leads_from_the_descriptors_to_the_kernels_settings() {
        if mount().is_err() {
            eprintln!("not tested: this test takes root, and Linux 5.8");
            return;
        }
        let descriptors = open_descriptors().unwrap();
        let at = |path: &CStr| openat(&descriptors, path, OFlag::O_PATH, Mode::empty());
        assert!(at(c"../../self/fd").is_ok());
        assert_eq!(at(c"../../sys/kernel/core_pattern").unwrap_err(), Errno::ENOENT);
        assert_eq!(at(c"../../sysrq-trigger").unwrap_err(), Errno::ENOENT);
        // Descriptors are found all the same, and opened for writing.
        let file = tempfile::tempfile().unwrap();
        let path = std::ffi::CString::new(file.as_raw_fd().to_string()).unwrap();
        openat(&descriptors, path.as_c_str(), OFlag::O_RDWR, Mode::empty()).unwrap();
    }
}
