//! Starting this program again as a process that stays: a monitor or the stub of an `exec`.
//!
//! A fresh execution rather than a mere fork gives the process a telling title, and a memory that holds nothing
//! of the command that started it. One end of a socket pair connects the two.
//!
//! The process begins its life in its control group. To move one there that runs already has the kernel wait for all
//! processors' readers (`cgroup_threadgroup_rwsem`), some 10 ms in which nothing else happens; and what it had done
//! before would count elsewhere. The standard library knows no such fork, so there is one here.

use std::convert::Infallible;
use std::ffi::{CString, c_char};
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork};

use crate::cgroup::{CgroupError, HostCgroup};

/// Names the inherited end of the socket pair.
const DESCRIPTOR_VARIABLE: &str = "_RVM_SOCKET";

/// What is executed.
const PROGRAM: &std::ffi::CStr = c"/proc/self/exe";

/// The bit of clone3(2), of linux/sched.h, which does not fit the C library's flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process to be started.
#[derive(Debug)]
pub struct Start<'a> {
    /// What lists of processes show.
    pub title: &'a str,
    /// What it is to do.
    pub subcommand: &'a str,
    /// Its standard streams; those of this process otherwise.
    pub terminal: Option<BorrowedFd<'a>>,
    /// The directory of its control group (version 2); that of this process otherwise.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A process that was started.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub child: Child,
    /// What connects it with this one.
    pub socket: OwnedFd,
    /// Whether it is in the control group that was asked for. An older kernel cannot do that.
    pub is_in_cgroup: bool,
}

/// A process that this one has started. It goes on when this is dropped.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Child {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// Kills it, unless its end is known.
    pub fn kill(&mut self) -> io::Result<()> {
        match self.status {
            Some(_) => Ok(()),
            None => Ok(kill(self.pid, Signal::SIGKILL)?),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let mut status = 0;
        loop {
            // SAFETY: the call writes a whole number to where the pointer leads.
            match Errno::result(unsafe { libc::waitpid(self.pid.as_raw(), &raw mut status, 0) }) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => break,
            }
        }
        Ok(*self.status.insert(ExitStatus::from_raw(status)))
    }
}

impl Started {
    /// Moves the process into a container's control group, where it counts with the container and ends with it, unless it
    /// has begun there.
    pub fn enter(&self, cgroup: Option<&HostCgroup>) -> Result<(), CgroupError> {
        cgroup.filter(|_| !self.is_in_cgroup).map_or(Ok(()), |cgroup| cgroup.add(self.child.id()))
    }
}

impl Start<'_> {
    /// Starts the process.
    pub fn spawn(&self) -> io::Result<Started> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let words = [self.title, self.subcommand].map(CString::new);
        let [title, subcommand] = words.map(|word| word.map_err(io::Error::from));
        let (title, subcommand) = (title?, subcommand?);
        let variable = CString::new(format!("{DESCRIPTOR_VARIABLE}={}", theirs.as_raw_fd()))?;
        let execution = Execution {
            arguments: [title.as_ptr(), subcommand.as_ptr(), std::ptr::null()],
            environment: [variable.as_ptr(), std::ptr::null()],
            terminal: self.terminal,
            inherited: theirs.as_fd(),
        };
        let (mut failure, report) = io::pipe()?;
        let (forked, is_in_cgroup) = fork_into(self.cgroup)?;
        let pid = match forked {
            ForkResult::Child => execution.run(report),
            ForkResult::Parent { child } => child,
        };
        drop(report);
        let mut child = Child { pid, status: None };
        let mut errno = [0; 4];
        // It is closed by the execution.
        if failure.read_exact(&mut errno).is_ok() {
            child.wait()?;
            return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)));
        }
        Ok(Started { child, socket: ours, is_in_cgroup })
    }
}

/// Forks, into a control group if there is one to be in and the kernel can do that.
fn fork_into(cgroup: Option<BorrowedFd<'_>>) -> io::Result<(ForkResult, bool)> {
    if let Some(cgroup) = cgroup {
        // SAFETY: all fields are integers, for which zero is a value.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.flags = CLONE_INTO_CGROUP;
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
        // SAFETY: without CLONE_VM this is a fork (clone(2)). The C library does not know that the child is one, which
        // goes on with system calls alone and allocates nothing.
        let forked =
            unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
        match forked {
            // Whatever it was, a mere fork may do, and a move to the group says what is wrong with that.
            -1 => {}
            0 => return Ok((ForkResult::Child, true)),
            // Process ids are 32 bits wide.
            pid => return Ok((ForkResult::Parent { child: Pid::from_raw(pid as i32) }, true)),
        }
    }
    // SAFETY: the child goes on with system calls alone and allocates nothing.
    Ok((unsafe { fork() }?, false))
}

/// What the child does, all of it made ready before the fork.
struct Execution<'a> {
    arguments: [*const c_char; 3],
    environment: [*const c_char; 2],
    terminal: Option<BorrowedFd<'a>>,
    inherited: BorrowedFd<'a>,
}

impl Execution<'_> {
    /// Becomes the program, or tells why not.
    fn run(&self, mut report: PipeWriter) -> ! {
        let Err(errno) = self.execute();
        let _ = report.write_all(&(errno as i32).to_ne_bytes());
        // SAFETY: it ends this process, without anything that the C library does at an ordinary end.
        unsafe { libc::_exit(127) }
    }

    fn execute(&self) -> Result<Infallible, Errno> {
        SigSet::empty().thread_set_mask()?;
        // SAFETY: the default action is no function.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
        if let Some(terminal) = self.terminal {
            // The caller waits for the end of its own streams, so none of them may live on in the new process.
            dup2_stdin(terminal)?;
            dup2_stdout(terminal)?;
            dup2_stderr(terminal)?;
        }
        inherit_only(self.inherited)?;
        // SAFETY: both lists end with a null pointer, and what they point to lives in the caller.
        unsafe { libc::execve(PROGRAM.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
        Err(Errno::last())
    }
}

/// Has the next execution close all descriptors but the standard streams and one more: whatever the engine has
/// left open would stay open as long as the container lives.
fn inherit_only(descriptor: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: it takes numbers alone, and marks descriptors that nothing uses before the execution.
    let marked =
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(marked)?;
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// The new process's end of the socket pair; an error when it was not started by [`Start::spawn`].
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
    use std::fs::File;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_inherits_one_descriptor_beside_its_standard_streams() {
        let (_reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let kept = File::open("/dev/null").unwrap();
        let number = kept.as_raw_fd();
        let mut command = Command::new("/bin/ls");
        command.arg("/proc/self/fd");
        // SAFETY: after the fork only system calls are made.
        unsafe { command.pre_exec(move || Ok(inherit_only(kept.as_fd())?)) };
        let output = command.output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        let listed: Vec<i32> = listed.lines().map(|line| line.parse().unwrap()).collect();
        assert!(listed.contains(&number), "{listed:?}");
        // The listing itself needs one.
        assert_eq!(listed.len(), 5, "{listed:?}");
    }

    /// In a test, this program is that of the tests: it runs the one named by the title and the subcommand.
    fn start<'a>(subcommand: &'a str, output: BorrowedFd<'a>) -> Start<'a> {
        Start { title: "kitchen", subcommand, terminal: Some(output), cgroup: None }
    }

    #[test]
    fn a_process_begins_with_its_title_and_nothing_of_the_environment() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut started = start("--list", writer.as_fd()).spawn().unwrap();
        drop(writer);
        let mut words = String::new();
        reader.read_to_string(&mut words).unwrap();
        assert!(words.contains("a_process_begins_with_its_title"), "{words}");
        assert!(started.child.wait().unwrap().success() && !started.is_in_cgroup);
        assert!(started.child.wait().unwrap().success(), "its end is remembered");
        started.child.kill().unwrap();
    }

    #[test]
    fn what_is_no_control_group_is_not_entered() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let folder = File::open("/").unwrap();
        let start = Start { cgroup: Some(folder.as_fd()), ..start("--list", null.as_fd()) };
        let mut started = start.spawn().unwrap();
        assert!(started.child.wait().unwrap().success() && !started.is_in_cgroup);
    }

    #[test]
    fn a_title_that_is_none_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let refused = Start { title: "a\0b", ..start("--list", null.as_fd()) }.spawn().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
