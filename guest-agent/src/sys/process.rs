//! Processes: forking into namespaces and a cgroup, limits, capabilities, filters.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::unistd::Pid;
use rvm_protocol::ExitStatus;

use super::{check, descriptor};

/// A child that was forked.
pub struct Child {
    /// Its process id.
    pub pid: Pid,
    /// A descriptor that names it even after its id is used again.
    pub descriptor: OwnedFd,
}

impl Child {
    /// A second handle on the same child.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { pid: self.pid, descriptor: self.descriptor.try_clone()? })
    }
}

/// Forks into a cgroup and into new namespaces, in one step. Returns `None` in the child.
///
/// # Safety
///
/// The calling process must have a single thread: the child goes on with a copy of its memory, in which a
/// lock that another thread held would stay locked for ever.
pub unsafe fn fork_into(cgroup: BorrowedFd<'_>, namespaces: CloneFlags) -> nix::Result<Option<Child>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all fields are integers, for which zero is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces.bits() as u64 | libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM and without a stack this is a fork: the child returns from the same call on a
    // copy of this stack. `arguments` and `pidfd` outlive the call; the caller vouches for the threads.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match Errno::result(result)? {
        0 => Ok(None),
        pid => {
            let descriptor = descriptor(libc::c_long::from(pidfd))?;
            Ok(Some(Child { pid: Pid::from_raw(pid as libc::pid_t), descriptor }))
        }
    }
}

/// Of `clone3(2)` only; above the 32 bits of the older call's flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A child that has ended and is not yet reaped, if there is one: until it is, its id names it.
pub fn find_ended() -> Option<Pid> {
    loop {
        // SAFETY: all fields are integers or pointers that nobody follows, for which zero is a value.
        let mut information: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: the kernel writes one `siginfo_t`.
        match Errno::result(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut information, options) }) {
            Err(Errno::EINTR) => {}
            Err(_) => return None,
            // SAFETY: for waitid(2) the kernel fills in the fields of SIGCHLD, or none, which leaves a zero.
            Ok(_) => return Some(unsafe { information.si_pid() }).filter(|pid| *pid > 0).map(Pid::from_raw),
        }
    }
}

/// Reaps a child that has ended. The status is decoded here because nix knows no real-time signals, and would
/// lose the end of a process that one of them killed.
pub fn reap(child: Pid) -> Option<ExitStatus> {
    loop {
        let mut status: libc::c_int = 0;
        // SAFETY: the kernel writes one integer to `status`.
        match Errno::result(unsafe { libc::waitpid(child.as_raw(), &raw mut status, libc::WNOHANG) }) {
            // Without WUNTRACED and WCONTINUED, whatever is told is an end.
            Ok(1..) => return Some(exit_status(status)),
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return None,
        }
    }
}

fn exit_status(status: libc::c_int) -> ExitStatus {
    if libc::WIFEXITED(status) {
        ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
    } else {
        ExitStatus::Signal(libc::WTERMSIG(status) as u8)
    }
}

/// Opens a descriptor of a process, which is readable when it has ended.
pub fn open_process(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: takes plain integers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// Whether a child, which may have ended but is not yet reaped, has executed a program since it was forked.
pub fn has_executed(child: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| !has_only_forked(&stat))
}

/// `PF_FORKNOEXEC` among the flags of a line of `/proc/PID/stat` (proc_pid_stat(5)).
fn has_only_forked(stat: &str) -> bool {
    const FORKED: u64 = 0x40;
    // The name may hold anything, but ends with the last parenthesis; the flags are the seventh field after it.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let flags = fields.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_none_or(|flags| flags & FORKED != 0)
}

/// Sends a signal, which may be a real-time one, to the process that a descriptor names.
pub fn send_signal_to(process: impl AsFd, signal: i32) -> nix::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open for the whole call, and no information about the signal is allowed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_fd().as_raw_fd(), signal, none, 0) })
}

/// Sends a signal, which may be a real-time one.
pub fn send_signal(pid: Pid, signal: i32) -> nix::Result<()> {
    // SAFETY: takes plain integers.
    check(libc::c_long::from(unsafe { libc::kill(pid.as_raw(), signal) }))
}

/// Sets a resource limit of any process.
pub fn set_limit(pid: Pid, resource: u32, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is valid for reads, and a null old limit is allowed.
    check(libc::c_long::from(unsafe {
        libc::prlimit64(pid.as_raw(), resource, &raw const limit, std::ptr::null_mut())
    }))
}

/// How a process is scheduled, as the kernel's `struct sched_attr` in its first version (sched_setattr(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulingAttributes {
    /// Size of this structure.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// The nice value, for ordinary policies.
    pub nice: i32,
    /// The priority, for real-time policies.
    pub priority: u32,
    /// Nanoseconds a period, for the deadline policy.
    pub runtime: u64,
    /// Nanoseconds until they must be had.
    pub deadline: u64,
    /// Nanoseconds of a period.
    pub period: u64,
}

/// Sets how a process is scheduled.
pub fn set_scheduling(pid: Pid, attributes: &SchedulingAttributes) -> nix::Result<()> {
    // SAFETY: the kernel reads as many bytes as `size` says, which is the size of the structure.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid.as_raw(), &raw const *attributes, 0) })
}

/// Sets the I/O priority of a process.
pub fn set_io_priority(pid: Pid, value: i32) -> nix::Result<()> {
    /// `IOPRIO_WHO_PROCESS`.
    const PROCESS: libc::c_int = 1;
    // SAFETY: takes plain integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, PROCESS, pid.as_raw(), value) })
}

/// Closes every descriptor above the standard streams that is not to be kept.
///
/// # Safety
///
/// Nothing in the calling process may use, or close, one of the others from here on.
pub unsafe fn close_all_but(keep: &[BorrowedFd<'_>]) -> nix::Result<()> {
    for (first, last) in gaps(keep.iter().map(|descriptor| descriptor.as_raw_fd() as u32).collect()) {
        // SAFETY: the caller vouches that nothing owns these any more.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    }
    Ok(())
}

/// The ranges of numbers above the standard streams between the ones to be kept.
fn gaps(mut keep: Vec<u32>) -> Vec<(u32, u32)> {
    keep.sort_unstable();
    let mut first = libc::STDERR_FILENO as u32 + 1;
    let mut gaps = Vec::new();
    for number in keep {
        if number > first {
            gaps.push((first, number - 1));
        }
        first = first.max(number + 1);
    }
    gaps.push((first, u32::MAX));
    gaps
}

/// Marks every descriptor from `first` on to be closed by `execve`.
pub fn close_on_exec_from(first: u32) -> nix::Result<()> {
    // SAFETY: changes flags only; no descriptor is closed under its owner.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
}

/// Makes a terminal the controlling one of the calling process, which must lead a session.
pub fn set_controlling_terminal(terminal: impl AsFd) -> nix::Result<()> {
    // SAFETY: the descriptor is open, and the argument of this ioctl is a plain integer.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }))
}

/// Opens the slave end of a pseudo-terminal by its master end.
pub fn open_terminal_peer(master: impl AsFd) -> nix::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the descriptor is open, and the argument of this ioctl is a plain integer.
    descriptor(libc::c_long::from(unsafe {
        libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags)
    }))
}

/// Allows the slave end of a new pseudo-terminal to be opened.
pub fn unlock_terminal(master: impl AsFd) -> nix::Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel reads one integer from `locked`.
    check(libc::c_long::from(unsafe {
        libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &raw const locked)
    }))
}

/// The number of a pseudo-terminal, by its master end.
pub fn terminal_number(master: impl AsFd) -> nix::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the descriptor is open, and the kernel writes one integer to `number`.
    check(libc::c_long::from(unsafe {
        libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTN, &raw mut number)
    }))?;
    Ok(number)
}

/// Sets the size of a terminal, in characters.
pub fn set_terminal_size(terminal: impl AsFd, rows: u16, columns: u16) -> nix::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open, and the kernel reads one `winsize`.
    check(libc::c_long::from(unsafe {
        libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size)
    }))
}

/// How many bytes can be read from a pipe at once.
pub fn readable_bytes(pipe: impl AsFd) -> nix::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one integer to `count`.
    check(libc::c_long::from(unsafe {
        libc::ioctl(pipe.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count)
    }))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The three capability sets that `capset(2)` sets together, as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityMasks {
    /// What is in force.
    pub effective: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// What `execve` may keep.
    pub inheritable: u64,
}

/// Sets the capabilities of the calling process.
pub fn set_capabilities(masks: CapabilityMasks) -> nix::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3: 64 bits, in two halves.
    let header = Header { version: 0x2008_0522, pid: 0 };
    let half = |shift: u32| Half {
        effective: (masks.effective >> shift) as u32,
        permitted: (masks.permitted >> shift) as u32,
        inheritable: (masks.inheritable >> shift) as u32,
    };
    let halves = [half(0), half(32)];
    // SAFETY: version 3 makes the kernel read exactly one header and two halves.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) })
}

/// Whether the bounding set holds a capability; an error for one that the kernel does not know.
pub fn bounding_set_holds(capability: u8) -> nix::Result<bool> {
    Ok(control(libc::PR_CAPBSET_READ, capability.into(), 0)? == 1)
}

/// Takes a capability out of the bounding set.
pub fn drop_from_bounding_set(capability: u8) -> nix::Result<()> {
    control(libc::PR_CAPBSET_DROP, capability.into(), 0).map(drop)
}

/// Empties the ambient set.
pub fn clear_ambient_set() -> nix::Result<()> {
    control(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0).map(drop)
}

/// Adds a capability, which must be permitted and inheritable, to the ambient set.
pub fn raise_in_ambient_set(capability: u8) -> nix::Result<()> {
    control(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, capability.into()).map(drop)
}

fn control(option: libc::c_int, second: u64, third: u64) -> nix::Result<libc::c_int> {
    // SAFETY: the callers above pass options of which no argument is a pointer; the unused ones are zero.
    Errno::result(unsafe { libc::prctl(option, second, third, 0u64, 0u64) })
}

/// Installs a seccomp filter in the calling process.
pub fn install_filter(instructions: &[libc::sock_filter], flags: u32) -> nix::Result<()> {
    let length = u16::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: `program` names `length` instructions, which the kernel only reads.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
}

/// Sets the NIS domain name of the UTS namespace.
pub fn set_domain_name(name: &str) -> nix::Result<()> {
    // SAFETY: the kernel reads exactly the bytes of `name`.
    check(libc::c_long::from(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_numbers_are_closed_but_those_to_be_kept() {
        assert_eq!(gaps(vec![]), [(3, u32::MAX)]);
        assert_eq!(gaps(vec![7, 3, 4, 7, 1]), [(5, 6), (8, u32::MAX)]);
    }

    #[test]
    fn a_process_that_has_only_forked_is_told_from_one_that_has_executed() {
        let line = |flags: u32| format!("12 (a) b) R 1 12 12 0 -1 {flags} 100 0");
        assert!(has_only_forked(&line(0x40_0040)));
        assert!(!has_only_forked(&line(0x40_0000)));
        assert!(has_only_forked("nonsense"), "an end that cannot be told is no success");
        assert!(has_executed(nix::unistd::getpid()));
    }

    #[test]
    fn every_way_of_ending_is_decoded() {
        assert_eq!(exit_status(0), ExitStatus::Code(0));
        assert_eq!(exit_status(255 << 8), ExitStatus::Code(255));
        assert_eq!(exit_status(libc::SIGKILL), ExitStatus::Signal(9));
        // With a core dump.
        assert_eq!(exit_status(libc::SIGSEGV | 0x80), ExitStatus::Signal(11));
        for signal in 34..=64u8 {
            assert_eq!(exit_status(signal.into()), ExitStatus::Signal(signal));
        }
    }
}
