//! What a start takes, and a container that does nothing, as far as that does not depend on how fast the machine is. Whoever
//! makes it dearer hears of it here.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{docker, docker_start, run, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("a_start_takes_no_more_than_it_did", a_start_takes_no_more_than_it_did),
    ("an_idle_guest_sleeps", an_idle_guest_sleeps),
];

/// The same script makes the figures of `cargo xtask bench start`.
const COUNT: &str = include_str!("../counts/count");

/// The most that may be counted: some two fifths above what was counted when it was set, after other stories. Where the
/// host's memory is in one piece there are fewer exits, 280 with a template and 75 of an `exec`.
const BOUNDS: &[(&str, &str, u64)] = &[
    ("cold", "exits", 1_100),
    ("cold", "faults", 2_750),
    ("cold", "bytesRead", 12_000_000),
    ("template", "exits", 560),
    ("template", "faults", 3_600),
    ("template", "bytesRead", 2_900_000),
    ("exec", "exits", 190),
    ("exec", "faults", 235),
    ("exec", "bytesRead", 5_000),
];

fn a_start_takes_no_more_than_it_did() -> Result<()> {
    let short = Bundle::new(&["true"])?;
    let cold =
        Bundle::new(&["true"])?.edit(|config| config["annotations"]["dev.rvm.template"] = json!("off"))?;
    let long = Bundle::new(&["sleep", "1000"])?;
    let counted =
        run("sh", &["-c", COUNT, "count", short.path(), cold.path(), long.path()])?.expect_code(0)?.text();
    let counts: Value = serde_json::from_str(&counted).with_context(|| counted.clone())?;
    for (path, what, bound) in BOUNDS {
        let count = counts[path][what].as_u64().with_context(|| format!("no {what} of {path}: {counted}"))?;
        ensure!(count > 0, "{what} of {path} are not counted: {counted}");
        ensure!(count <= *bound, "{what} of {path}: {count}, which is more than {bound}; all: {counted}");
    }
    let of = |path: &str| counts[path]["exits"].as_u64().unwrap_or_default();
    ensure!(of("template") < of("cold"), "a template spares many of them: {counted}");
    Ok(())
}

/// How often a guest's vCPU may wake up in [`A_WHILE`] when nothing happens in it. 60 were counted, and 143 when the guest
/// watched its clock and its free memory.
const WAKES: u64 = 100;
const A_WHILE: Duration = Duration::from_secs(20);

fn an_idle_guest_sleeps() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let monitor = docker(&["inspect", "-f", "{{.State.Pid}}", &id])?.expect_code(0)?.text();
    // The guest's kernel has reported by then what memory it does not need.
    thread::sleep(Duration::from_secs(8));
    let before = wakes(&monitor)?;
    thread::sleep(A_WHILE);
    let woken = wakes(&monitor)? - before;
    docker(&["rm", "-f", &id])?.expect_code(0)?;
    ensure!(
        woken <= WAKES,
        "the vCPU of a guest without work woke up {woken} times in {} s",
        A_WHILE.as_secs()
    );
    Ok(())
}

/// How often the first vCPU of a machine has gone to sleep.
fn wakes(monitor: &str) -> Result<u64> {
    let find = format!("grep -lx vcpu0 /proc/{monitor}/task/*/comm | xargs dirname");
    let thread = shell(&find)?.expect_code(0)?.text();
    let status = fs::read_to_string(format!("{thread}/status"))?;
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(count.context("a thread counts how often it sleeps")?.trim().parse()?)
}
