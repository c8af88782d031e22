//! Whether a process that was started some time ago still lives, and how to signal it and no other.
//!
//! A pid alone may have been given to another process meanwhile; pid and start time together never are.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process, told from any later one of the same pid by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: i32,
    /// When it was started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The identity of a process that exists, be it a zombie.
    pub fn of(pid: i32) -> io::Result<ProcessIdentity> {
        let (_, start_time) = read_stat(pid)?;
        Ok(ProcessIdentity { pid, start_time })
    }

    /// Whether it runs. One whose first thread has ended does no more, though others of its threads may have its files and memory
    /// for a moment; only [`ProcessHandle::wait`] tells when they have not. And a zombie is one that its parent has not asked for yet.
    pub fn is_alive(self) -> bool {
        read_stat(self.pid)
            .is_ok_and(|(state, start_time)| start_time == self.start_time && !matches!(state, 'Z' | 'X'))
    }

    /// A handle that stays with this very process; none when all its threads have ended.
    pub fn open(self) -> Option<ProcessHandle> {
        let handle = ProcessHandle { fd: pidfd_open(self.pid).ok()? };
        // Asked after the handle was made: if the process is the right one now, the handle is its.
        let is_it = read_stat(self.pid).is_ok_and(|(_, start_time)| start_time == self.start_time);
        (is_it && !handle.wait(Duration::ZERO)).then_some(handle)
    }

    /// Sends a signal. False when the process has ended.
    pub fn signal(self, signal: i32) -> io::Result<bool> {
        match self.open() {
            Some(handle) => handle.signal(signal),
            None => Ok(false),
        }
    }
}

/// A process that is held by a pidfd.
#[derive(Debug)]
pub struct ProcessHandle {
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Sends a signal. False when the process has ended.
    pub fn signal(&self, signal: i32) -> io::Result<bool> {
        let info: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: a null siginfo asks the kernel to fill it in as kill(2) does.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, info, 0) };
        if result == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            error => Err(error),
        }
    }

    /// Waits until the process has ended, with all its threads; false when it has not within `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut fds, timeout), Ok(1..))
    }
}

impl AsFd for ProcessHandle {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A descriptor of a process (pidfd_open(2)): readable when it has ended.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: it takes a pid and flags, and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor that nothing else owns, and it fits an i32 as all do.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn read_stat(pid: i32) -> io::Result<(char, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))
}

/// State and start time. The second field is the command's name, which may hold blanks and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::waitpid;
    use nix::unistd::{ForkResult, Pid, fork};

    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (cut"), None);
        assert_eq!(parse_stat("7 (cut) S 1 2"), None);
    }

    #[test]
    fn a_zombie_has_ended() {
        let mut child = Command::new("/bin/cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity::of(child.id() as i32).unwrap();
        let handle = identity.open().unwrap();
        assert!(identity.is_alive());

        assert!(identity.signal(libc::SIGKILL).unwrap());
        assert!(handle.wait(Duration::from_secs(60)));
        assert!(!identity.is_alive(), "not waited for, and yet it has ended");
        child.wait().unwrap();
        assert!(!identity.signal(libc::SIGKILL).unwrap());
    }

    /// A process that ends with the test.
    struct Child(Pid);

    impl Drop for Child {
        fn drop(&mut self) {
            let _ = kill(self.0, Signal::SIGKILL);
            let _ = waitpid(self.0, None);
        }
    }

    /// A process whose first thread has ended, and another one has not.
    fn without_first_thread() -> Child {
        // SAFETY: of the locks that other threads of this process may hold, the child takes malloc's alone, which fork frees.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Child(child),
            ForkResult::Child => {
                let other = std::thread::Builder::new().spawn(|| {
                    loop {
                        nix::unistd::pause();
                    }
                });
                let code = i32::from(other.is_err());
                // SAFETY: this ends the calling thread alone, whose stack nothing refers to.
                unsafe { libc::syscall(libc::SYS_exit, code) };
                unreachable!("exit does not return")
            }
        }
    }

    #[test]
    fn a_process_has_not_ended_before_all_its_threads() {
        let child = without_first_thread();
        let identity = ProcessIdentity::of(child.0.as_raw()).unwrap();
        while identity.is_alive() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let handle = identity.open().expect("only its first thread has ended");
        assert!(!handle.wait(Duration::from_millis(20)));
        assert!(handle.signal(libc::SIGKILL).unwrap());
        assert!(handle.wait(Duration::from_secs(60)));
        assert!(identity.open().is_none());
    }

    #[test]
    fn another_process_of_the_same_pid_is_not_taken_for_it() {
        let mut identity = ProcessIdentity::of(std::process::id() as i32).unwrap();
        assert!(identity.is_alive());
        identity.start_time += 1;
        assert!(!identity.is_alive());
        assert!(identity.open().is_none());
    }
}
