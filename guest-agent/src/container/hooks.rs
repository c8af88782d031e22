//! `startContainer` hooks: programs of the container that run in it right before its first process.
//!
//! All other hooks run on the host, before or after the guest has anything to do with them.

use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use oci_spec::runtime::Hook;
use serde_json::Value;

use super::Container;
use crate::error::{Context, Result, other};

/// Runs the hooks, in the calling process's namespaces and with its identity. The first that fails ends it.
pub fn run_start_container(container: &Container) -> Result<()> {
    let hooks = container.spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(()) };
    let state = state(container)?;
    for hook in hooks {
        run(hook, &state)?;
    }
    Ok(())
}

/// The container's state as the host tells it, with the process id as the container sees it, and by now
/// created.
fn state(container: &Container) -> Result<String> {
    let mut state: Value =
        serde_json::from_str(&container.hook_state).context(|| "the state for the container's hooks")?;
    if let Some(fields) = state.as_object_mut() {
        fields.insert("pid".to_owned(), std::process::id().into());
        fields.insert("status".to_owned(), "created".into());
    }
    Ok(state.to_string())
}

fn run(hook: &Hook, state: &str) -> Result<()> {
    let name = hook.path().display();
    let mut command = Command::new(hook.path());
    if let Some((first, rest)) = hook.args().as_deref().and_then(<[_]>::split_first) {
        command.arg0(first).args(rest);
    }
    let variables = hook.env().iter().flatten().filter_map(|variable| variable.split_once('='));
    command.env_clear().envs(variables).stdin(Stdio::piped());
    if let Some(seconds) = hook.timeout().and_then(|seconds| u32::try_from(seconds).ok()) {
        limit_time(&mut command, seconds);
    }
    let mut child = command.spawn().context(|| format!("running the startContainer hook {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its input.
        let _ = stdin.write_all(state.as_bytes());
    }
    let status = child.wait().context(|| format!("waiting for the startContainer hook {name}"))?;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(other(format!("the startContainer hook {name} failed with exit code {code}"))),
        (None, Some(libc::SIGALRM)) => Err(other(format!("the startContainer hook {name} took too long"))),
        (None, signal) => Err(other(format!(
            "the startContainer hook {name} was ended by signal {}",
            signal.unwrap_or_default()
        ))),
    }
}

/// The alarm survives `execve` and, unless the hook cares for it, ends it.
fn limit_time(command: &mut Command, seconds: u32) {
    let set_alarm = move || {
        nix::unistd::alarm::set(seconds);
        Ok(())
    };
    // SAFETY: alarm(2) is async-signal-safe, and this process has a single thread anyway.
    unsafe { command.pre_exec(set_alarm) };
}
