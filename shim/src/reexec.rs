//! Starting this program again as a process that stays: a monitor or the stub of an `exec`.
//!
//! A fresh execution rather than a mere fork gives the process a telling title, and a memory that holds nothing
//! of the command that started it. One end of a socket pair connects the two.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(title).arg(subcommand).env_clear().env(DESCRIPTOR_VARIABLE, theirs.as_raw_fd().to_string());
    if let Some(terminal) = terminal {
        // The caller waits for the end of its own streams, so none of them may live on in the new process.
        let stdio = || terminal.try_clone_to_owned().map(Stdio::from);
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
    }
    Ok((command.spawn()?, ours))
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
