//! Telling engines of a kill for want of memory in the guest (see [`crate::cgroup`], `oom`): by a child of the monitor that
//! goes where there is no memory.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{ForkResult, alarm, fork};

use crate::container::pidfd_open;

/// How long a victim may live. The kernel kills it as soon as it needs memory; it must not stay if the kernel does not.
const LIFE_SECONDS: u32 = 2;
/// How long the end of the container waits for a report on its way.
const PATIENCE: Duration = Duration::from_millis(500);
/// What a victim tries to use.
const MEMORY: usize = 64 << 10;

/// Reports kills, one at a time, as the counters of the kernel are read one at a time.
#[derive(Debug, Default)]
pub struct OomReports {
    place: Option<File>,
    /// The victim on its way.
    victim: Option<OwnedFd>,
}

impl OomReports {
    /// Reports from now on, by processes that join the cgroup whose `cgroup.procs` is open here.
    pub fn enable(&mut self, place: File) {
        // Nobody waits for the victims, and this process has no other children.
        // SAFETY: no handler is installed; ignoring a signal runs no code.
        if unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.is_ok() {
            self.place = Some(place);
        }
    }

    /// Reports one, unless one is on its way.
    pub fn report(&mut self) {
        if let (Some(place), None) = (&self.place, &self.victim) {
            self.victim = start_victim(place.as_fd());
        }
    }

    /// Becomes readable when the report on its way has arrived.
    pub fn on_its_way(&self) -> Option<BorrowedFd<'_>> {
        self.victim.as_ref().map(AsFd::as_fd)
    }

    /// It has arrived.
    pub fn arrived(&mut self) {
        self.victim = None;
    }

    /// Waits for the report on its way: an engine that has heard of the container's end may not look any more.
    pub fn settle(&mut self) {
        if let Some(victim) = self.victim.take() {
            let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(victim.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }
}

/// Starts a process that joins the cgroup and is killed there; returns its pidfd. That it cannot be started means no report.
fn start_victim(place: BorrowedFd<'_>) -> Option<OwnedFd> {
    // SAFETY: the child calls nothing but `die_in`, which is made for it.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => die_in(place),
        Ok(ForkResult::Parent { child }) => pidfd_open(child.as_raw()).ok(),
        Err(_) => None,
    }
}

/// The child's whole life. Other threads of the parent may have held locks when it was forked, so it calls the kernel only.
fn die_in(place: BorrowedFd<'_>) -> ! {
    let _ = SigSet::empty().thread_set_mask();
    alarm::set(LIFE_SECONDS);
    if nix::unistd::write(place, b"0").is_ok() {
        use_memory();
    }
    // SAFETY: it ends the process, and does nothing else.
    unsafe { libc::_exit(0) }
}

/// All that the child has is its parent's until it writes to it: this takes pages of its own. It is called, so that it happens
/// after what comes before it.
#[inline(never)]
fn use_memory() {
    std::hint::black_box([1u8; MEMORY]);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn a_report_is_a_process_that_goes_to_the_place_and_ends() {
        let mut place = tempfile::tempfile().unwrap();
        let mut reports = OomReports::default();
        reports.report();
        assert!(reports.on_its_way().is_none(), "there is no place to report to");
        // Not by `enable`: other tests of this process wait for their children.
        reports.place = Some(place.try_clone().unwrap());
        reports.report();
        assert!(reports.on_its_way().is_some());
        // One is enough for as many kills as come meanwhile.
        reports.report();
        reports.settle();
        assert!(reports.on_its_way().is_none());
        let mut written = String::new();
        place.rewind().unwrap();
        place.read_to_string(&mut written).unwrap();
        assert_eq!(written, "0");
    }
}
