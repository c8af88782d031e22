//! Accidents: whatever dies, and whenever, nothing hangs and nothing stays.

use std::io::Read;
use std::process::Child;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Story;
use crate::bundle::{Bundle, add_mounts, mount};
use crate::command::{
    docker, docker_run, docker_start, eventually, exit_code, rvm, rvm_detached, shell, spawn, wait_for,
};

pub const STORIES: &[(&str, Story)] = &[
    ("the_monitor_is_killed", the_monitor_is_killed),
    ("the_monitor_is_killed_while_it_starts", the_monitor_is_killed_while_it_starts),
    ("a_run_is_ended_before_its_start", a_run_is_ended_before_its_start),
    ("a_run_is_ended_while_a_hook_holds_it_up", a_run_is_ended_while_a_hook_holds_it_up),
    ("the_monitor_is_killed_under_an_engine", the_monitor_is_killed_under_an_engine),
    ("an_exec_stub_is_killed", an_exec_stub_is_killed),
    ("an_engines_exec_stub_is_killed", an_engines_exec_stub_is_killed),
    ("the_guest_kernel_panics", the_guest_kernel_panics),
    ("the_engine_is_restarted_under_a_container", the_engine_is_restarted_under_a_container),
    ("the_client_is_killed", the_client_is_killed),
    ("ten_containers_come_and_go", ten_containers_come_and_go),
];

fn monitor_of(id: &str) -> Result<String> {
    let pid = docker(&["inspect", "-f", "{{.State.Pid}}", id])?.expect_code(0)?.text();
    ensure!(pid != "0", "the container {id} does not run");
    Ok(pid)
}

fn the_monitor_is_killed() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    shell(&format!("kill -9 {}", monitor_of(&id)?))?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("137")?;
    docker(&["rm", &id])?.expect_code(0).map(drop)
}

fn the_monitor_is_killed_while_it_starts() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    // The moments fall into different phases: set-up, boot, start of the workload.
    for tenths in [0, 1, 3, 6, 10, 15] {
        let mut run = spawn("rvm", &["run", "--bundle", bundle.path(), "story"])?;
        shell(&format!("sleep {}.{}; pkill -9 -f '^rvm: story'", tenths / 10, tenths % 10))?;
        let _ = shell("sleep 0.2; pkill -9 -f '^rvm: story'");
        let status = wait_for(&mut run, "rvm run")?;
        ensure!(!status.success(), "the container seems to have succeeded");
        rvm(&["delete", "--force", "story"])?.expect_code(0)?;
    }
    Ok(())
}

fn send(run: &Child, signal: i32) -> Result<()> {
    shell(&format!("kill -{signal} {}", run.id()))?.expect_code(0).map(drop)
}

/// Fails unless a signal ends a run in silence, as a process without handlers, with all it had.
fn ensure_ended(mut run: Child, signal: i32) -> Result<()> {
    let code = exit_code(wait_for(&mut run, "rvm run")?);
    let mut said = String::new();
    run.stderr.take().context("it has a standard error")?.read_to_string(&mut said)?;
    ensure!(code == 128 + signal, "signal {signal} ended it with {code}: {said}");
    ensure!(said.is_empty(), "signal {signal} made it say: {said}");
    rvm(&["state", "story"])?.expect_failure(&["does not exist"]).map(drop)
}

fn a_run_is_ended_before_its_start() -> Result<()> {
    let kept = tempfile::Builder::new().prefix("e2e-hook").tempdir()?;
    let (reached, go_on) = (kept.path().join("reached"), kept.path().join("go-on"));
    let wait =
        format!("touch {}; while ! test -e {}; do sleep 0.1; done", reached.display(), go_on.display());
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", wait], "env": ["PATH=/usr/bin:/bin"]}]);
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| config["hooks"]["createRuntime"] = hook)?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
        let run = spawn("rvm", &["run", "--bundle", bundle.path(), "story"])?;
        eventually("the hook runs", || Ok(reached.exists()))?;
        send(&run, signal)?;
        std::fs::write(&go_on, "")?;
        ensure_ended(run, signal)?;
        std::fs::remove_file(&reached)?;
        std::fs::remove_file(&go_on)?;
    }
    Ok(())
}

fn a_run_is_ended_while_a_hook_holds_it_up() -> Result<()> {
    let kept = tempfile::Builder::new().prefix("e2e-hook").tempdir()?;
    let hook = json!([{
        "path": "/bin/sh", "args": ["sh", "-c", "touch /kept/reached; sleep 1000"],
        "env": ["PATH=/bin"],
    }]);
    let volume = mount("/kept", "bind", &kept.path().display().to_string(), &["rbind"]);
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        config["hooks"]["startContainer"] = hook;
        add_mounts(config, [volume]);
    })?;
    let reached = kept.path().join("reached");
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let run = spawn("rvm", &["run", "--bundle", bundle.path(), "story"])?;
        eventually("the hook runs", || Ok(reached.exists()))?;
        send(&run, signal)?;
        ensure_ended(run, signal)?;
        std::fs::remove_file(&reached)?;
    }
    Ok(())
}

fn the_monitor_is_killed_under_an_engine() -> Result<()> {
    for tenths in [5, 12, 20, 30] {
        let mut run = spawn("docker", &["run", "--rm", "--runtime=rvm", "busybox", "sleep", "1000"])?;
        eventually("a monitor runs", || Ok(shell("pgrep -f '^rvm: '")?.code == 0))?;
        shell(&format!("sleep {}.{}; pkill -9 -f '^rvm: '", tenths / 10, tenths % 10))?;
        let status = wait_for(&mut run, "docker run")?;
        ensure!(!status.success(), "the container seems to have succeeded");
        eventually("Docker knows no container", || Ok(docker(&["ps", "-aq"])?.text().is_empty()))?;
    }
    Ok(())
}

fn an_exec_stub_is_killed() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    rvm_detached(&["run", "--detach", "--bundle", bundle.path(), "story"])?;
    let mut exec = spawn("rvm", &["exec", "story", "sleep", "777"])?;
    let sleeps = || -> Result<bool> {
        Ok(rvm(&["exec", "story", "ps", "-o", "args"])?.expect_code(0)?.text().contains("sleep 777"))
    };
    eventually("the command runs", sleeps)?;
    exec.kill()?;
    wait_for(&mut exec, "rvm exec")?;
    eventually("the command is gone from the guest", || Ok(!sleeps()?))?;
    rvm(&["exec", "story", "echo", "alive"])?.expect_text("alive")?;
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

fn an_engines_exec_stub_is_killed() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    for tenths in [0, 2, 5, 10] {
        let mut exec = spawn("docker", &["exec", &id, "sleep", "777"])?;
        eventually("a stub runs", || Ok(shell("pgrep -f '^rvm: .* exec'")?.code == 0))?;
        shell(&format!("sleep {}.{}; pkill -9 -f '^rvm: .* exec'", tenths / 10, tenths % 10))?;
        let status = wait_for(&mut exec, "docker exec")?;
        ensure!(!status.success(), "the command seems to have succeeded");
        eventually("the command is gone from the guest", || {
            let seen = docker(&["exec", &id, "ps", "-o", "args"])?.expect_code(0)?.text();
            Ok(!seen.contains("sleep 777"))
        })?;
    }
    docker(&["rm", "-f", &id])?.expect_code(0).map(drop)
}

fn the_guest_kernel_panics() -> Result<()> {
    // A privileged container may tell its kernel to panic when memory runs out, and then see to it that it does.
    let panic = "echo 2 > /proc/sys/vm/panic_on_oom && head -c 200m /dev/zero | tail -n 1; sleep 100";
    let outcome = docker_run(&["--privileged", "-m", "64m", "busybox", "sh", "-c", panic])?;
    ensure!(outcome.code != 0, "the container survived its kernel");
    let bundle = Bundle::new(&["sh", "-c", panic])?.edit(|config| {
        config["linux"]["maskedPaths"] = serde_json::json!([]);
        config["linux"]["readonlyPaths"] = serde_json::json!([]);
        config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 64 << 20});
    })?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_failure(&["kernel", "panic"]).map(drop)
}

fn the_engine_is_restarted_under_a_container() -> Result<()> {
    let script = "trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done";
    let id = docker_start(&["busybox", "sh", "-c", script])?;
    let monitor = monitor_of(&id)?;
    let engine = shell("pgrep -o -x dockerd")?.expect_code(0)?.text();
    shell(&format!("kill -9 {engine}"))?.expect_code(0)?;
    // The host's init starts a new one.
    eventually("another engine runs", || {
        Ok(!matches!(shell("pgrep -o -x dockerd")?.text(), pid if pid.is_empty() || pid == engine))
    })?;
    eventually("the new engine answers", || Ok(docker(&["version"])?.code == 0))?;
    ensure!(monitor_of(&id)? == monitor, "the container was started anew");
    docker(&["exec", &id, "echo", "alive"])?.expect_text("alive")?;
    let lines = || -> Result<usize> { Ok(docker(&["logs", &id])?.expect_code(0)?.text().lines().count()) };
    let before = lines()?;
    eventually("the log goes on", || Ok(lines()? > before))?;
    docker(&["stop", "-t", "60", &id])?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("7")?;
    docker(&["rm", &id])?.expect_code(0).map(drop)
}

fn the_client_is_killed() -> Result<()> {
    let mut run =
        spawn("docker", &["run", "--rm", "--name", "story", "--runtime=rvm", "busybox", "sleep", "1000"])?;
    eventually("the container runs", || {
        Ok(docker(&["inspect", "-f", "{{.State.Running}}", "story"])?.text() == "true")
    })?;
    run.kill()?;
    wait_for(&mut run, "docker run")?;
    docker(&["rm", "-f", "story"])?.expect_code(0).map(drop)
}

fn ten_containers_come_and_go() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    for _ in 0..10 {
        rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_code(0)?;
    }
    Ok(())
}
