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
use crate::network::namespace::Namespace;

pub const STORIES: &[(&str, Story)] = &[
    ("a_start_takes_no_more_than_it_did", a_start_takes_no_more_than_it_did),
    ("an_idle_guest_sleeps", an_idle_guest_sleeps),
    ("nobody_is_woken_up_for_what_a_guest_changes", nobody_is_woken_up_for_what_a_guest_changes),
];

/// The same script makes the figures of `cargo xtask bench start`.
const COUNT: &str = include_str!("../counts/count");

/// The most that may be counted: some two fifths above what was counted when it was set, after other stories. Where the
/// host's memory is in one piece there are fewer exits, 243 with a template and 75 of an `exec`. With a network there were twice as
/// many before templates were tried with one.
const BOUNDS: &[(&str, &str, u64)] = &[
    ("cold", "exits", 1_100),
    ("cold", "faults", 2_750),
    ("cold", "bytesRead", 12_000_000),
    ("template", "exits", 510),
    ("template", "faults", 3_000),
    ("template", "bytesRead", 2_900_000),
    ("network", "exits", 560),
    ("network", "faults", 3_100),
    ("network", "bytesRead", 2_900_000),
    ("exec", "exits", 190),
    ("exec", "faults", 235),
    ("exec", "bytesRead", 5_000),
];

fn a_start_takes_no_more_than_it_did() -> Result<()> {
    let short = Bundle::new(&["true"])?;
    let cold =
        Bundle::new(&["true"])?.edit(|config| config["annotations"]["dev.rvm.template"] = json!("off"))?;
    let long = Bundle::new(&["sleep", "1000"])?;
    let namespace = Namespace::with_interface("e2e", "10.82.0.2/24")?;
    let network = Bundle::new(&["true"])?.edit(|config| namespace.join(config))?;
    let bundles = [&short, &cold, &long, &network].map(Bundle::path);
    let counted = run("sh", &[&["-c", COUNT, "count"][..], &bundles].concat())?.expect_code(0)?.text();
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
    let before = wakes(&monitor, "vcpu0")?;
    thread::sleep(A_WHILE);
    let woken = wakes(&monitor, "vcpu0")? - before;
    docker(&["rm", "-f", &id])?.expect_code(0)?;
    ensure!(
        woken <= WAKES,
        "the vCPU of a guest without work woke up {woken} times in {} s",
        A_WHILE.as_secs()
    );
    Ok(())
}

/// How many files a guest makes and removes, and how often the thread that listens for changes may wake up meanwhile: 131 and
/// 172 were counted, most of them for files that the guest forgets, and 647 when it listened to the guest's own changes. After
/// a request that took long it does so for a moment all the same, so the best of some rounds counts.
const FILES: u64 = 200;
const TURNS: u64 = 2 * FILES;
const ROUNDS: u32 = 3;

fn nobody_is_woken_up_for_what_a_guest_changes() -> Result<()> {
    let id = docker_start(&["-v", "/folder", "busybox", "sleep", "1000"])?;
    let monitor = docker(&["inspect", "-f", "{{.State.Pid}}", &id])?.expect_code(0)?.text();
    let work = format!("cd /folder; for i in $(seq {FILES}); do : > file-$i; done; rm file-*; ls | wc -l");
    let change_files = || docker(&["exec", &id, "sh", "-c", &work])?.expect_code(0);
    // The first time the guest learns of the folder and of the programs.
    let mut left = change_files()?.text();
    let mut woken = u64::MAX;
    for _ in 0..ROUNDS {
        let before = wakes(&monitor, "fs-notices")?;
        left += &change_files()?.text();
        woken = woken.min(wakes(&monitor, "fs-notices")? - before);
    }
    docker(&["rm", "-f", "-v", &id])?.expect_code(0)?;
    ensure!(left.bytes().all(|digit| digit == b'0'), "files are left: {left}");
    ensure!(woken <= TURNS, "who listens for changes of the host's files woke up {woken} times");
    Ok(())
}

/// How often a thread of a monitor has gone to sleep.
fn wakes(monitor: &str, thread: &str) -> Result<u64> {
    let find = format!("grep -lx {thread} /proc/{monitor}/task/*/comm | xargs dirname");
    let thread = shell(&find)?.expect_code(0)?.text();
    let status = fs::read_to_string(format!("{thread}/status"))?;
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(count.context("a thread counts how often it sleeps")?.trim().parse()?)
}
