//! Starting this program again as a process that stays: a monitor or the stub of an `exec`.
//!
//! A fresh execution rather than a mere fork gives the process a telling title, and a memory that holds nothing
//! of the command that started it. One end of a socket pair connects the two.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Names the inherited end of the socket pair.
const DESCRIPTOR_VARIABLE: &str = "_RVM_SOCKET";

/// Starts the process. With a terminal its standard streams are that, otherwise they are this process's own.
pub fn spawn(
    title: &str,
    subcommand: &str,
    terminal: Option<BorrowedFd<'_>>,
) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(title).arg(subcommand).env_clear().env(DESCRIPTOR_VARIABLE, theirs.as_raw_fd().to_string());
    if let Some(terminal) = terminal {
        // The caller waits for the end of its own streams, so none of them may live on in the new process.
        let stdio = || terminal.try_clone_to_owned().map(Stdio::from);
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
    }
    let inherited = theirs.as_raw_fd();
    // SAFETY: after the fork only system calls are made, which take numbers and no lock.
    unsafe { command.pre_exec(move || inherit_only(inherited)) };
    Ok((command.spawn()?, ours))
}

/// Has the next execution close all descriptors but the standard streams and one more: whatever the engine has
/// left open would stay open as long as the container lives.
fn inherit_only(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: it takes numbers alone, and marks descriptors that nothing uses before the execution. Marking, since
    // the standard library needs one of them until then.
    let marked =
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: borrowed for one call; the caller holds it open.
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// The new process's end of the socket pair; an error when it was not started by [`spawn`].
pub fn inherited_socket() -> io::Result<OwnedFd> {
    let number: i32 = std::env::var(DESCRIPTOR_VARIABLE)
        .ok()
        .and_then(|number| number.parse().ok())
        .filter(|number| *number > 2)
        .ok_or(io::ErrorKind::NotConnected)?;
    // SAFETY: borrowed for one call, which fails for a number that is no open descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // Executed as /proc/self/exe, it would be called "exe" in lists of processes.
    prctl::set_name(c"rvm")?;
    // SAFETY: it is open, was passed to this process alone, and nothing here has claimed it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_inherits_one_descriptor_beside_its_standard_streams() {
        let (_reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let kept = std::fs::File::open("/dev/null").unwrap();
        let number = kept.as_raw_fd();
        let mut command = Command::new("/bin/ls");
        command.arg("/proc/self/fd");
        // SAFETY: as in `spawn`.
        unsafe { command.pre_exec(move || inherit_only(number)) };
        let output = command.output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        let listed: Vec<i32> = listed.lines().map(|line| line.parse().unwrap()).collect();
        assert!(listed.contains(&number), "{listed:?}");
        // The listing itself needs one.
        assert_eq!(listed.len(), 5, "{listed:?}");
    }
}
