//! What containers leave running on the host: which processes, their memory, and whether they drive a virtual machine.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::cost;

/// How long processes may take to end after their container was removed.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// A process, told from a later one with the same number by its start.
type Process = (u32, String);

/// The processes that came since a look at the host.
#[derive(Debug)]
pub struct Newcomers {
    processes: BTreeSet<Process>,
    /// Of each, its share of memory in bytes.
    shares: Vec<(Process, u64)>,
    /// Whether one of them holds a virtual machine of KVM's.
    pub has_machine: bool,
}

/// The processes that there are.
pub fn now() -> BTreeSet<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| identify(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn identify(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything, and ends with the last parenthesis; the start is the 20th field after it.
    let start = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.to_owned();
    Some((pid, start))
}

impl Newcomers {
    /// Those that came since `before`, with what they cost now.
    pub fn since(before: &BTreeSet<Process>) -> Newcomers {
        let processes: BTreeSet<_> = now().difference(before).cloned().collect();
        let shares = processes
            .iter()
            .filter_map(|process| Some((process.clone(), cost::share(process.0).ok()?)))
            .collect();
        let has_machine = processes.iter().any(|process| holds_machine(process.0));
        Newcomers { processes, shares, has_machine }
    }

    /// The memory of those that have ended by now, in bytes: they were the containers', and others merely came meanwhile.
    pub fn memory_of_gone(&self) -> u64 {
        let begin = Instant::now();
        loop {
            let left = now();
            if begin.elapsed() > PATIENCE || self.processes.is_disjoint(&left) {
                let gone = self.shares.iter().filter(|(process, _)| !left.contains(process));
                return gone.map(|(_, share)| share).sum();
            }
            thread::sleep(PAUSE);
        }
    }
}

fn holds_machine(pid: u32) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|target| target.to_string_lossy() == "anon_inode:kvm-vm")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_came_and_went_is_told_from_what_stays() {
        let before = now();
        assert!(before.iter().any(|(pid, _)| *pid == std::process::id()));
        let mut gone = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut stays = Command::new("sleep").arg("1000").spawn().unwrap();
        // Until both are what they are to be.
        let is_sleep = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "sleep\n";
        while !(is_sleep(gone.id()) && is_sleep(stays.id())) {
            thread::sleep(PAUSE);
        }
        let newcomers = Newcomers::since(&before);
        let all: u64 = newcomers.shares.iter().map(|(_, share)| share).sum();
        gone.kill().unwrap();
        gone.wait().unwrap();
        let counted = newcomers.memory_of_gone();
        assert!(counted > 0 && counted < all, "{counted} of {all}");
        stays.kill().unwrap();
        stays.wait().unwrap();
    }
}
