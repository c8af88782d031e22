//! Resource limits.

use nix::unistd::Pid;
use oci_spec::runtime::{PosixRlimit, PosixRlimitType};

use crate::error::{Context, Result};
use crate::sys::process::set_limit;

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
