//! System calls that neither the standard library nor nix wraps, each wrapped once.

pub mod bpf;
pub mod clock;
pub mod mount;
pub mod process;
pub mod waking;

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// The result of a system call that returns nothing of interest.
fn check(result: libc::c_long) -> nix::Result<()> {
    Errno::result(result).map(drop)
}

/// The result of a system call that returns a new descriptor.
fn descriptor(result: libc::c_long) -> nix::Result<OwnedFd> {
    let number = Errno::result(result)? as RawFd;
    // SAFETY: the kernel has just returned this descriptor as a new one, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
