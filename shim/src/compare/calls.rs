//! How many of the host's system calls a container's processes can make: the kernel tells which filters each thread has,
//! and the filters tell what they let through.

use std::fs;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::Serialize;

use super::filter::{Instruction, all_calls, may_pass};
use super::measure::KernelOwner;

/// Asks for one of the filters of a thread that stands still (linux/ptrace.h).
const GET_FILTER: libc::c_uint = 0x420c;
/// No filter is longer (`BPF_MAXINSNS`).
const LONGEST: usize = 4096;

/// System calls of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCalls {
    /// How many the workload can make.
    pub workload: usize,
    /// How many the process on the host can make that is the container: by the thread that is allowed the most.
    pub most: usize,
    /// And by the one that is allowed the least.
    pub least: usize,
    /// How many there are.
    pub known: usize,
}

/// Looks at the process that is the container on the host. None where that is not allowed or not possible.
pub fn of(process: i32, owner: KernelOwner) -> Option<HostCalls> {
    let known = all_calls();
    let tasks = fs::read_dir(format!("/proc/{process}/task")).ok()?.flatten();
    let counts = tasks.filter_map(|task| count(task.file_name().to_str()?.parse().ok()?, &known));
    let counts: Vec<usize> = counts.collect();
    let (most, least) = (counts.iter().copied().max()?, counts.iter().copied().min()?);
    let workload = match owner {
        KernelOwner::Host => most,
        // Another kernel answers them.
        KernelOwner::Machine | KernelOwner::Program => 0,
    };
    Some(HostCalls { workload, most, least, known: known.len() })
}

/// How many of the calls get through all filters of a thread.
fn count(thread: i32, calls: &[u32]) -> Option<usize> {
    let filters = filters(Pid::from_raw(thread)).ok()?;
    let mut count = 0;
    for call in calls {
        let mut passes = true;
        for filter in &filters {
            passes = passes && may_pass(filter, *call)?;
        }
        count += usize::from(passes);
    }
    Some(count)
}

/// The filters of a thread, which stands still for that long.
fn filters(thread: Pid) -> nix::Result<Vec<Vec<Instruction>>> {
    ptrace::seize(thread, Options::empty())?;
    let result = ptrace::interrupt(thread)
        .and_then(|()| waitpid(thread, Some(WaitPidFlag::__WALL)))
        .and_then(|_| (0..).map_while(|index| filter(thread, index).transpose()).collect());
    // It may have ended.
    let _ = ptrace::detach(thread, None);
    result
}

/// One of them; the youngest is the first.
fn filter(thread: Pid, index: usize) -> nix::Result<Option<Vec<Instruction>>> {
    let mut instructions = vec![Instruction::default(); LONGEST];
    // SAFETY: the kernel writes to the buffer, which has room for the longest filter.
    let length = unsafe { libc::ptrace(GET_FILTER, thread.as_raw(), index, instructions.as_mut_ptr()) };
    match Errno::result(length) {
        Ok(length) => {
            instructions.truncate(usize::try_from(length).unwrap_or(0));
            Ok(Some(instructions))
        }
        // No further one, or none at all.
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

    use super::*;

    #[test]
    fn a_filter_is_read_from_the_process_that_has_it() {
        let rules = [(libc::SYS_mount, Vec::new()), (libc::SYS_reboot, Vec::new())].into_iter().collect();
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64).unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        let mut plain = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut command = Command::new("sleep");
        let confine = move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other);
        // SAFETY: it makes two system calls, and takes no lock.
        unsafe { command.pre_exec(confine) };
        let mut confined = command.arg("1000").spawn().unwrap();
        let [all, some] = [&plain, &confined].map(|child| of(child.id().cast_signed(), KernelOwner::Host));
        for child in [&mut plain, &mut confined] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let (Some(all), Some(some)) = (all, some) else {
            eprintln!("not tested: it takes CAP_SYS_ADMIN and a kernel that tells filters");
            return;
        };
        assert_eq!((all.workload, all.least), (all.known, all.known));
        assert_eq!((some.workload, some.most), (all.known - 2, all.known - 2));
    }

    #[test]
    fn who_has_another_kernel_reaches_none() {
        assert_eq!(of(i32::MAX, KernelOwner::Host), None);
    }
}
