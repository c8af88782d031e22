//! The limits of a process that its description does not name.
//!
//! With other runtimes it is a child of theirs and has those that the engine runs with, such as the number of open files that
//! a service manager grants. In a guest it is nobody's child here, so they are sent along.

use nix::sys::resource::{Resource, getrlimit};
use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process};
use rvm_protocol::MOST_OPEN_FILES;

const KINDS: [(PosixRlimitType, Resource); 16] = [
    (PosixRlimitType::RlimitCpu, Resource::RLIMIT_CPU),
    (PosixRlimitType::RlimitFsize, Resource::RLIMIT_FSIZE),
    (PosixRlimitType::RlimitData, Resource::RLIMIT_DATA),
    (PosixRlimitType::RlimitStack, Resource::RLIMIT_STACK),
    (PosixRlimitType::RlimitCore, Resource::RLIMIT_CORE),
    (PosixRlimitType::RlimitRss, Resource::RLIMIT_RSS),
    (PosixRlimitType::RlimitNproc, Resource::RLIMIT_NPROC),
    (PosixRlimitType::RlimitNofile, Resource::RLIMIT_NOFILE),
    (PosixRlimitType::RlimitMemlock, Resource::RLIMIT_MEMLOCK),
    (PosixRlimitType::RlimitAs, Resource::RLIMIT_AS),
    (PosixRlimitType::RlimitLocks, Resource::RLIMIT_LOCKS),
    (PosixRlimitType::RlimitSigpending, Resource::RLIMIT_SIGPENDING),
    (PosixRlimitType::RlimitMsgqueue, Resource::RLIMIT_MSGQUEUE),
    (PosixRlimitType::RlimitNice, Resource::RLIMIT_NICE),
    (PosixRlimitType::RlimitRtprio, Resource::RLIMIT_RTPRIO),
    (PosixRlimitType::RlimitRttime, Resource::RLIMIT_RTTIME),
];

/// Adds the limits of the calling process where the description names none of that kind.
pub fn inherit_limits(process: &mut Process) {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    for (kind, resource) in KINDS {
        if !limits.iter().any(|limit| limit.typ() == kind) {
            limits.extend(own(kind, resource));
        }
    }
    process.set_rlimits(Some(limits));
}

/// A limit of the calling process. The kernel knows all of them.
fn own(kind: PosixRlimitType, resource: Resource) -> Option<PosixRlimit> {
    let (mut soft, mut hard) = getrlimit(resource).ok()?;
    if kind == PosixRlimitType::RlimitNofile {
        (soft, hard) = (soft.min(MOST_OPEN_FILES), hard.min(MOST_OPEN_FILES));
    }
    PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_stays_and_the_rest_is_the_callers() {
        let named = PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile);
        let files = named.soft(5_u64).hard(6_u64).build().unwrap();
        let mut process = Process::default();
        process.set_rlimits(Some(vec![files]));
        inherit_limits(&mut process);
        let limits = process.rlimits().clone().unwrap();
        assert_eq!(limits.len(), KINDS.len());
        assert_eq!(limits[0], files);
        let stack = limits.iter().find(|limit| limit.typ() == PosixRlimitType::RlimitStack).unwrap();
        assert_eq!((stack.soft(), stack.hard()), getrlimit(Resource::RLIMIT_STACK).unwrap());
    }
}
