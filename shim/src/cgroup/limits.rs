//! The limits of the OCI spec as the controls of the two versions of cgroups.

use std::fmt::Display;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::container::shape::{ProcessorTime, host_memory};

/// A control to write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The controller, in version 1's names.
    pub controller: &'static str,
    /// Forms of the control; the first that the kernel has is written to.
    pub files: Vec<ControlFile>,
    /// Whether it is an error if the kernel has none of them.
    pub required: bool,
}

/// One form of a control, with the value in its terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ControlFile {
    pub name: &'static str,
    pub value: String,
}

/// What the host heeds of `linux.resources.unified`. Limits of memory and of processes are about what runs in the guest.
const UNIFIED: [(&str, &str); 10] = [
    ("cpu", "cpu.max"),
    ("cpu", "cpu.max.burst"),
    ("cpu", "cpu.weight"),
    ("cpu", "cpu.weight.nice"),
    ("cpu", "cpu.idle"),
    ("cpuset", "cpuset.cpus"),
    ("cpuset", "cpuset.mems"),
    ("io", "io.max"),
    ("io", "io.weight"),
    ("io", "io.latency"),
];

#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn add(&mut self, controller: &'static str, name: &'static str, value: impl Display) {
        self.add_any(controller, true, &[(name, &value)]);
    }

    fn add_any(&mut self, controller: &'static str, required: bool, files: &[(&'static str, &dyn Display)]) {
        let files =
            files.iter().map(|(name, value)| ControlFile { name, value: value.to_string() }).collect();
        self.0.push(Setting { controller, files, required });
    }
}

/// The limits in version 1.
pub(super) fn version1(resources: &LinuxResources) -> Vec<Setting> {
    let mut settings = Settings::default();
    if let Some(memory) = resources.memory() {
        memory_version1(memory, &mut settings);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_version1(cpu, &mut settings);
        cpuset(cpu, &mut settings);
    }
    if let Some(io) = resources.block_io() {
        io_version1(io, &mut settings);
    }
    settings.0
}

/// The limits in version 2; `cpu_max` is the present content of that control.
pub(super) fn version2(resources: &LinuxResources, cpu_max: Option<&str>) -> Vec<Setting> {
    let mut settings = Settings::default();
    if let Some(memory) = resources.memory() {
        memory_version2(memory, &mut settings);
    }
    if let Some(cpu) = resources.cpu() {
        cpu_version2(cpu, cpu_max, &mut settings);
        cpuset(cpu, &mut settings);
    }
    if let Some(io) = resources.block_io() {
        io_version2(io, &mut settings);
    }
    for (controller, name) in UNIFIED {
        if let Some(value) = resources.unified().as_ref().and_then(|unified| unified.get(name)) {
            settings.add(controller, name, value);
        }
    }
    settings.0
}

/// A limit in bytes: nothing for 0, which is "not set", and -1 for none.
fn bytes(limit: Option<i64>) -> Option<Result<u64, Unlimited>> {
    match limit? {
        0 => None,
        limit => Some(u64::try_from(limit).map_err(|_| Unlimited)),
    }
}

#[derive(Clone, Copy, Debug)]
struct Unlimited;

fn memory_version1(memory: &LinuxMemory, settings: &mut Settings) {
    let in_words = |limit: Result<u64, Unlimited>| match limit {
        Ok(limit) => i64::try_from(host_memory(limit)).unwrap_or(i64::MAX),
        Err(Unlimited) => -1,
    };
    if let Some(limit) = bytes(memory.limit()) {
        settings.add("memory", "memory.limit_in_bytes", in_words(limit));
    }
    if let Some(swap) = bytes(memory.swap()) {
        // Counts memory and swap. Hosts without swap accounting have no such control, and mostly no swap.
        settings.add_any("memory", false, &[("memory.memsw.limit_in_bytes", &in_words(swap))]);
    }
    if let Some(Ok(reservation)) = bytes(memory.reservation()) {
        settings.add("memory", "memory.soft_limit_in_bytes", reservation);
    }
    if let Some(swappiness) = memory.swappiness() {
        settings.add("memory", "memory.swappiness", swappiness);
    }
}

fn memory_version2(memory: &LinuxMemory, settings: &mut Settings) {
    let limit = bytes(memory.limit());
    match limit {
        Some(Ok(limit)) => settings.add("memory", "memory.max", host_memory(limit)),
        Some(Err(Unlimited)) => settings.add("memory", "memory.max", "max"),
        None => {}
    }
    // The OCI spec counts memory and swap together, version 2 swap alone.
    let swap = match (bytes(memory.swap()), limit) {
        (Some(Ok(both)), Some(Ok(limit))) => Some(both.saturating_sub(limit).to_string()),
        (Some(Err(Unlimited)), _) => Some("max".into()),
        _ => None,
    };
    if let Some(swap) = swap {
        settings.add_any("memory", false, &[("memory.swap.max", &swap)]);
    }
    if let Some(Ok(reservation)) = bytes(memory.reservation()) {
        settings.add("memory", "memory.low", reservation);
    }
}

fn cpu_version1(cpu: &LinuxCpu, settings: &mut Settings) {
    if let Some(idle) = cpu.idle() {
        settings.add("cpu", "cpu.idle", idle);
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.add("cpu", "cpu.shares", shares);
    }
    if let Some(period) = cpu.period().filter(|period| *period != 0) {
        settings.add("cpu", "cpu.cfs_period_us", period);
    }
    if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
        settings.add("cpu", "cpu.cfs_quota_us", quota.max(-1));
    }
    if let Some(burst) = cpu.burst() {
        settings.add("cpu", "cpu.cfs_burst_us", burst);
    }
}

/// What `cpu.max` says, or the two controls of version 1 in its order.
pub(super) fn processor_time(text: &str) -> Option<ProcessorTime> {
    let (quota, period) = text.trim().split_once(' ')?;
    // No limit is `max` in the one version, and -1 in the other.
    Some(ProcessorTime { quota: quota.parse().ok(), period: period.parse().ok()? })
}

fn cpu_version2(cpu: &LinuxCpu, current: Option<&str>, settings: &mut Settings) {
    if let Some(idle) = cpu.idle() {
        settings.add("cpu", "cpu.idle", idle);
    }
    // An idle cgroup has no weight.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        settings.add("cpu", "cpu.weight", weight_of_shares(shares));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let mut now = current.unwrap_or_default().split_whitespace();
        let (quota_now, period_now) = (now.next().unwrap_or("max"), now.next().unwrap_or("100000"));
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".into(),
            None => quota_now.into(),
        };
        let period = period.map_or_else(|| period_now.into(), |period| period.to_string());
        settings.add("cpu", "cpu.max", format_args!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        settings.add("cpu", "cpu.max.burst", burst);
    }
}

/// The range 2 to 262144 of version 1 on the range 1 to 10000 of version 2. The curve is runc's (1.4), which leads
/// from the one default, 1024, to the other, 100.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10_f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

fn cpuset(cpu: &LinuxCpu, settings: &mut Settings) {
    for (name, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            settings.add("cpuset", name, list);
        }
    }
}

fn io_version1(io: &LinuxBlockIo, settings: &mut Settings) {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        settings.add_any("blkio", true, &[("blkio.weight", &weight), ("blkio.bfq.weight", &weight)]);
    }
    for device in weighed_devices(io) {
        let files: [(_, &dyn Display); 2] =
            [("blkio.weight_device", &device), ("blkio.bfq.weight_device", &device)];
        settings.add_any("blkio", true, &files);
    }
    for (name, _, devices) in throttles(io) {
        for device in devices {
            settings.add(
                "blkio",
                name,
                format_args!("{}:{} {}", device.major(), device.minor(), device.rate()),
            );
        }
    }
}

fn io_version2(io: &LinuxBlockIo, settings: &mut Settings) {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        // The two schedulers that know weights count differently: 10 to 1000, and 1 to 10000.
        let wide = 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
        settings.add_any("io", true, &[("io.bfq.weight", &weight), ("io.weight", &wide)]);
    }
    for device in weighed_devices(io) {
        settings.add("io", "io.bfq.weight", device);
    }
    for (_, key, devices) in throttles(io) {
        for device in devices {
            let value = format_args!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
            settings.add("io", "io.max", value);
        }
    }
}

/// Devices with a weight of their own, as both versions want them.
fn weighed_devices(io: &LinuxBlockIo) -> impl Iterator<Item = String> {
    io.weight_device().iter().flatten().filter_map(|device| {
        let weight = device.weight().filter(|weight| *weight != 0)?;
        Some(format!("{}:{} {weight}", device.major(), device.minor()))
    })
}

type Throttle<'a> = (&'static str, &'static str, &'a [LinuxThrottleDevice]);

/// The control of version 1 and the key of version 2 for each kind of throttle.
fn throttles(io: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    [
        ("blkio.throttle.read_bps_device", "rbps", slice(io.throttle_read_bps_device())),
        ("blkio.throttle.write_bps_device", "wbps", slice(io.throttle_write_bps_device())),
        ("blkio.throttle.read_iops_device", "riops", slice(io.throttle_read_iops_device())),
        ("blkio.throttle.write_iops_device", "wiops", slice(io.throttle_write_iops_device())),
    ]
}

fn slice(list: &Option<Vec<LinuxThrottleDevice>>) -> &[LinuxThrottleDevice] {
    list.as_deref().unwrap_or_default()
}
