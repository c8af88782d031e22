//! The operations and the state: what each does in which state of the container, and what it refuses in the others.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{RUNTIMES, create, state};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{eventually, run};

pub const STORIES: &[(&str, Story)] = &[
    ("each_operation_has_its_states", each_operation_has_its_states),
    ("a_container_that_was_never_started_can_be_ended", a_container_that_was_never_started_can_be_ended),
    ("a_container_without_a_process_cannot_be_started", a_container_without_a_process_cannot_be_started),
];

fn bundle() -> Result<Bundle> {
    Bundle::new(&["sleep", "1000"])?
        .edit(|config| config["annotations"] = json!({ "org.example.key": "a value", "empty": "" }))
}

/// Fails unless the container has this status, and what else the specification wants to be told. Returns its process.
fn ensure_state(runtime: &str, bundle: &Bundle, status: &str) -> Result<Value> {
    let state = state(runtime)?;
    ensure!(state["id"] == "story" && state["status"] == status, "{runtime} has not {status}: {state}");
    ensure!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{state}");
    ensure!(state["bundle"].as_str().map(Path::new) == Some(Path::new(bundle.path())), "{state}");
    ensure!(state["annotations"] == json!({ "org.example.key": "a value", "empty": "" }), "{state}");
    let lives =
        state["pid"].as_u64().is_some_and(|pid| fs::exists(format!("/proc/{pid}/ns")).unwrap_or(false));
    ensure!(lives == (status != "stopped"), "the process of {state}");
    Ok(state["pid"].clone())
}

/// Does each of these, and fails unless it is refused.
fn ensure_refused(runtime: &str, operations: &[&[&str]]) -> Result<()> {
    let each = |words: &&[&str]| run(runtime, words)?.expect_failure(&[]).map(drop);
    operations.iter().try_for_each(each)
}

const START: &[&str] = &["start", "story"];
const KILL: &[&str] = &["kill", "story", "KILL"];
const DELETE: &[&str] = &["delete", "story"];
const EXEC: &[&str] = &["exec", "story", "true"];
const PAUSE: &[&str] = &["pause", "story"];
const RESUME: &[&str] = &["resume", "story"];
const STATE: &[&str] = &["state", "story"];

/// Fails unless a further process of the running container is what its description says.
fn ensure_exec(runtime: &str, bundle: &Bundle) -> Result<()> {
    let script = "id; pwd; echo \"$GREETING\"; grep -E '^(Cap...|NoNewPrivs):' /proc/self/status; ulimit -Sn; ulimit -Hn; exit 7";
    let process = json!({
        "args": ["sh", "-c", script],
        "cwd": "/tmp",
        "env": ["PATH=/bin", "GREETING=good day"],
        "user": { "uid": 1000, "gid": 1001, "additionalGids": [5, 2000] },
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"],
            "effective": ["CAP_KILL"], "ambient": ["CAP_KILL"],
        },
        "noNewPrivileges": true,
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 111, "hard": 222 }],
    });
    let expected = "uid=1000 gid=1001 groups=5(tty),2000\n/tmp\ngood day\nCapInh:\t0000000000000020\n\
                    CapPrm:\t0000000000000020\nCapEff:\t0000000000000020\nCapBnd:\t0000000000000021\n\
                    CapAmb:\t0000000000000020\nNoNewPrivs:\t1\n111\n222";
    let path = format!("{}/process.json", bundle.path());
    fs::write(&path, process.to_string())?;
    let outcome = run(runtime, &["exec", "--process", &path, "story"])?.expect_code(7)?;
    ensure!(outcome.text() == expected, "under {runtime}: {outcome:?}");
    Ok(())
}

fn each_operation_has_its_states() -> Result<()> {
    for runtime in RUNTIMES {
        let bundle = bundle()?;
        create(runtime, &bundle)?.expect_code(0)?;
        let pid = ensure_state(runtime, &bundle, "created")?;
        create(runtime, &bundle)?.expect_failure(&["exist"])?;
        ensure!(ensure_state(runtime, &bundle, "created")? == pid, "{runtime} has replaced the process");

        // What is changed from now on is for a container to come.
        let bundle = bundle.edit(|config| config["process"]["args"] = json!(["false"]))?;
        run(runtime, START)?.expect_code(0)?;
        ensure!(ensure_state(runtime, &bundle, "running")? == pid, "{runtime} has replaced the process");
        ensure_refused(runtime, &[START, DELETE, RESUME])?;
        create(runtime, &bundle)?.expect_failure(&["exist"])?;
        ensure!(ensure_state(runtime, &bundle, "running")? == pid, "{runtime} has replaced the process");
        run(runtime, &["exec", "story", "cat", "/proc/1/cmdline"])?.expect_text("sleep\u{0}1000\u{0}")?;
        ensure_exec(runtime, &bundle)?;

        run(runtime, KILL)?.expect_code(0)?;
        eventually("it has stopped", || Ok(state(runtime)?["status"] == "stopped"))?;
        ensure_refused(runtime, &[START, KILL, EXEC, PAUSE, RESUME])?;
        ensure_state(runtime, &bundle, "stopped")?;
        run(runtime, DELETE)?.expect_code(0)?;
        ensure_refused(runtime, &[STATE, START, KILL, DELETE])?;
        ensure_refused(runtime, &[&["create"], &["start"], &["state"], &["kill"], &["delete"]])?;
    }
    Ok(())
}

fn a_container_that_was_never_started_can_be_ended() -> Result<()> {
    for runtime in RUNTIMES {
        let bundle = bundle()?;
        create(runtime, &bundle)?.expect_code(0)?;
        run(runtime, KILL)?.expect_code(0)?;
        eventually("it has stopped", || Ok(state(runtime)?["status"] == "stopped"))?;
        ensure_refused(runtime, &[START, KILL])?;
        run(runtime, DELETE)?.expect_code(0)?;
        // Its name is free again.
        create(runtime, &bundle)?.expect_code(0)?;
        ensure_state(runtime, &bundle, "created")?;
        run(runtime, &["delete", "--force", "story"])?.expect_code(0)?;
    }
    Ok(())
}

/// runc does not even create it, which the specification wants.
fn a_container_without_a_process_cannot_be_started() -> Result<()> {
    let bundle = bundle()?.edit(|config| config["process"] = Value::Null)?;
    create("rvm", &bundle)?.expect_code(0)?;
    ensure_state("rvm", &bundle, "created")?;
    run("rvm", START)?.expect_failure(&["has no process"])?;
    eventually("it has stopped", || Ok(state("rvm")?["status"] == "stopped"))?;
    run("rvm", DELETE)?.expect_code(0).map(drop)
}
