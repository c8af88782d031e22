//! Resource limits.

use nix::sys::resource::{self, Resource};
use nix::unistd::Pid;
use oci_spec::runtime::{PosixRlimit, PosixRlimitType};

use crate::error::{Context, Result};
use crate::sys::process::set_limit;

/// How many open files a process may have unless it asks for more, or for less: programs that use select(2) break
/// with more.
const OPEN_FILES: u64 = 1024;

/// Gives a process that names no limit of open files the usual one. It would inherit the agent's own, which serves
/// the streams of all processes.
pub fn apply_default(pid: Pid, limits: &[PosixRlimit]) -> Result<()> {
    if limits.iter().any(|limit| limit.typ() == PosixRlimitType::RlimitNofile) {
        return Ok(());
    }
    let what = || "setting the usual limit of open files";
    let (_, hard) = resource::getrlimit(Resource::RLIMIT_NOFILE).context(what)?;
    set_limit(pid, libc::RLIMIT_NOFILE, OPEN_FILES.min(hard), hard).context(what)
}

/// Sets the limits of a process.
pub fn apply(pid: Pid, limits: &[PosixRlimit]) -> Result<()> {
    for limit in limits {
        set_limit(pid, resource(limit.typ()), limit.soft(), limit.hard()).context(|| {
            format!("setting {:?} to {} (soft) and {} (hard)", limit.typ(), limit.soft(), limit.hard())
        })?;
    }
    Ok(())
}

fn resource(limit: PosixRlimitType) -> u32 {
    use PosixRlimitType::*;
    match limit {
        RlimitCpu => libc::RLIMIT_CPU,
        RlimitFsize => libc::RLIMIT_FSIZE,
        RlimitData => libc::RLIMIT_DATA,
        RlimitStack => libc::RLIMIT_STACK,
        RlimitCore => libc::RLIMIT_CORE,
        RlimitRss => libc::RLIMIT_RSS,
        RlimitNproc => libc::RLIMIT_NPROC,
        RlimitNofile => libc::RLIMIT_NOFILE,
        RlimitMemlock => libc::RLIMIT_MEMLOCK,
        RlimitAs => libc::RLIMIT_AS,
        RlimitLocks => libc::RLIMIT_LOCKS,
        RlimitSigpending => libc::RLIMIT_SIGPENDING,
        RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        RlimitNice => libc::RLIMIT_NICE,
        RlimitRtprio => libc::RLIMIT_RTPRIO,
        RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
