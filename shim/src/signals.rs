//! Signals: their names, which of them end a process, and how a process ends as another did.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rvm_protocol::ExitStatus;

/// The largest signal number of Linux.
const MAX_SIGNAL: i32 = 64;
/// The first and last real-time signals as C programs count them: the C library keeps 32 and 33.
const RT_MIN: i32 = 34;
const RT_MAX: i32 = 64;

/// Not the name or number of a signal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown signal {0:?}")]
pub struct UnknownSignal(String);

/// A signal's number from its number or name, with or without `SIG`, in any case.
pub fn parse(text: &str) -> Result<i32, UnknownSignal> {
    let unknown = || UnknownSignal(text.to_owned());
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=MAX_SIGNAL).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let real_time = |rest: &str, base: i32| -> Option<i32> {
        let offset = if rest.is_empty() { 0 } else { rest.parse::<i32>().ok()? };
        Some(base.checked_add(offset)?).filter(|number| (RT_MIN..=RT_MAX).contains(number))
    };
    let number = match name {
        "POLL" => Some(libc::SIGIO),
        "IOT" => Some(libc::SIGABRT),
        "CLD" => Some(libc::SIGCHLD),
        _ => match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
            (Some(rest), _) => real_time(rest, RT_MIN),
            (_, Some(rest)) => real_time(rest, RT_MAX),
            _ => format!("SIG{name}").parse::<Signal>().ok().map(|signal| signal as i32),
        },
    };
    number.ok_or_else(unknown)
}

/// Whether a process that has no handler for a signal ends by it.
pub fn is_fatal(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}

/// The signals that are passed on to a process in the guest, readable as a file descriptor.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Blocks the signals for this thread, and for all threads that it starts from now on.
    ///
    /// Left out are those that tell of a fault in this program, and SIGPIPE, which is ignored: a blocked signal
    /// would be pending after each write to a closed pipe. A thread that uses a signal of its own has to unblock
    /// it, as those of the vCPUs do.
    pub fn block() -> io::Result<Signals> {
        let mut set = SigSet::all();
        for own in [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGFPE,
            Signal::SIGILL,
            Signal::SIGTRAP,
            Signal::SIGSYS,
            Signal::SIGABRT,
            Signal::SIGPIPE,
        ] {
            set.remove(own);
        }
        set.thread_block()?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { descriptor })
    }

    /// The next signal that has arrived. Children's ends are nobody's business but this process's.
    pub fn take(&mut self) -> Option<i32> {
        loop {
            let signal = self.descriptor.read_signal().ok()??.ssi_signo.cast_signed();
            if signal != libc::SIGCHLD {
                return Some(signal);
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Ends this process as a process of the guest ended: with its code, or by its signal.
pub fn exit_as(status: ExitStatus) -> ! {
    if let ExitStatus::Signal(signal) = status {
        die_by(i32::from(signal));
    }
    end(status.shell_code())
}

/// Ends at once: nothing that a thread does now is of use any more.
pub fn end(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return; nothing is left that needs its destructor.
    unsafe { libc::_exit(code) }
}

/// Returns only if the signal ends no process.
fn die_by(signal: i32) {
    // The workload's core is in the guest; this process's own would hold the guest's memory.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = nix::sys::prctl::set_dumpable(false);
    // SAFETY: SIG_DFL is a valid disposition for any signal, and an invalid number is an error that changes
    // nothing.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    let mut set = *SigSet::empty().as_ref();
    // SAFETY: the set is initialised, and an invalid number is an error that changes nothing.
    unsafe { libc::sigaddset(&raw mut set, signal) };
    // SAFETY: the set is initialised; the old mask is not wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: kill takes numbers. Sent to the whole process, the signal may be taken by any thread that does not
    // block it, and this one does not.
    unsafe { libc::kill(process::id().cast_signed(), signal) };
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("usr1", 10),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("64", 64),
            ("POLL", 29),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NOSUCH", "RTMIN+31", "RTMIN+x", "9 "] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn signals_that_processes_sleep_through_are_not_fatal() {
        assert!(is_fatal(libc::SIGTERM) && is_fatal(libc::SIGKILL) && is_fatal(40));
        assert!(!is_fatal(libc::SIGWINCH) && !is_fatal(libc::SIGCONT));
    }

    fn status_of(status: ExitStatus) -> WaitStatus {
        // SAFETY: the child calls nothing that takes a lock or allocates.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => exit_as(status),
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    #[test]
    fn a_process_ends_as_the_guests_did() {
        assert!(matches!(status_of(ExitStatus::Code(3)), WaitStatus::Exited(_, 3)));
        for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGSEGV, Signal::SIGPIPE] {
            let status = status_of(ExitStatus::Signal(signal as u8));
            assert!(matches!(status, WaitStatus::Signaled(_, by, false) if by == signal), "{status:?}");
        }
    }

    #[test]
    fn a_signal_that_ends_no_process_becomes_a_code() {
        assert!(matches!(status_of(ExitStatus::Signal(libc::SIGWINCH as u8)), WaitStatus::Exited(_, 156)));
        assert!(matches!(status_of(ExitStatus::Signal(100)), WaitStatus::Exited(_, 228)));
    }
}
