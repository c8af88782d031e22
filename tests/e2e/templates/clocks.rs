//! Clocks: what time it is in a guest, beside the host's clock, to fractions of a millisecond.
//!
//! A message takes longer than that. So both sides read the time stamp counter beside their clocks, and KVM tells by how
//! much the guest's counter differs from the host's. What the messages bound has to agree with it.

use std::arch::x86_64::_rdtsc;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::Templates;
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{kvm_figure, rvm, wait_for};
use crate::probe;

pub const STORIES: &[(&str, Story)] = &[
    ("the_clock_of_a_clone_is_right", the_clock_of_a_clone_is_right),
    ("the_clock_of_a_boot_is_right", the_clock_of_a_boot_is_right),
    ("the_clock_is_right_after_a_pause", the_clock_is_right_after_a_pause),
];

/// What a clock may be wrong by, in nanoseconds.
const TOLERANCE: i64 = 1_000_000;
/// How often a clock is looked at.
const READINGS: usize = 50;

/// What a clock says, and the time stamp counter at the same instant.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// `CLOCK_REALTIME`, in nanoseconds.
    realtime: i64,
    counter: i64,
}

impl Reading {
    /// The one of many that took the least time.
    pub fn now() -> Result<Reading> {
        let mut best = (i64::MAX, Reading { realtime: 0, counter: 0 });
        for _ in 0..20 {
            let before = counter();
            let time = clock_gettime(ClockId::CLOCK_REALTIME)?;
            let took = counter() - before;
            if took < best.0 {
                let realtime = time.tv_sec() * 1_000_000_000 + time.tv_nsec();
                best = (took, Reading { realtime, counter: before + took / 2 });
            }
        }
        Ok(best.1)
    }
}

fn counter() -> i64 {
    // SAFETY: every x86-64 processor has the instruction, and nobody forbids it to this process.
    unsafe { _rdtsc() }.cast_signed()
}

impl fmt::Display for Reading {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.realtime, self.counter)
    }
}

impl FromStr for Reading {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Reading> {
        let (realtime, counter) = text.split_once(' ').with_context(|| format!("no reading: {text:?}"))?;
        Ok(Reading { realtime: realtime.parse()?, counter: counter.parse()? })
    }
}

/// Starts a container, and sees that its clock is right: from the first instruction, and `then`.
fn ensure_right(bundle: &Bundle, templates: &Templates, then: impl FnOnce() -> Result<()>) -> Result<()> {
    let begin = Reading::now()?;
    let mut clone = templates.spawn(bundle, "story")?;
    let mut stdin = clone.stdin.take().context("it has a standard input")?;
    let mut lines = BufReader::new(clone.stdout.take().context("it has a standard output")?).lines();
    let mut next = || lines.next().context("it says something")??.parse::<Reading>();
    let mut told = vec![next()?];
    then()?;
    let (mut least, mut most) = (i64::MIN, i64::MAX);
    for _ in 0..READINGS {
        let before = Reading::now()?;
        writeln!(stdin)?;
        let there = next()?;
        let after = Reading::now()?;
        told.push(there);
        least = least.max(there.realtime - after.realtime);
        most = most.min(there.realtime - before.realtime);
    }
    let (offset, end) = (counter_offset()?, Reading::now()?);
    let errors: Vec<i64> =
        told.iter().map(|there| there.realtime - at(begin, end, there.counter - offset)).collect();
    drop(stdin);
    wait_for(&mut clone, "the container")?;

    let worst = errors.iter().copied().max_by_key(|error| error.abs()).unwrap_or_default();
    println!(
        "the clock is wrong by {} us at first and by {} us at worst; messages say {} to {} us",
        errors[0] / 1000,
        worst / 1000,
        least / 1000,
        most / 1000
    );
    ensure!(worst.abs() < TOLERANCE, "it is wrong by so many nanoseconds: {errors:?}");
    ensure!(least <= TOLERANCE && most >= -TOLERANCE, "messages say {least} to {most}");
    Ok(())
}

/// What the host's clock said when its counter said this.
fn at(begin: Reading, end: Reading, counter: i64) -> i64 {
    let (ticks, time) = (end.counter - begin.counter, end.realtime - begin.realtime);
    let since = i128::from(counter - begin.counter) * i128::from(time) / i128::from(ticks.max(1));
    begin.realtime + since as i64
}

/// By how much the counter of the guest is ahead of the host's: KVM tells it among its figures.
fn counter_offset() -> Result<i64> {
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.expect_code(0)?.text())?;
    kvm_figure(&state["pid"].to_string(), "vcpu0/tsc-offset")
}

fn the_clock_of_a_clone_is_right() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    // A clock that has merely stood still is behind by more than that.
    std::thread::sleep(std::time::Duration::from_secs(2));
    ensure_right(&probe::bundle("clock")?, &templates, || Ok(()))
}

fn without_template() -> Result<Bundle> {
    probe::bundle("clock")?.edit(|config| config["annotations"]["dev.rvm.template"] = json!("off"))
}

fn the_clock_of_a_boot_is_right() -> Result<()> {
    ensure_right(&without_template()?, &Templates::new()?, || Ok(()))
}

fn the_clock_is_right_after_a_pause() -> Result<()> {
    let templates = Templates::new()?;
    ensure_right(&without_template()?, &templates, || {
        templates.rvm(&["pause", "story"])?.expect_code(0)?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        templates.rvm(&["resume", "story"])?.expect_code(0).map(drop)
    })
}
