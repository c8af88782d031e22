//! What the OCI specification and other runtimes promise, and no engine asks for every day.

pub mod files;
pub mod hooks;
pub mod operations;
pub mod process;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Story;
use crate::bundle::{Bundle, add_mounts, mount};
use crate::command::{Outcome, run, rvm, rvm_detached, shell, spawn};

pub const STORIES: &[(&str, Story)] = &[
    ("hooks_write_to_a_root_that_will_be_read_only", hooks_write_to_a_root_that_will_be_read_only),
    ("mounts_below_a_volume_come_with_it", mounts_below_a_volume_come_with_it),
    (
        "a_container_that_joins_a_uts_namespace_has_its_name",
        a_container_that_joins_a_uts_namespace_has_its_name,
    ),
    ("an_exec_can_wait_for_the_end_of_a_pause", an_exec_can_wait_for_the_end_of_a_pause),
    ("a_node_of_no_device_is_a_node", a_node_of_no_device_is_a_node),
    ("an_unknown_capability_is_told_of", an_unknown_capability_is_told_of),
];

/// Whoever knows nothing of virtual machines is the measure.
const RUNTIMES: [&str; 2] = ["runc", "rvm"];

/// Creates the container `story`. It keeps the streams that it is given, so these are a file.
fn create(runtime: &str, bundle: &Bundle) -> Result<Outcome> {
    let said = format!("{}/said", bundle.path());
    shell(&format!(
        "{runtime} create --bundle {} story </dev/null >{said} 2>&1; code=$?; cat {said} >&2; exit $code",
        bundle.path()
    ))
}

/// The state of the container `story`.
fn state(runtime: &str) -> Result<Value> {
    let text = run(runtime, &["state", "story"])?.expect_code(0)?.text();
    serde_json::from_str(&text).with_context(|| format!("{runtime} printed {text}"))
}

/// Fails unless the bundle's container prints this text, with either runtime.
fn both_print(bundle: &Bundle, text: &str) -> Result<()> {
    RUNTIMES
        .iter()
        .try_for_each(|runtime| run(runtime, &["run", "--bundle", bundle.path(), "story"])?.expect_text(text))
}

/// What the bundle's container prints with either runtime; fails unless it is the same.
fn same_text(bundle: &Bundle) -> Result<String> {
    let printed = |runtime| run(runtime, &["run", "--bundle", bundle.path(), "story"])?.expect_code(0);
    let (theirs, ours) = (printed("runc")?.text(), printed("rvm")?.text());
    ensure!(ours == theirs, "under runc:\n{theirs}\nunder rvm:\n{ours}");
    Ok(ours)
}

fn hooks_write_to_a_root_that_will_be_read_only() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "cat /made; echo x 2>/dev/null > /made || echo read-only"])?;
    let command = format!("echo of the hook > {}/rootfs/made", bundle.path());
    let bundle = bundle.edit(|config| {
        config["root"]["readonly"] = json!(true);
        config["hooks"] =
            json!({ "createContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", command] }] });
    })?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_text("of the hook\nread-only")
}

fn mounts_below_a_volume_come_with_it() -> Result<()> {
    let line = "grep -c ' /data/nested ' /proc/self/mountinfo; \
                echo x 2>/dev/null > /data/file || echo read-only; echo y > /data/nested/file && cat /data/nested/file";
    let bundle = Bundle::new(&["sh", "-c", line])?;
    let volume = format!("{}/volume", bundle.path());
    let bundle =
        bundle.edit(|config| add_mounts(config, [mount("/data", "bind", &volume, &["rbind", "ro"])]))?;
    shell(&format!("mkdir -p {volume}/nested && mount -t tmpfs x {volume}/nested"))?.expect_code(0)?;
    let outcome = rvm(&["run", "--bundle", bundle.path(), "story"]);
    shell(&format!("umount {volume}/nested"))?.expect_code(0)?;
    outcome?.expect_text("1\nread-only\ny")
}

fn a_container_that_joins_a_uts_namespace_has_its_name() -> Result<()> {
    let first = Bundle::new(&["sleep", "1000"])?.edit(|config| config["hostname"] = json!("kitchen"))?;
    shell(&format!("rvm create --bundle {} story </dev/null >/dev/null 2>&1", first.path()))?
        .expect_code(0)?;
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.text())?;
    let path = format!("/proc/{}/ns/uts", state["pid"]);
    let second = Bundle::new(&["hostname"])?.edit(|config| {
        config["hostname"] = Value::Null;
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "uts" {
                namespace["path"] = json!(path);
            }
        }
    })?;
    rvm(&["run", "--bundle", second.path(), "guest"])?.expect_text("kitchen")?;
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

fn an_exec_can_wait_for_the_end_of_a_pause() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    rvm_detached(&["run", "--detach", "--bundle", bundle.path(), "story"])?;
    rvm(&["pause", "story"])?.expect_code(0)?;
    rvm(&["exec", "story", "true"])?.expect_failure(&["paused"])?;
    let mut resume = spawn("sh", &["-c", "sleep 1; rvm resume story"])?;
    rvm(&["exec", "--ignore-paused", "story", "echo", "on"])?.expect_text("on")?;
    ensure!(resume.wait()?.success(), "the container was not resumed");
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

fn a_node_of_no_device_is_a_node() -> Result<()> {
    let bundle = Bundle::new(&["stat", "-c", "%t:%T %a", "/dev/none"])?.edit(|config| {
        let none = json!({ "path": "/dev/none", "type": "c", "major": 10, "minor": 4660, "fileMode": 432 });
        config["linux"]["devices"] = json!([none]);
    })?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_text("a:1234 660")
}

fn an_unknown_capability_is_told_of() -> Result<()> {
    let bundle = Bundle::new(&["echo", "runs"])?
        .edit(|config| config["process"]["capabilities"]["bounding"] = json!(["CAP_TELEPORT"]))?;
    let outcome = rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_code(0)?;
    ensure!(outcome.error_text().contains("CAP_TELEPORT"), "{outcome:?}");
    outcome.expect_text("runs")
}
