//! How large the virtual machine is: vCPUs and memory from the spec's limits and the host's size.

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
/// What the guest's kernel and agent need for themselves, besides a share that grows with the memory.
const GUEST_OVERHEAD: u64 = 40 * MIB;
/// The kernel's `struct page`s and the like take this share of the memory.
const OVERHEAD_DIVISOR: u64 = 50;
/// Memory of a container without a limit, where the host has plenty.
const DEFAULT_MEMORY: u64 = 1024 * MIB;
/// No guest boots in less.
const LEAST_MEMORY: u64 = 96 * MIB;
/// vCPUs of a container without a limit.
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
        let quota =
            cpu.and_then(|cpu| Some((u64::try_from(cpu.quota()?).ok()?, cpu.period().unwrap_or(100_000))));
        let limit = resources
            .and_then(|resources| resources.memory().as_ref()?.limit())
            .and_then(|limit| u64::try_from(limit).ok())
            // Engines write the largest number for "no limit".
            .filter(|limit| (1..1 << 60).contains(limit));
        Shape { vcpus: vcpus(quota, host), memory: memory(limit, host), memory_limit: limit }
    }
}

/// A quota of 1.5 processors is 2 vCPUs, whose time the host's cgroup limits to 1.5. Whoever asks for more than the
/// host has gets them: they take turns.
fn vcpus(quota: Option<(u64, u64)>, host: HostSize) -> u8 {
    let wanted = match quota {
        Some((quota, period)) if quota > 0 && period > 0 => quota.div_ceil(period),
        _ => DEFAULT_VCPUS.min(host.processors),
    };
    wanted.clamp(1, MOST_VCPUS) as u8
}

fn memory(limit: Option<u64>, host: HostSize) -> u64 {
    let memory = match limit {
        // Only touched memory costs the host anything, and the guest's cgroup holds the workload to its limit.
        Some(limit) => limit.saturating_add(GUEST_OVERHEAD).saturating_add(limit / OVERHEAD_DIVISOR),
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
        assert_eq!(count(r#"{"quota":100000,"period":0}"#), 4);
        assert_eq!(count(r#"{"quota":1200000}"#), 12, "more than the host has");
        assert_eq!(u64::from(count(r#"{"quota":640000000}"#)), MOST_VCPUS);
    }
}
