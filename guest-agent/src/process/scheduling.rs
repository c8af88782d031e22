//! How a process is scheduled: its personality, its policy, its I/O priority, its processors.
//!
//! All but the personality are set by the agent, from outside: inside of a user namespace a process has not the
//! privilege for most of them.

use nix::errno::Errno;
use nix::sched::{self, CpuSet};
use nix::sys::personality::{self, Persona};
use nix::unistd::Pid;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler,
};

use crate::error::{Context, Result, errno_text, other};
use crate::sys::process::{SchedulingAttributes, set_io_priority, set_scheduling};

/// The most favourable I/O priority is 0, this the least one.
const LEAST_IO_PRIORITY: i64 = 7;

/// Sets the execution domain of the calling process.
pub fn set_personality(wanted: &LinuxPersonality) -> Result<()> {
    let persona = match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => Persona::empty(),
        // PER_LINUX32; nix names only the flags beside the domain.
        LinuxPersonalityDomain::PerLinux32 => Persona::from_bits_retain(0x0008),
    };
    personality::set(persona).map(drop).context(|| "setting the personality")
}

/// Sets what a process's description asks for. `joins` is true for a further process of a container: only such a
/// one has processors of its own.
pub fn apply(pid: Pid, process: &Process, joins: bool) -> Result<()> {
    if let Some(affinity) = process.exec_cpu_affinity().as_ref().filter(|_| joins) {
        // The initial one is for the time before the process is in the container's cgroup; here it is forked there.
        if let Some(list) = affinity.cpu_affinity_final().as_deref().filter(|list| !list.is_empty()) {
            set_affinity(pid, list)?;
        }
    }
    if let Some(priority) = process.io_priority() {
        let value = io_priority(priority)?;
        set_io_priority(pid, value).context(|| {
            format!("setting the I/O priority to {} of {}", priority.priority(), priority.class())
        })?;
    }
    if let Some(scheduler) = process.scheduler() {
        set_scheduling(pid, &attributes(scheduler)?)
            .context(|| format!("setting the scheduling policy {}", scheduler.policy()))?;
    }
    Ok(())
}

fn set_affinity(pid: Pid, list: &str) -> Result<()> {
    let processors = processors(list)?;
    sched::sched_setaffinity(pid, &processors).map_err(|errno| match errno {
        Errno::EINVAL => other(format!("the virtual machine has none of the processors {list:?}")),
        errno => other(format!("binding the process to the processors {list:?}: {}", errno_text(errno))),
    })
}

/// The processors of a list such as `0-3,7`.
fn processors(list: &str) -> Result<CpuSet> {
    let invalid = || other(format!("{list:?} is no list of processors"));
    let mut set = CpuSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| invalid());
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::count() {
            return Err(invalid());
        }
        for processor in first..=last {
            set.set(processor).map_err(|_| invalid())?;
        }
    }
    Ok(set)
}

/// The class and the priority in it as ioprio_set(2) takes them.
fn io_priority(wanted: &LinuxIOPriority) -> Result<i32> {
    const CLASS_SHIFT: i32 = 13;
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let priority = wanted.priority();
    if !(0..=LEAST_IO_PRIORITY).contains(&priority) {
        return Err(other(format!("the I/O priority {priority} is not one of 0 to {LEAST_IO_PRIORITY}")));
    }
    Ok(class << CLASS_SHIFT | priority as i32)
}

fn attributes(wanted: &Scheduler) -> Result<SchedulingAttributes> {
    use LinuxSchedulerPolicy::*;
    let policy = match wanted.policy() {
        SchedOther => 0,
        SchedFifo => 1,
        SchedRr => 2,
        SchedBatch => 3,
        SchedIso => return Err(other("the scheduling policy SCHED_ISO is not implemented by Linux")),
        SchedIdle => 5,
        SchedDeadline => 6,
    };
    let nice = wanted.nice().unwrap_or(0);
    // The kernel would take the nearest one.
    if !(-20..=19).contains(&nice) {
        return Err(other(format!("the nice value {nice} is not one of -20 to 19")));
    }
    let priority = wanted.priority().unwrap_or(0);
    let priority = u32::try_from(priority)
        .map_err(|_| other(format!("the scheduling priority {priority} is below zero")))?;
    let flags = wanted.flags().iter().flatten().fold(0, |flags, flag| flags | bit(*flag));
    Ok(SchedulingAttributes {
        size: size_of::<SchedulingAttributes>() as u32,
        policy,
        flags,
        nice,
        priority,
        runtime: wanted.runtime().unwrap_or(0),
        deadline: wanted.deadline().unwrap_or(0),
        period: wanted.period().unwrap_or(0),
    })
}

fn bit(flag: LinuxSchedulerFlag) -> u64 {
    use LinuxSchedulerFlag::*;
    match flag {
        SchedResetOnFork => 0x01,
        SchedFlagReclaim => 0x02,
        SchedFlagDLOverrun => 0x04,
        SchedFlagKeepPolicy => 0x08,
        SchedFlagKeepParams => 0x10,
        SchedFlagUtilClampMin => 0x20,
        SchedFlagUtilClampMax => 0x40,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduler(json: &str) -> Result<SchedulingAttributes> {
        attributes(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_scheduler_becomes_the_kernels_attributes() {
        let found = scheduler(
            r#"{ "policy": "SCHED_DEADLINE", "flags": ["SCHED_RESET_ON_FORK"],
                 "runtime": 1, "deadline": 2, "period": 3 }"#,
        );
        let found = found.unwrap();
        assert_eq!((found.policy, found.flags), (6, 1));
        assert_eq!((found.runtime, found.deadline, found.period), (1, 2, 3));
        let found = scheduler(r#"{ "policy": "SCHED_BATCH", "nice": -5 }"#).unwrap();
        assert_eq!((found.policy, found.nice, found.size), (3, -5, 48));
    }

    #[test]
    fn what_no_kernel_schedules_is_refused() {
        for json in [
            r#"{ "policy": "SCHED_ISO" }"#,
            r#"{ "policy": "SCHED_OTHER", "nice": 20 }"#,
            r#"{ "policy": "SCHED_FIFO", "priority": -1 }"#,
        ] {
            assert!(scheduler(json).is_err(), "{json}");
        }
    }

    #[test]
    fn an_io_priority_is_a_class_and_a_number() {
        let value = |json: &str| io_priority(&serde_json::from_str(json).unwrap());
        assert_eq!(value(r#"{ "class": "IOPRIO_CLASS_BE", "priority": 5 }"#).unwrap(), 2 << 13 | 5);
        assert!(value(r#"{ "class": "IOPRIO_CLASS_RT", "priority": 8 }"#).is_err());
        assert!(value(r#"{ "class": "IOPRIO_CLASS_IDLE", "priority": -1 }"#).is_err());
    }

    #[test]
    fn lists_of_processors_are_read() {
        let set = processors("0-2,7").unwrap();
        let found: Vec<usize> = (0..16).filter(|number| set.is_set(*number).unwrap()).collect();
        assert_eq!(found, [0, 1, 2, 7]);
        for list in ["", "a", "3-1", "0-99999999", "1,", "-1"] {
            assert!(processors(list).is_err(), "{list}");
        }
    }

    proptest! {
        #[test]
        fn no_list_causes_a_panic(list in "[0-9,-]{0,12}") {
            let _ = processors(&list);
        }
    }
}
