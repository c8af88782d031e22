//! Hooks: each kind at its point of a container's life, in its namespaces, with the state that is true then, and with the
//! consequence of its failure.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{RUNTIMES, create, state};
use crate::Story;
use crate::bundle::{Bundle, add_mounts, mount};
use crate::command::{eventually, run, rvm};

pub const STORIES: &[(&str, Story)] = &[
    ("every_hook_has_its_time_and_place", every_hook_has_its_time_and_place),
    ("a_hook_that_fails_before_the_container_is_created", a_hook_that_fails_before_the_container_is_created),
    ("a_hook_that_fails_when_the_container_starts", a_hook_that_fails_when_the_container_starts),
    ("a_hook_that_fails_after_the_deletion", a_hook_that_fails_after_the_deletion),
];

/// Writes down: its first argument, what the state on its standard input says, whether the process of the state is there,
/// in whose mount namespace it runs, and what of its environment is known.
const SCRIPT: &str = r#"#!/bin/sh
state=$(cat)
field() { printf %s "$state" | sed -n "s/.*\"$1\":\"*\([^\",}]*\).*/\1/p"; }
pid=$(field pid)
[ -d "/proc/${pid:-0}" ] && process=process || process=none
[ "$(readlink /proc/self/ns/mnt)" = "$MOUNTS" ] && place=host || place=container
[ "$(field bundle)" = "$BUNDLE" ] && bundle=bundle || bundle=$(field bundle)
echo "$1: $(field status) $(field id) $(field dev.story) $bundle $process $place ${HOME-no home}" >>"$LOG"
[ "$1" != "$FAILING" ]
"#;

/// A bundle with hooks of every kind that write to its log. They are programs of the host's, but that of `startContainer`,
/// which is one of the container's.
fn bundle_with_hooks(failing: &str) -> Result<Bundle> {
    let bundle = Bundle::new(&["sh", "-c", "cat /log/log >/log/seen; exec sleep 1000"])?;
    let folder = bundle.path().to_owned();
    fs::create_dir(format!("{folder}/log"))?;
    for place in [&folder, &format!("{folder}/rootfs")] {
        let script = format!("{place}/hook");
        fs::write(&script, SCRIPT)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    }
    let mounts = fs::read_link("/proc/self/ns/mnt")?.display().to_string();
    let hook = |name: &str, within: bool| {
        let (path, log) = match within {
            true => ("/hook".to_owned(), "/log/log".to_owned()),
            false => (format!("{folder}/hook"), format!("{folder}/log/log")),
        };
        let env = [
            "PATH=/usr/bin:/bin".to_owned(),
            format!("MOUNTS={mounts}"),
            format!("BUNDLE={folder}"),
            format!("LOG={log}"),
            format!("FAILING={failing}"),
        ];
        json!({ "path": path, "args": ["hook", name], "env": env })
    };
    let hooks = json!({
        "prestart": [hook("prestart", false)],
        "createRuntime": [hook("createRuntime", false), hook("createRuntime again", false)],
        "createContainer": [hook("createContainer", false)],
        "startContainer": [hook("startContainer", true)],
        "poststart": [hook("poststart", false), hook("poststart again", false)],
        "poststop": [hook("poststop", false), hook("poststop again", false)],
    });
    let log = mount("/log", "bind", &format!("{folder}/log"), &["bind"]);
    bundle.edit(|config| {
        config["annotations"] = json!({ "dev.story": "told" });
        config["hooks"] = hooks;
        add_mounts(config, [log]);
    })
}

/// What the hooks have written since it was last looked at.
fn take_log(bundle: &Bundle) -> Result<String> {
    let path = format!("{}/log/log", bundle.path());
    let told = fs::read_to_string(&path).unwrap_or_default();
    fs::write(path, "")?;
    Ok(told)
}

/// Fails unless this is what the hooks have written since it was last looked at.
fn ensure_log(bundle: &Bundle, expected: &str) -> Result<()> {
    let told = take_log(bundle)?;
    ensure!(told == expected, "the hooks have told\n{told}instead of\n{expected}");
    Ok(())
}

/// Fails unless these hooks, and no others, have run since it was last looked at.
fn ensure_ran(bundle: &Bundle, expected: &[&str]) -> Result<()> {
    let told = take_log(bundle)?;
    let ran: Vec<_> = told.lines().filter_map(|line| line.split(':').next()).collect();
    ensure!(ran == expected, "these hooks have run: {ran:?}, and not {expected:?}");
    Ok(())
}

/// runc 1.1 calls the `poststart` hooks when the container is created, and so is no measure here.
fn every_hook_has_its_time_and_place() -> Result<()> {
    let bundle = bundle_with_hooks("none")?;
    create("rvm", &bundle)?.expect_code(0)?;
    ensure_log(
        &bundle,
        "prestart: creating story told bundle process host no home\n\
         createRuntime: creating story told bundle process host no home\n\
         createRuntime again: creating story told bundle process host no home\n\
         createContainer: creating story told bundle process container no home\n",
    )?;
    rvm(&["start", "story"])?.expect_code(0)?;
    ensure_log(
        &bundle,
        "startContainer: created story told bundle process container no home\n\
         poststart: running story told bundle process host no home\n\
         poststart again: running story told bundle process host no home\n",
    )?;
    let seen = format!("{}/log/seen", bundle.path());
    eventually("the process has looked", || Ok(fs::read_to_string(&seen)?.contains("startContainer")))?;
    rvm(&["delete", "--force", "story"])?.expect_code(0)?;
    ensure_log(
        &bundle,
        "poststop: stopped story told bundle none host no home\n\
         poststop again: stopped story told bundle none host no home\n",
    )
}

fn a_hook_that_fails_before_the_container_is_created() -> Result<()> {
    let order = ["prestart", "createRuntime", "createRuntime again", "createContainer"];
    for (index, failing) in order.iter().enumerate() {
        let bundle = bundle_with_hooks(failing)?;
        let ran = [&order[..=index], &["poststop", "poststop again"]].concat();
        for runtime in RUNTIMES {
            create(runtime, &bundle)?.expect_failure(&["hook"])?;
            run(runtime, &["state", "story"])?.expect_failure(&["does not exist"])?;
            ensure_ran(&bundle, &ran).with_context(|| format!("with {runtime}, when {failing} fails"))?;
        }
    }
    Ok(())
}

/// runc 1.1 does not tell of a `startContainer` hook that failed.
fn a_hook_that_fails_when_the_container_starts() -> Result<()> {
    for (failing, ran) in
        [("startContainer", &["startContainer"][..]), ("poststart", &["startContainer", "poststart"])]
    {
        let bundle = bundle_with_hooks(failing)?;
        create("rvm", &bundle)?.expect_code(0)?;
        take_log(&bundle)?;
        rvm(&["start", "story"])?.expect_failure(&[failing, "hook"])?;
        ensure_ran(&bundle, ran)?;
        eventually("it has stopped", || Ok(state("rvm")?["status"] == "stopped"))?;
        if failing == "startContainer" {
            ensure!(!fs::exists(format!("{}/log/seen", bundle.path()))?, "the process has run");
        }
        rvm(&["delete", "story"])?.expect_code(0)?;
        ensure_ran(&bundle, &["poststop", "poststop again"])?;
    }
    Ok(())
}

/// runc 1.1 calls no more hooks then.
fn a_hook_that_fails_after_the_deletion() -> Result<()> {
    let bundle = bundle_with_hooks("poststop")?;
    create("rvm", &bundle)?.expect_code(0)?;
    take_log(&bundle)?;
    rvm(&["delete", "--force", "story"])?.expect_code(0)?;
    ensure_ran(&bundle, &["poststop", "poststop again"])?;
    rvm(&["state", "story"])?.expect_failure(&["does not exist"]).map(drop)
}
