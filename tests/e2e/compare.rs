//! Runtimes beside one another: `rvm compare`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Story;
use crate::command::{rvm, shell, spawn, wait_for};

pub const STORIES: &[(&str, Story)] = &[
    ("runtimes_are_compared_by_bundles", runtimes_are_compared_by_bundles),
    ("runtimes_are_compared_by_docker", runtimes_are_compared_by_docker),
    ("a_runtime_that_cannot_is_left_out_with_its_reason", a_runtime_that_cannot_is_left_out_with_its_reason),
    ("an_interrupted_comparison_leaves_nothing", an_interrupted_comparison_leaves_nothing),
];

/// What was found about a runtime.
fn figures<'a>(comparison: &'a Value, name: &str) -> Result<&'a Value> {
    let runtimes = comparison["runtimes"].as_array().context("no runtimes")?;
    runtimes
        .iter()
        .find(|runtime| runtime["name"] == name)
        .with_context(|| format!("no {name} in {comparison}"))
}

/// How many measurements there are of something.
fn count(figures: &Value, what: &str) -> usize {
    figures[what]["values"].as_array().map_or(0, Vec::len)
}

fn runtimes_are_compared_by_bundles() -> Result<()> {
    let words = [
        "compare",
        "--runtime",
        "rvm,runc,runsc",
        "-n",
        "2",
        "--format",
        "json",
        "--report",
        "/tmp/compared.html",
    ];
    let comparison: Value = serde_json::from_str(&rvm(&words)?.expect_code(0)?.text())?;
    for (name, owner) in [("rvm", "machine"), ("runc", "host"), ("runsc", "program")] {
        let figures = figures(&comparison, name)?;
        ensure!(figures["failure"].is_null(), "{figures}");
        ensure!((count(figures, "start"), count(figures, "exec")) == (2, 2), "{figures}");
        ensure!(figures["kernel"]["owner"] == owner, "{figures}");
    }
    let memory = |name| anyhow::Ok(figures(&comparison, name)?["memory"].as_u64().unwrap_or(0));
    ensure!(memory("rvm")? > memory("runc")?, "a machine takes more memory: {comparison}");
    // Without a profile, nothing is refused.
    let calls = |name, which: &str| anyhow::Ok(figures(&comparison, name)?["calls"][which].as_u64());
    ensure!(calls("runc", "workload")? == calls("runc", "known")?, "{comparison}");
    for name in ["rvm", "runsc"] {
        ensure!(calls(name, "workload")? == Some(0), "{comparison}");
        ensure!(calls(name, "most")? < calls(name, "known")?, "{comparison}");
    }
    ensure!(calls("rvm", "least")? < Some(100), "a vCPU's thread is allowed the least: {comparison}");
    let phases = figures(&comparison, "rvm")?["phases"].as_array().context("no phases")?;
    ensure!(phases.iter().any(|phase| phase["phase"] == "agent up"), "{phases:?}");
    let page = std::fs::read_to_string("/tmp/compared.html")?;
    std::fs::remove_file("/tmp/compared.html")?;
    ensure!(page.matches("<svg").count() == 4 && page.contains("runsc"), "{page}");
    Ok(())
}

fn runtimes_are_compared_by_docker() -> Result<()> {
    let table =
        rvm(&["compare", "--docker", "busybox", "--runtime", "rvm,runc", "-n", "1"])?.expect_code(0)?.text();
    ensure!(table.contains("busybox, by Docker; 1 rounds") && !table.contains("left out"), "{table}");
    let line =
        |name: &str| table.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
    ensure!(line("rvm ").contains("its own kernel, in a VM"), "{table}");
    ensure!(line("runc ").contains("the host's kernel"), "{table}");
    // Docker gives each container a profile.
    let calls = |name: &str| line(name).split_whitespace().last().and_then(|word| word.parse::<u32>().ok());
    ensure!(calls("runc ").is_some_and(|calls| (100..400).contains(&calls)), "{table}");
    ensure!(table.contains("Host calls: how many of the"), "{table}");
    ensure!(!table.contains('\x1b'), "there is no terminal");
    Ok(())
}

fn a_runtime_that_cannot_is_left_out_with_its_reason() -> Result<()> {
    let table = rvm(&["compare", "--runtime", "runc,broken=false", "-n", "1"])?.expect_code(0)?.text();
    ensure!(table.contains("broken was left out after a failure: exit status: 1"), "{table}");
    rvm(&["compare", "--runtime", "no-such-runtime"])?
        .expect_failure(&["no-such-runtime", "is not in PATH"])
        .map(drop)?;
    rvm(&["compare", "--bundle", "/no/such/bundle"])?
        .expect_failure(&["/no/such/bundle/config.json"])
        .map(drop)
}

fn an_interrupted_comparison_leaves_nothing() -> Result<()> {
    let mut comparison = spawn("rvm", &["compare", "--runtime", "rvm,runc", "-n", "1000"])?;
    std::thread::sleep(Duration::from_secs(5));
    // As a terminal does it: the runtime that is just at work gets it as well.
    shell(&format!("kill -INT -{}", comparison.id()))?.expect_code(0)?;
    let status = wait_for(&mut comparison, "the comparison")?;
    // Whatever runs still, or lies in folders for temporary files, is found after the story.
    ensure!(!status.success(), "it was not ended");
    Ok(())
}
