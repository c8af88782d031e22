//! What the threads that a guest can talk to are not allowed.
//!
//! A monitor needs capabilities to serve files, and threads inherit them. One that runs a vCPU, or moves packets and
//! sectors between descriptors that are open already, needs none: should a guest take it over, it gains none either.

use std::collections::BTreeMap;
use std::io;

use caps::{CapSet, CapsHashSet};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Takes all capabilities from the calling thread, for good. Other threads keep theirs; those that this one starts
/// have none.
pub fn drop_capabilities() {
    // The bounding set stays: without a permitted capability it gives nothing, short of executing a file that has
    // some, which the monitor forbids itself for all threads (no new privileges).
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        // To give up is always allowed. A kernel without ambient capabilities has none to give up.
        let _ = caps::clear(None, set);
    }
}

/// Leaves the calling thread, and those that it starts, with these of its capabilities, which no program that they execute
/// gets.
///
/// # Errors
///
/// The thread does not have them all.
pub fn keep_capabilities(kept: &CapsHashSet) -> io::Result<()> {
    // A kernel without ambient capabilities has none to give up.
    let _ = caps::clear(None, CapSet::Ambient);
    caps::clear(None, CapSet::Inheritable).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, kept).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, kept).map_err(io::Error::other)
}

/// What a thread that runs a vCPU calls of the kernel beside KVM: to wait and to wake, to hand work to the threads of
/// devices through descriptors that are open already, to have memory, and to end.
const OF_VCPUS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_ctl,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What one calls beside that which also serves files: all that names, attributes and contents of files take, and to become
/// a thread that serves them.
const OF_FILES: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_fchdir,
    libc::SYS_umask,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capget,
    libc::SYS_capset,
];

/// What a thread of a vCPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// It runs the vCPU.
    Vcpu,
    /// It also serves files that the vCPU asks for, with the capabilities that this takes.
    VcpuWithFiles,
}

/// The type that all requests of KVM carry in the second byte of their number (`KVMIO`, linux/kvm.h).
const KVM_REQUESTS: u64 = 0xAE00;

/// What a network device asks of its tap when a driver starts it: TUNSETOFFLOAD and TUNSETVNETHDRSZ (linux/if_tun.h).
const TAP_REQUESTS: [u64; 2] = [
    nix::request_code_write!(b'T', 208, size_of::<u32>()),
    nix::request_code_write!(b'T', 216, size_of::<i32>()),
];

/// Leaves the calling thread with only those system calls that running a vCPU takes, which starts and resets devices,
/// too. Others fail with EPERM: a container is worth more than the alarm. Without files to serve it has no capabilities
/// either.
///
/// # Errors
///
/// The kernel does not take the filter.
pub fn enter_vcpu(duty: Duty) -> io::Result<()> {
    if duty == Duty::Vcpu {
        drop_capabilities();
    }
    seccompiler::apply_filter(&vcpu_filter(duty).map_err(io::Error::other)?).map_err(io::Error::other)
}

fn vcpu_filter(duty: Duty) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<_, _> = OF_VCPUS.iter().map(|call| (*call, Vec::new())).collect();
    if duty == Duty::VcpuWithFiles {
        rules.extend(OF_FILES.iter().map(|call| (*call, Vec::new())));
        let own_paths = libc::CLONE_FS.cast_unsigned().into();
        rules.insert(libc::SYS_unshare, vec![where_masked(0, u64::MAX, own_paths)?]);
        let bits = [libc::PR_GET_SECUREBITS, libc::PR_SET_SECUREBITS];
        let bits = bits.map(|option| where_masked(0, u64::MAX, option.cast_unsigned().into()));
        rules.insert(libc::SYS_prctl, bits.into_iter().collect::<Result<_, _>>()?);
    }
    let mut requests = vec![where_masked(1, 0xFF00, KVM_REQUESTS)?];
    for request in TAP_REQUESTS {
        requests.push(where_masked(1, u64::from(u32::MAX), request)?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![where_masked(2, executable, 0)?]);
    }
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Holds for a call whose argument of this number has this value in the bits of the mask.
fn where_masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    let equal = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, equal, value)?])
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SETS: [CapSet; 4] = [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted];

    fn count() -> usize {
        SETS.iter().map(|set| caps::read(None, *set).unwrap().len()).sum()
    }

    #[test]
    fn a_thread_gives_up_its_own_capabilities_and_those_of_threads_it_starts() {
        let before = count();
        let confined = thread::spawn(|| {
            drop_capabilities();
            (count(), thread::spawn(count).join().unwrap())
        });
        assert_eq!(confined.join().unwrap(), (0, 0));
        assert_eq!(count(), before);
    }

    #[test]
    fn a_vcpus_thread_opens_connects_and_executes_nothing() {
        let refused = thread::spawn(|| {
            enter_vcpu(Duty::Vcpu).unwrap();
            let errors = [
                std::fs::File::open("/dev/null").map(drop),
                std::net::TcpListener::bind("127.0.0.1:0").map(drop),
                std::process::Command::new("/bin/true").status().map(drop),
                thread::Builder::new().spawn(|| ()).map(drop),
            ];
            errors.map(|result| result.unwrap_err().raw_os_error())
        });
        assert_eq!(refused.join().unwrap(), [Some(libc::EPERM); 4]);
    }

    #[test]
    fn one_that_serves_files_opens_and_keeps_its_capabilities_and_still_does_no_more() {
        let before = count();
        let outcome = thread::spawn(|| {
            enter_vcpu(Duty::VcpuWithFiles).unwrap();
            let errors = [
                std::net::TcpListener::bind("127.0.0.1:0").map(drop),
                std::process::Command::new("/bin/true").status().map(drop),
                thread::Builder::new().spawn(|| ()).map(drop),
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(io::Error::from),
                nix::unistd::chroot("/").map_err(io::Error::from),
            ];
            let errors = errors.map(|result| result.unwrap_err().raw_os_error());
            (std::fs::File::open("/dev/null").is_ok(), errors, count())
        });
        assert_eq!(outcome.join().unwrap(), (true, [Some(libc::EPERM); 5], before));
    }

    #[test]
    fn a_vcpus_thread_has_memory_that_is_not_executable_and_few_requests() {
        let outcome = thread::spawn(|| {
            enter_vcpu(Duty::Vcpu).unwrap();
            let map = |protection| {
                // SAFETY: a new mapping where there is none touches no other memory.
                let at = unsafe {
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
                };
                at != libc::MAP_FAILED
            };
            let mut bytes: libc::c_int = 0;
            // SAFETY: the request writes a whole number to where the pointer leads.
            let asked = unsafe { libc::ioctl(0, libc::FIONREAD, &raw mut bytes) };
            let error = io::Error::last_os_error().raw_os_error();
            (vec![0_u8; 1 << 20].len(), map(libc::PROT_READ), map(libc::PROT_EXEC), asked, error)
        });
        assert_eq!(outcome.join().unwrap(), (1 << 20, true, false, -1, Some(libc::EPERM)));
    }
}
