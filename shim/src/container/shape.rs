//! How large the virtual machine is: vCPUs and memory from the spec's limits and the host's size; and what the host
//! has to allow it.

use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
/// What the guest's kernel and agent need for themselves, besides a share that grows with the memory. 22 MiB of it the
/// kernel never gives away, so that there are huge pages (`vm.min_free_kbytes`).
const GUEST_OVERHEAD: u64 = 48 * MIB;
/// The kernel's `struct page`s and the like take this share of the memory.
const OVERHEAD_DIVISOR: u64 = 50;
/// The monitor's own memory: its code, buffers, and pages of served files.
const MONITOR: u64 = 64 * MIB;
/// The host keeps page tables and the like for this share of the guest's memory.
const HOST_DIVISOR: u64 = 64;
/// Memory of a container without a limit, where the host has plenty.
const DEFAULT_MEMORY: u64 = 1024 * MIB;
/// No guest boots in less.
const LEAST_MEMORY: u64 = 96 * MIB;
/// vCPUs of a container without a limit or processors of its own.
const DEFAULT_VCPUS: u64 = 4;
/// The most vCPUs, whatever the spec says.
const MOST_VCPUS: u64 = 64;

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The machine's memory in bytes.
    pub memory: u64,
    /// What the workload may use of it, where limited.
    pub memory_limit: Option<u64>,
}

/// An update asks for more than the machine has, whose size was settled when it was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// Memory.
    #[error(
        "linux.resources.memory.limit: the container's virtual machine was made with {machine} bytes of memory, of \
         which a workload can have {most} at most; create the container anew with the limit {wanted}"
    )]
    Memory {
        /// What is asked for.
        wanted: u64,
        /// What the machine has.
        machine: u64,
        /// What would be possible.
        most: u64,
    },
    /// Processors.
    #[error(
        "linux.resources.cpu.quota: the container's virtual machine was made with {vcpus} processors; create the \
         container anew for the time of {wanted}"
    )]
    Processors {
        /// What is asked for.
        wanted: u64,
        /// What the machine has.
        vcpus: u8,
    },
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub struct HostSize {
    /// Processors that this process may use.
    pub processors: u64,
    /// Memory in bytes.
    pub memory: u64,
}

impl HostSize {
    /// Asks the host.
    pub fn read() -> HostSize {
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
        HostSize { processors, memory: total_memory().unwrap_or(DEFAULT_MEMORY * 2) }
    }
}

impl Shape {
    /// The shape for a spec on a host.
    pub fn of(spec: &Spec, host: HostSize) -> Shape {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let time = cpu.and_then(|cpu| ProcessorTime::default().changed(cpu));
        let own = cpu.and_then(|cpu| cpu.cpus().as_deref()).and_then(listed);
        let limit = resources.and_then(memory_limit);
        Shape { vcpus: vcpus(time, own, host), memory: memory(limit, host), memory_limit: limit }
    }

    /// The shape for so many processors, and so many bytes of memory for the workload.
    pub fn of_sizes(processors: Option<u64>, limit: Option<u64>, host: HostSize) -> Shape {
        let period = ProcessorTime::default().period;
        let time = processors.map(|count| ProcessorTime { quota: count.checked_mul(period), period });
        Shape { vcpus: vcpus(time, None, host), memory: memory(limit, host), memory_limit: limit }
    }

    /// Whether the machine, once made, can give its workload these limits. Of the processor's time that is `in_force`,
    /// what they leave out stays.
    pub fn can_give(&self, resources: &LinuxResources, in_force: ProcessorTime) -> Result<(), TooLarge> {
        if let Some(wanted) = memory_limit(resources)
            && machine_memory(wanted) > self.memory
            // On a small host even the first limit may have been above what there is.
            && self.memory_limit.is_none_or(|first| wanted > first)
        {
            return Err(TooLarge::Memory {
                wanted,
                machine: self.memory,
                most: workload_memory(self.memory),
            });
        }
        let cpu = resources.cpu().as_ref();
        // What is in force can be set again, also where the machine has fewer because it was bound to fewer.
        let most = in_force.processors().unwrap_or(0).max(self.vcpus.into());
        match cpu.and_then(|cpu| in_force.changed(cpu)).and_then(ProcessorTime::processors) {
            Some(wanted) if wanted > most => Err(TooLarge::Processors { wanted, vcpus: self.vcpus }),
            _ => Ok(()),
        }
    }
}

/// Processor time, if it is limited, and the period in which it may be used, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessorTime {
    /// The time.
    pub quota: Option<u64>,
    /// The period.
    pub period: u64,
}

impl Default for ProcessorTime {
    fn default() -> Self {
        Self { quota: None, period: 100_000 }
    }
}

impl ProcessorTime {
    /// With what is given, where something is. Zero is nothing; below zero there is no limit.
    fn changed(self, cpu: &LinuxCpu) -> Option<Self> {
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        (quota.is_some() || period.is_some()).then(|| Self {
            quota: quota.map_or(self.quota, |quota| u64::try_from(quota).ok()),
            period: period.unwrap_or(self.period),
        })
    }

    /// How many processors it takes to use it all.
    fn processors(self) -> Option<u64> {
        (self.period > 0).then_some(self.quota?.div_ceil(self.period))
    }
}

/// The limit of memory, if there is one.
pub fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let limit = u64::try_from(resources.memory().as_ref()?.limit()?).ok()?;
    // Engines write the largest number for "no limit".
    Some(limit).filter(|limit| (1..1 << 60).contains(limit))
}

/// The memory of a machine whose workload may use `limit` bytes.
fn machine_memory(limit: u64) -> u64 {
    let wanted = limit.saturating_add(GUEST_OVERHEAD).saturating_add(limit / OVERHEAD_DIVISOR);
    wanted.max(LEAST_MEMORY).checked_next_multiple_of(2 * MIB).unwrap_or(u64::MAX)
}

/// The reverse: what a workload can have of a machine's memory.
fn workload_memory(machine: u64) -> u64 {
    machine.saturating_sub(GUEST_OVERHEAD) / (OVERHEAD_DIVISOR + 1) * OVERHEAD_DIVISOR
}

/// What the host allows a container whose workload may use `limit` bytes: machine and monitor come on top.
pub fn host_memory(limit: u64) -> u64 {
    let machine = machine_memory(limit);
    machine.saturating_add(machine / HOST_DIVISOR).saturating_add(MONITOR)
}

/// A quota of 1.5 processors is 2 vCPUs, whose time the host's cgroup limits to 1.5. Whoever asks for more than the
/// host has gets them: they take turns. Who has processors of its own has no more vCPUs than these.
fn vcpus(time: Option<ProcessorTime>, own: Option<u64>, host: HostSize) -> u8 {
    let worth = time.and_then(ProcessorTime::processors);
    let wanted = match (worth, own) {
        (Some(worth), Some(own)) => worth.min(own),
        (worth, own) => worth.or(own).unwrap_or(DEFAULT_VCPUS.min(host.processors)),
    };
    wanted.clamp(1, MOST_VCPUS) as u8
}

/// How many processors a list such as `0-2,5` names (cpuset(7), "List format"); an empty one is none, and what is not a list
/// is left to the host's control groups to refuse.
fn listed(list: &str) -> Option<u64> {
    let mut count: u64 = 0;
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    (count > 0).then_some(count)
}

fn memory(limit: Option<u64>, host: HostSize) -> u64 {
    let memory = match limit {
        // Only touched memory costs the host anything, and the guest's cgroup holds the workload to its limit.
        Some(limit) => machine_memory(limit),
        None => DEFAULT_MEMORY.min(host.memory / 2),
    };
    memory.min(host.memory.max(LEAST_MEMORY)).max(LEAST_MEMORY).next_multiple_of(2 * MIB)
}

fn total_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostSize = HostSize { processors: 8, memory: 16 << 30 };

    fn spec(resources: &str) -> Spec {
        let json = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        let shape = Shape::of(&spec("{}"), HOST);
        assert_eq!(shape, Shape { vcpus: 4, memory: 1 << 30, memory_limit: None });
    }

    #[test]
    fn a_small_host_is_not_asked_for_more_than_it_has() {
        let host = HostSize { processors: 1, memory: 1 << 30 };
        assert_eq!(Shape::of(&spec("{}"), host), Shape { vcpus: 1, memory: 512 << 20, memory_limit: None });
    }

    #[test]
    fn a_memory_limit_is_what_the_workload_gets() {
        let shape = Shape::of(&spec(r#"{"memory":{"limit":536870912}}"#), HOST);
        assert_eq!(shape.memory_limit, Some(512 << 20));
        assert!(shape.memory >= (512 << 20) + GUEST_OVERHEAD);
        assert_eq!(shape.memory % (2 << 20), 0);
    }

    #[test]
    fn no_limit_has_several_spellings() {
        for memory in [r#"{"limit":-1}"#, r#"{"limit":0}"#, r#"{"limit":9223372036854771712}"#] {
            let shape = Shape::of(&spec(&format!(r#"{{"memory":{memory}}}"#)), HOST);
            assert_eq!(shape.memory_limit, None, "{memory}");
        }
    }

    #[test]
    fn a_tiny_limit_still_boots_a_guest() {
        let shape = Shape::of(&spec(r#"{"memory":{"limit":4194304}}"#), HOST);
        assert_eq!((shape.memory, shape.memory_limit), (LEAST_MEMORY, Some(4 << 20)));
    }

    #[test]
    fn a_quota_rounds_up_to_whole_vcpus() {
        let count = |cpu: &str| Shape::of(&spec(&format!(r#"{{"cpu":{cpu}}}"#)), HOST).vcpus;
        assert_eq!(count(r#"{"quota":150000,"period":100000}"#), 2);
        assert_eq!(count(r#"{"quota":20000}"#), 1);
        assert_eq!(count(r#"{"quota":-1,"period":100000}"#), 4);
        assert_eq!(count(r#"{"quota":100000,"period":0}"#), 1, "a period of zero is none");
        assert_eq!(count(r#"{"quota":1200000}"#), 12, "more than the host has");
        assert_eq!(u64::from(count(r#"{"quota":640000000}"#)), MOST_VCPUS);
    }

    #[test]
    fn processors_of_its_own_are_its_vcpus() {
        let count = |cpu: &str| Shape::of(&spec(&format!(r#"{{"cpu":{cpu}}}"#)), HOST).vcpus;
        assert_eq!(count(r#"{"cpus":"0"}"#), 1);
        assert_eq!(count(r#"{"cpus":"0-5, 7\n"}"#), 7, "more than without");
        assert_eq!(count(r#"{"cpus":"2-3","quota":400000}"#), 2, "time for four, on two");
        assert_eq!(count(r#"{"cpus":"0-3","quota":150000}"#), 2);
        assert_eq!(u64::from(count(r#"{"cpus":"0-255"}"#)), MOST_VCPUS);
        for no_list in ["", "all", "3-1", "0-18446744073709551615", "-1", "1-"] {
            assert_eq!(count(&format!(r#"{{"cpus":"{no_list}"}}"#)), 4, "{no_list:?}");
        }
    }

    #[test]
    fn what_is_in_force_can_be_set_again_on_fewer_processors() {
        let cpu = r#"{"cpu":{"cpus":"2-3","quota":400000}}"#;
        let shape = Shape::of(&spec(cpu), HOST);
        let in_force = ProcessorTime { quota: Some(400_000), period: 100_000 };
        let can_give = |json: &str| shape.can_give(&serde_json::from_str(json).unwrap(), in_force);
        assert_eq!(can_give(cpu), Ok(()));
        assert_eq!(
            can_give(r#"{"cpu":{"quota":500000}}"#),
            Err(TooLarge::Processors { wanted: 5, vcpus: 2 })
        );
    }

    #[test]
    fn an_update_is_given_what_the_machine_has_and_no_more() {
        let shape = Shape::of(&spec(r#"{"memory":{"limit":536870912},"cpu":{"quota":150000}}"#), HOST);
        let can_give =
            |json: &str| shape.can_give(&serde_json::from_str(json).unwrap(), ProcessorTime::default());
        assert_eq!(can_give(r#"{"memory":{"limit":536870912},"cpu":{"quota":200000}}"#), Ok(()));
        assert_eq!(can_give(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#), Ok(()));
        let Err(TooLarge::Memory { most, .. }) = can_give(r#"{"memory":{"limit":1073741824}}"#) else {
            panic!("more than the machine has")
        };
        assert_eq!(
            can_give(&format!(r#"{{"memory":{{"limit":{most}}}}}"#)),
            Ok(()),
            "what is offered is given"
        );
        let more = can_give(r#"{"cpu":{"quota":500000,"period":100000}}"#);
        assert_eq!(more, Err(TooLarge::Processors { wanted: 5, vcpus: 2 }));
    }

    #[test]
    fn half_of_a_processor_time_is_measured_with_the_half_in_force() {
        let shape = Shape::of(&spec(r#"{"cpu":{"quota":500000,"period":1000000}}"#), HOST);
        let in_force = ProcessorTime { quota: Some(500_000), period: 1_000_000 };
        let can_give = |json: &str| shape.can_give(&serde_json::from_str(json).unwrap(), in_force);
        assert_eq!(can_give(r#"{"cpu":{"quota":900000}}"#), Ok(()));
        assert_eq!(can_give(r#"{"cpu":{"period":500000}}"#), Ok(()));
        assert_eq!(can_give(r#"{"cpu":{"quota":-1,"shares":5}}"#), Ok(()));
        let more = Err(TooLarge::Processors { wanted: 5, vcpus: 1 });
        assert_eq!(can_give(r#"{"cpu":{"period":100000}}"#), more);
        assert_eq!(can_give(r#"{"cpu":{"quota":5000000}}"#), more);
    }

    #[test]
    fn the_first_limit_can_be_set_again_on_a_host_that_has_less() {
        let host = HostSize { processors: 1, memory: 1 << 30 };
        let shape = Shape::of(&spec(r#"{"memory":{"limit":4294967296}}"#), host);
        assert_eq!(
            shape.can_give(
                &serde_json::from_str(r#"{"memory":{"limit":4294967296}}"#).unwrap(),
                ProcessorTime::default()
            ),
            Ok(())
        );
    }
}
