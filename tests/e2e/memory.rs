//! What a container's memory costs the host.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use serde_json::Value;

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{docker, docker_start, eventually, rvm, rvm_detached, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("what_is_freed_goes_back_to_the_host", what_is_freed_goes_back_to_the_host),
    ("stats_tell_what_containers_cost", stats_tell_what_containers_cost),
    ("sixty_containers_run_at_once", sixty_containers_run_at_once),
];

const MIB: u64 = 1 << 20;

/// The memory that the container's monitor, and with it the guest, has of the host, in bytes.
fn memory_of(container: &str) -> Result<u64> {
    share_of(&docker(&["inspect", "-f", "{{.State.Pid}}", container])?.expect_code(0)?.text())
}

fn share_of(process: &str) -> Result<u64> {
    let rollup = shell(&format!("cat /proc/{process}/smaps_rollup"))?.expect_code(0)?.text();
    let line =
        rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("smaps_rollup has no Pss")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

fn what_is_freed_goes_back_to_the_host() -> Result<()> {
    let id = docker_start(&["-m", "1200m", "--shm-size", "1100m", "busybox", "sleep", "1000"])?;
    let exec = |words: &[&str]| docker(&[&["exec", &id][..], words].concat())?.expect_code(0);
    let before = memory_of(&id)?;
    exec(&["dd", "if=/dev/zero", "of=/dev/shm/full", "bs=1M", "count=1024"])?;
    let full = memory_of(&id)?;
    ensure!(full > before + 1000 * MIB, "{before} bytes before, {full} with a GiB more in use");
    exec(&["rm", "/dev/shm/full"])?;
    let most = before + 1024 * MIB / 20;
    eventually("95 % of the GiB went back", || Ok(memory_of(&id)? < most))?;
    docker(&["rm", "-f", &id])?.expect_code(0).map(drop)
}

fn stats_tell_what_containers_cost() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    for name in ["story-one", "story-two"] {
        rvm_detached(&["run", "--detach", "--bundle", bundle.path(), name])?;
    }
    let shown = rvm(&["stats", "--format", "json"])?.expect_code(0)?.text();
    let rows: Vec<Value> = serde_json::from_str(&shown)?;
    ensure!(rows.len() == 2, "two containers run: {shown}");
    for row in &rows {
        let bytes = |name: &str| row[name].as_u64().with_context(|| format!("no {name} in {row}"));
        let parts = bytes("monitor")? + bytes("guestPrivate")? + bytes("guestShared")? + bytes("helpers")?;
        ensure!(bytes("total")? == parts, "the parts are not the whole: {row}");
        ensure!(bytes("monitor")? < 16 * MIB, "the guest's memory is not the monitor's: {row}");
        // What the kernel itself adds up.
        let whole = share_of(&bytes("pid")?.to_string())?;
        let (least, most) = (whole * 9 / 10, whole * 11 / 10);
        ensure!((least..most).contains(&(parts - bytes("helpers")?)), "{row}, and the kernel says {whole}");
    }
    let table = rvm(&["stats", "story-one"])?.expect_code(0)?.text();
    ensure!(table.contains("story-one") && !table.contains("story-two"), "{table}");
    ["story-one", "story-two"]
        .iter()
        .try_for_each(|name| rvm(&["delete", "--force", name])?.expect_code(0).map(drop))?;
    rvm(&["stats", "story-one"])?.expect_failure(&["story-one"]).map(drop)
}

/// How many containers start one after another, and then as many at the same time.
const HALF: usize = 30;
/// Of how many, the first ones and the last ones, it counts how long they take to start.
const SOME: usize = 5;
/// How many there are in the end.
const ALL: usize = 2 * HALF + SOME;

/// On a machine that does nothing else, the last take hardly longer than the first. What decides here is far above what others
/// that keep it busy make of that, and far below what it would be if a start looked at each container there is.
fn ensure_is_hardly_slower(first: &[Duration], last: &[Duration]) -> Result<()> {
    let median = |times: &[Duration]| {
        let mut times = times.to_vec();
        times.sort_unstable();
        times[times.len() / 2]
    };
    let (first, last) = (median(first), median(last));
    println!("to start one took {first:.2?} at first, and {last:.2?} beside {} others", ALL - SOME);
    ensure!(last < 10 * first, "it took {first:?} at first, and {last:?} in the end");
    Ok(())
}

fn sixty_containers_run_at_once() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    let path = bundle.path();
    // So that none of them boots, and all share what they have not changed.
    rvm(&["template", "create"])?.expect_code(0)?;
    let start = |number: usize| {
        let begin = Instant::now();
        rvm_detached(&["run", "--detach", "--bundle", path, &format!("story-{number}")])?;
        anyhow::Ok(begin.elapsed())
    };
    let first = (0..HALF).map(start).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let starts = (HALF..2 * HALF).map(|number| scope.spawn(move || start(number)));
        // All of them are on their way before the first is waited for.
        let starts = starts.collect::<Vec<_>>();
        starts.into_iter().try_for_each(|start| match start.join() {
            Ok(outcome) => outcome.map(drop),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let last = (2 * HALF..ALL).map(start).collect::<Result<Vec<_>>>()?;

    for number in 0..ALL {
        rvm(&["exec", &format!("story-{number}"), "echo", "here"])?.expect_text("here")?;
    }
    ensure_is_hardly_slower(&first[..SOME], &last)?;
    let shown = rvm(&["stats", "--format", "json"])?.expect_code(0)?.text();
    let rows: Vec<Value> = serde_json::from_str(&shown)?;
    let total: u64 = rows.iter().filter_map(|row| row["total"].as_u64()).sum();
    ensure!(rows.len() == ALL, "{} of them run", rows.len());
    let each = total / ALL as u64;
    println!("each costs {} KiB", each >> 10);
    ensure!(each < 20 * MIB, "each costs {each} bytes: {shown}");

    // Whatever stays of any of them is found after the story.
    for number in 0..ALL {
        rvm(&["delete", "--force", &format!("story-{number}")])?.expect_code(0)?;
    }
    Ok(())
}
