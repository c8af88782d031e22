//! When each phase of a start was reached, and a picture of it.
//!
//! The instants are `CLOCK_MONOTONIC`, so those of the command and of the monitor fit together.

use std::fmt::Write;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Width of the longest bar in characters.
const BAR_WIDTH: u64 = 40;

/// The phases, in the order in which they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// `rvm` was started.
    ProcessStart,
    /// The monitor runs its first instruction of its own.
    MonitorUp,
    /// The container's root filesystem is mounted on the host.
    RootfsReady,
    /// The virtual machine exists.
    KvmReady,
    /// The machine is as its template.
    TemplateReady,
    /// Kernel and initramfs are in the guest's memory.
    KernelLoaded,
    /// The first vCPU entered the kernel.
    KernelEntry,
    /// The guest goes on where its template was captured.
    GuestResumed,
    /// The agent in the guest has answered.
    AgentUp,
    /// The container's network is connected with the machine, as far as it has one.
    NetworkReady,
    /// `start` has asked for the container's process.
    StartAsked,
    /// The container's program was executed.
    ContainerExec,
    /// The container's process has ended.
    Exit,
    /// The container is deleted, and nothing of it is left.
    Deleted,
}

impl Phase {
    fn title(self) -> &'static str {
        match self {
            Phase::ProcessStart => "rvm started",
            Phase::MonitorUp => "monitor up",
            Phase::RootfsReady => "rootfs mounted",
            Phase::KvmReady => "KVM ready",
            Phase::TemplateReady => "template mapped",
            Phase::KernelLoaded => "kernel loaded",
            Phase::KernelEntry => "kernel entered",
            Phase::GuestResumed => "guest resumed",
            Phase::AgentUp => "agent up",
            Phase::NetworkReady => "network connected",
            Phase::StartAsked => "start asked",
            Phase::ContainerExec => "program executed",
            Phase::Exit => "program ended",
            Phase::Deleted => "deleted",
        }
    }
}

/// The phases reached so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    marks: Vec<Mark>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    phase: Phase,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    at: u64,
}

impl Timeline {
    /// A timeline that begins now.
    pub fn begin() -> Timeline {
        let mut timeline = Timeline::default();
        timeline.mark(Phase::ProcessStart);
        timeline
    }

    /// Records that a phase was reached now.
    pub fn mark(&mut self, phase: Phase) {
        self.insert(phase, now());
    }

    /// Records that a phase was reached at an instant of the past.
    pub fn mark_at(&mut self, phase: Phase, instant: Instant) {
        let ago = u64::try_from(instant.elapsed().as_nanos()).unwrap_or(0);
        self.insert(phase, now().saturating_sub(ago));
    }

    /// Records that a phase was reached when another process said by [`now`].
    pub fn mark_told(&mut self, phase: Phase, at: u64) {
        self.insert(phase, at.min(now()));
    }

    fn insert(&mut self, phase: Phase, at: u64) {
        if self.marks.iter().all(|mark| mark.phase != phase) {
            self.marks.push(Mark { phase, at });
            self.marks.sort_by_key(|mark| (mark.at, mark.phase));
        }
    }

    /// Time from the first phase to this one.
    pub fn until(&self, phase: Phase) -> Option<Duration> {
        let first = self.marks.first()?.at;
        let mark = self.marks.iter().find(|mark| mark.phase == phase)?;
        Some(Duration::from_nanos(mark.at - first))
    }

    /// The same as JSON in one line: a phase's name and title, and when it was reached, in milliseconds.
    pub fn to_json(&self) -> serde_json::Value {
        let first = self.marks.first().map_or(0, |mark| mark.at);
        let reached = self.marks.iter().map(|mark| {
            json!({
                "phase": mark.phase,
                "title": mark.phase.title(),
                "milliseconds": milliseconds(mark.at - first),
            })
        });
        reached.collect()
    }

    /// A table with a line a phase: when it was reached, how long it took since the one before, and a bar.
    pub fn to_table(&self) -> String {
        let Some(first) = self.marks.first() else { return String::new() };
        let longest = self.marks.windows(2).map(|pair| pair[1].at - pair[0].at).max().unwrap_or(0).max(1);
        let mut table = format!("{:<18}{:>11}{:>11}\n", "phase", "at ms", "took ms");
        let mut previous = first.at;
        for mark in &self.marks {
            let took = mark.at - previous;
            let bar = "█".repeat((took * BAR_WIDTH).div_ceil(longest) as usize);
            let (at, title) = (mark.at - first.at, mark.phase.title());
            // Writing to a String cannot fail.
            let _ =
                writeln!(table, "{title:<18}{:>11.2}{:>11.2}  {bar}", milliseconds(at), milliseconds(took));
            previous = mark.at;
        }
        table
    }
}

fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// This instant, by a clock that all processes share, in nanoseconds.
pub fn now() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux, and is never negative.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Timeline {
        let mut timeline = Timeline::default();
        timeline.insert(Phase::MonitorUp, 3_000_000);
        timeline.insert(Phase::ProcessStart, 1_000_000);
        timeline.insert(Phase::KernelEntry, 13_000_000);
        timeline
    }

    #[test]
    fn phases_are_told_in_the_order_of_time() {
        let table = sample().to_table();
        let lines: Vec<_> = table.lines().collect();
        assert!(lines[1].starts_with("rvm started              0.00       0.00"), "{table}");
        assert!(lines[2].starts_with("monitor up               2.00       2.00  ████████"), "{table}");
        assert!(lines[3].starts_with("kernel entered          12.00      10.00"), "{table}");
        assert_eq!(lines[3].matches('█').count() as u64, BAR_WIDTH);
    }

    #[test]
    fn programs_get_json() {
        let json = sample().to_json();
        assert_eq!(
            json[2],
            json!({ "phase": "kernel-entry", "title": "kernel entered", "milliseconds": 12.0 })
        );
        assert_eq!(Timeline::default().to_json(), json!([]));
    }

    #[test]
    fn a_phase_is_reached_once() {
        let mut timeline = sample();
        timeline.insert(Phase::MonitorUp, 99_000_000);
        assert_eq!(timeline.until(Phase::MonitorUp), Some(Duration::from_millis(2)));
        assert_eq!(timeline.until(Phase::Exit), None);
    }

    #[test]
    fn an_empty_timeline_has_no_table() {
        assert_eq!(Timeline::default().to_table(), "");
    }
}
