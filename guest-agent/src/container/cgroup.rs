//! The container's cgroup in the guest (cgroup v2 only; the guest's kernel is ours).
//!
//! The limits apply here so that it is the workload that feels them; the host has its own cgroup around the
//! whole virtual machine. The agent stays in the root cgroup, out of reach of them.
//!
//! CPU and memory sets (`cpuset`) are left to the host: their numbers name the host's processors, which the
//! virtual machine's threads are bound to, and mean nothing in the guest. The same holds for block devices
//! that are named by the host's numbers.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::{Context, Result, other};
use crate::sys::process::send_signal;

/// How deep cgroups of the container's own making are followed.
const MAX_DEPTH: usize = 32;

/// The container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup `name` below `parent`.
    pub fn create(parent: &Path, name: &str) -> Result<Self> {
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(other(format!("the container ID {name:?} cannot name a cgroup")));
        }
        let path = parent.join(name);
        fs::create_dir(&path).context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Opens it, for a process to be forked into.
    pub fn open(&self) -> Result<OwnedFd> {
        open(&self.path)
    }

    /// Opens its directory, to attach programs to it.
    pub fn open_directory(&self) -> Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        fcntl::open(&self.path, flags, Mode::empty())
            .context(|| format!("opening the cgroup {}", self.path.display()))
    }

    /// Opens the cgroup that a process is in, which may be one that the container made below its own.
    pub fn open_of(pid: Pid) -> Result<OwnedFd> {
        let file = format!("/proc/{pid}/cgroup");
        let lines = fs::read_to_string(&file).context(|| format!("reading {file}"))?;
        let path = lines.lines().find_map(|line| line.strip_prefix("0::/"));
        let path = path.ok_or_else(|| other(format!("{file} names no cgroup")))?;
        open(&Path::new("/sys/fs/cgroup").join(path))
    }

    /// The file that counts the events of its memory.
    pub fn memory_events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// Sets the limits of the OCI specification's `linux.resources`.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        if let Some(memory) = resources.memory() {
            self.apply_all(memory_values(memory))?;
        }
        if let Some(cpu) = resources.cpu() {
            let current = fs::read_to_string(self.path.join("cpu.max")).unwrap_or_default();
            self.apply_all(cpu_values(cpu, &current))?;
        }
        if let Some(pids) = resources.pids() {
            // As with runc, zero is no limit.
            let most = Some(pids.limit()).filter(|most| *most != 0).unwrap_or(-1);
            self.set("pids.max", &limit(most))?;
        }
        for hugepages in resources.hugepage_limits().iter().flatten() {
            self.set(&format!("hugetlb.{}.max", hugepages.page_size()), &limit(hugepages.limit()))?;
        }
        for (file, value) in resources.unified().iter().flatten() {
            // These name the host's processors and disks.
            if !file.starts_with("cpuset.") && !file.starts_with("io.") {
                self.set(file, value)?;
            }
        }
        Ok(())
    }

    /// Changes the limits of a running container.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let information = nix::sys::sysinfo::sysinfo().context(|| "asking for the guest's memory")?;
        check_memory(resources, information.ram_total())?;
        self.apply(resources)
    }

    /// Limits the memory of the workload, in bytes.
    pub fn set_memory_limit(&self, bytes: u64) -> Result<()> {
        self.set("memory.max", &bytes.to_string())
    }

    /// Kills every process in it.
    pub fn kill_all(&self) {
        // Nothing is to be done about a cgroup that is gone already.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// Sends a signal to every process in it.
    pub fn signal_all(&self, signal: i32) {
        if signal == libc::SIGKILL {
            self.kill_all();
            return;
        }
        let freeze = self.path.join("cgroup.freeze");
        // Otherwise a process could fork between the reading of the list and its signal, and the child miss it.
        let frozen_already = fs::read_to_string(&freeze).is_ok_and(|state| state.trim() == "1");
        if !frozen_already && fs::write(&freeze, "1").is_ok() {
            self.wait_until_frozen();
        }
        for pid in self.processes() {
            // It may have ended since the list was read.
            let _ = send_signal(pid, signal);
        }
        if !frozen_already {
            let _ = fs::write(&freeze, "0");
        }
    }

    /// Freezing takes as long as the slowest process is in the kernel. One that is stuck there cannot fork either,
    /// so it is not waited for long.
    fn wait_until_frozen(&self) {
        for _ in 0..50 {
            let events = fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default();
            if events.lines().any(|line| line == "frozen 1") {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The processes in it and in the cgroups below it, by the agent's process ids.
    pub fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        collect_processes(&self.path, &mut found, 0);
        found
    }

    fn apply_all(&self, values: Vec<(&'static str, String)>) -> Result<()> {
        for (file, value) in values {
            self.set(file, &value)?;
        }
        Ok(())
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        if file.is_empty() || file.contains('/') {
            return Err(other(format!("{file:?} is no file of a cgroup")));
        }
        match fs::write(self.path.join(file), value) {
            // Without swap in the guest, or without pages of a size, there is no such file, and nothing to limit.
            Err(error) if (file == "memory.swap.max" || is_of_hugepages(file)) && is_absent(&error) => Ok(()),
            Err(error) if is_absent(&error) => {
                Err(other(format!("the guest's kernel does not support the limit {file} ({value})")))
            }
            result => result.context(|| format!("setting the limit {file} to {value}")),
        }
    }
}

/// The memory of a machine is set when it starts: a limit above it would promise what is not there.
fn check_memory(resources: &LinuxResources, guest: u64) -> Result<()> {
    let wanted = resources.memory().and_then(|memory| memory.limit());
    match wanted.and_then(|wanted| u64::try_from(wanted).ok()).filter(|wanted| *wanted > guest) {
        Some(wanted) => Err(other(format!(
            "the memory limit of {} MiB is more than the {} MiB that the virtual machine was started with",
            wanted >> 20,
            guest >> 20
        ))),
        None => Ok(()),
    }
}

fn is_of_hugepages(file: &str) -> bool {
    file.starts_with("hugetlb.") && file.ends_with(".max")
}

/// Files of a cgroup cannot be created, so writing to one that is missing is not permitted.
fn is_absent(error: &std::io::Error) -> bool {
    let number = error.raw_os_error();
    number == Some(Errno::ENOENT as i32)
        || number == Some(Errno::EACCES as i32)
        || number == Some(Errno::EPERM as i32)
}

fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    fcntl::open(path, flags, Mode::empty()).context(|| format!("opening the cgroup {}", path.display()))
}

fn collect_processes(path: &Path, found: &mut Vec<Pid>, depth: usize) {
    let list = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    found.extend(list.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
    if depth == MAX_DEPTH {
        return;
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), found, depth + 1);
        }
    }
}

/// Enables every controller that the kernel has for the cgroups below `root`.
pub fn enable_controllers(root: &Path) {
    let available = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        // One at a time: the kernel takes all that are named together, or none. A limit that needs one which
        // cannot be enabled is refused when it is asked for.
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// A limit as cgroup v2 writes it: -1 of the specification is none.
fn limit(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory_values(memory: &LinuxMemory) -> Vec<(&'static str, String)> {
    let mut values = Vec::new();
    // Zero means that nothing was asked for.
    if let Some(bytes) = memory.limit().filter(|bytes| *bytes != 0) {
        values.push(("memory.max", limit(bytes)));
    }
    if let Some(total) = memory.swap().filter(|total| *total != 0) {
        // The specification limits the sum of memory and swap, cgroup v2 swap alone.
        let swap = match memory.limit() {
            Some(bytes) if total > 0 && bytes > 0 => (total - bytes).max(0),
            _ => total,
        };
        values.push(("memory.swap.max", limit(swap)));
    }
    if let Some(bytes) = memory.reservation().filter(|bytes| *bytes != 0) {
        values.push(("memory.low", limit(bytes)));
    }
    values
}

/// `current` is what `cpu.max` holds: a quota or a period that is not asked for stays as it is.
fn cpu_values(cpu: &LinuxCpu, current: &str) -> Vec<(&'static str, String)> {
    let mut values = Vec::new();
    if let Some(idle) = cpu.idle() {
        values.push(("cpu.idle", idle.to_string()));
    }
    // The kernel refuses a weight for an idle cgroup.
    if let Some(weight) = cpu.shares().and_then(weight).filter(|_| cpu.idle().unwrap_or(0) == 0) {
        values.push(("cpu.weight", weight.to_string()));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let mut words = current.split_whitespace();
        let (current_quota, current_period) =
            (words.next().unwrap_or("max"), words.next().unwrap_or("100000"));
        let quota = quota.map_or_else(|| current_quota.to_owned(), limit);
        let period = period.map_or_else(|| current_period.to_owned(), |period| period.to_string());
        values.push(("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst() {
        values.push(("cpu.max.burst", burst.to_string()));
    }
    values
}

/// The weight (1 to 10000, by default 100) for a number of shares (2 to 262144, by default 1024): the curve
/// through the three pairs that runc and crun use since 2025.
fn weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        3..262_144 => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            Some(10f64.powf(exponent).ceil() as u64)
        }
        _ => Some(10_000),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_become_weights_with_the_defaults_alike() {
        assert_eq!(weight(0), None);
        assert_eq!(weight(2), Some(1));
        assert_eq!(weight(1024), Some(100));
        assert_eq!(weight(262_144), Some(10_000));
        assert_eq!(weight(u64::MAX), Some(10_000));
    }

    proptest! {
        #[test]
        fn more_shares_never_weigh_less(a in 1u64..300_000, b in 1u64..300_000) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(weight(low) <= weight(high));
            prop_assert!((1..=10_000).contains(&weight(a).unwrap()));
        }
    }

    #[test]
    fn the_sum_of_memory_and_swap_becomes_swap_alone() {
        let memory = LinuxMemoryBuilder::default().limit(100i64).swap(250i64).build().unwrap();
        assert_eq!(
            memory_values(&memory),
            [("memory.max", "100".to_owned()), ("memory.swap.max", "150".to_owned())]
        );
        let unlimited = LinuxMemoryBuilder::default().limit(-1i64).swap(-1i64).build().unwrap();
        assert_eq!(
            memory_values(&unlimited),
            [("memory.max", "max".to_owned()), ("memory.swap.max", "max".to_owned())]
        );
    }

    #[test]
    fn a_quota_comes_with_a_period() {
        let cpu = LinuxCpuBuilder::default().quota(50_000i64).build().unwrap();
        assert_eq!(cpu_values(&cpu, ""), [("cpu.max", "50000 100000".to_owned())]);
        let cpu = LinuxCpuBuilder::default().quota(-1i64).period(20_000u64).build().unwrap();
        assert_eq!(cpu_values(&cpu, "7000 8000\n"), [("cpu.max", "max 20000".to_owned())]);
    }

    #[test]
    fn the_half_of_a_quota_that_is_not_changed_stays() {
        let cpu = LinuxCpuBuilder::default().quota(50_000i64).build().unwrap();
        assert_eq!(cpu_values(&cpu, "20000 40000\n"), [("cpu.max", "50000 40000".to_owned())]);
        let cpu = LinuxCpuBuilder::default().period(50_000u64).build().unwrap();
        assert_eq!(cpu_values(&cpu, "20000 40000\n"), [("cpu.max", "20000 50000".to_owned())]);
    }

    #[test]
    fn no_processes_at_all_means_no_limit() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup { path: directory.path().into() };
        let pids = LinuxPidsBuilder::default().limit(0i64).build().unwrap();
        cgroup.apply(&LinuxResourcesBuilder::default().pids(pids).build().unwrap()).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("pids.max")).unwrap(), "max");
    }

    #[test]
    fn memory_that_the_guest_does_not_have_is_refused_by_an_update() {
        let memory = LinuxMemoryBuilder::default().limit(2i64 << 30).build().unwrap();
        let resources = LinuxResourcesBuilder::default().memory(memory).build().unwrap();
        let refused = check_memory(&resources, 1 << 30).unwrap_err();
        assert!(refused.message.contains("2048 MiB") && refused.message.contains("1024 MiB"), "{refused}");
        assert!(check_memory(&resources, 2 << 30).is_ok());
        let memory = LinuxMemoryBuilder::default().limit(-1i64).build().unwrap();
        let resources = LinuxResourcesBuilder::default().memory(memory).build().unwrap();
        assert!(check_memory(&resources, 1 << 30).is_ok());
    }

    #[test]
    fn a_limit_that_the_kernel_lacks_is_refused_except_that_of_swap() {
        // The files of /proc cannot be created either, even by root.
        let cgroup = Cgroup { path: "/proc".into() };
        assert!(cgroup.set("memory.max", "1").unwrap_err().message.contains("does not support"));
        assert!(cgroup.set("memory.swap.max", "1").is_ok());
        assert!(cgroup.set("hugetlb.2MB.max", "1").is_ok());
        assert!(cgroup.set("../x", "1").is_err());
    }

    #[test]
    fn an_id_that_is_no_name_is_refused() {
        for id in ["", ".", "..", "a/b", "/"] {
            assert!(Cgroup::create(Path::new("/nonexistent"), id).is_err(), "{id}");
        }
    }
}
