//! What a container costs the host in memory, in proportional shares (PSS): a page that several processes have counts
//! for each of them in part, so that the costs of all containers can be added up.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::AddAssign;

use serde::Serialize;

/// The memory of one container on the host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// What the monitor needs for itself.
    pub monitor: u64,
    /// Pages of the guest that no other process has.
    pub guest_private: u64,
    /// The container's share of the guest's pages that others have as well.
    pub guest_shared: u64,
    /// What its other processes need: the one that follows its network, and one for each `exec`.
    pub helpers: u64,
}

impl Cost {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.monitor + self.guest_private + self.guest_shared + self.helpers
    }

    /// What the container costs whose monitor is this process, with its other processes.
    ///
    /// # Errors
    ///
    /// The monitor cannot be looked at. Other processes may have ended meanwhile.
    pub fn of(monitor: u32, processes: &[u32]) -> io::Result<Cost> {
        let mut cost = read(monitor)?;
        for process in processes.iter().filter(|process| **process != monitor) {
            cost.helpers += share(*process).unwrap_or_default();
        }
        Ok(cost)
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.monitor += other.monitor;
        self.guest_private += other.guest_private;
        self.guest_shared += other.guest_shared;
        self.helpers += other.helpers;
    }
}

fn read(process: u32) -> io::Result<Cost> {
    parse(open(process, "smaps")?)
}

/// What a process has of the host's memory, in bytes.
///
/// # Errors
///
/// It cannot be looked at, or has ended.
pub fn share(process: u32) -> io::Result<u64> {
    let mut share = 0;
    for line in open(process, "smaps_rollup")?.lines() {
        if let Some((_, value)) = line?.split_once(':').filter(|(name, _)| is_share(name)) {
            share += bytes(value);
        }
    }
    Ok(share)
}

/// Pages that were swapped out are still the process's.
fn is_share(name: &str) -> bool {
    matches!(name, "Pss" | "SwapPss")
}

fn open(process: u32, file: &str) -> io::Result<BufReader<File>> {
    File::open(format!("/proc/{process}/{file}")).map(BufReader::new)
}

/// One mapping's figures in bytes.
#[derive(Default)]
struct Mapping {
    share: u64,
    private: u64,
}

/// Adds up the mappings of one process (proc_pid_smaps(5)). The flags come last of each. Memory of the guest is what
/// children do not inherit ("dc", see `madvise` with `MADV_DONTFORK`): the monitor maps nothing else like that.
fn parse(maps: impl BufRead) -> io::Result<Cost> {
    let (mut cost, mut mapping) = (Cost::default(), Mapping::default());
    for line in maps.lines() {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { continue };
        match name {
            name if is_share(name) => mapping.share += bytes(value),
            "Private_Clean" | "Private_Dirty" | "Private_Hugetlb" => mapping.private += bytes(value),
            "VmFlags" => {
                let Mapping { share, private } = std::mem::take(&mut mapping);
                match value.split_ascii_whitespace().any(|flag| flag == "dc") {
                    true => {
                        cost.guest_private += private.min(share);
                        cost.guest_shared += share.saturating_sub(private);
                    }
                    false => cost.monitor += share,
                }
            }
            _ => {}
        }
    }
    Ok(cost)
}

fn bytes(value: &str) -> u64 {
    let number = value.trim().strip_suffix(" kB").and_then(|number| number.parse::<u64>().ok());
    number.unwrap_or_default().saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0
Rss:               30000 kB
Pss:               20000 kB
Pss_Dirty:         12000 kB
Shared_Clean:      16000 kB
Private_Clean:      2000 kB
Private_Dirty:     12000 kB
Swap:                100 kB
SwapPss:             100 kB
THPeligible:           1
VmFlags: rd wr mr mw me ac dc hg
558000000000-558000100000 r-xp 00000000 fe:00 1234                       /usr/local/bin/rvm
Rss:                1000 kB
Pss:                 250 kB
Private_Clean:         0 kB
SwapPss:               0 kB
VmFlags: rd ex mr mw me
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack: dc]
Pss:                  12 kB
Private_Dirty:        12 kB
VmFlags: rd wr mr mw me gd ac
";

    #[test]
    fn a_monitor_and_its_guest_are_told_apart() {
        let cost = parse(MAPS.as_bytes()).unwrap();
        let kib = |count: u64| count << 10;
        let expected =
            Cost { monitor: kib(262), guest_private: kib(14_000), guest_shared: kib(6100), helpers: 0 };
        assert_eq!(cost, expected);
        assert_eq!(cost.total(), kib(20_362));
    }

    #[test]
    fn lines_that_nobody_knows_are_no_error() {
        let odd = "Pss: many kB\nPss: 99999999999999999999 kB\nVmFlags:\n\u{0}\n:\nPss: 18446744073709551615 kB\nVmFlags: dc\n";
        assert_eq!(parse(odd.as_bytes()).unwrap().monitor, 0);
    }

    #[test]
    fn a_process_of_this_host_costs_something() {
        let cost = Cost::of(std::process::id(), &[]).unwrap();
        assert!(cost.monitor > 100 << 10, "{cost:?}");
        assert_eq!(cost.guest_private + cost.guest_shared, 0);
        let share = share(std::process::id()).unwrap();
        assert!((cost.total() / 2..cost.total() * 2).contains(&share), "{share} {cost:?}");
        assert!(Cost::of(u32::MAX, &[]).is_err());
    }
}
