//! A container's life as Docker's commands lead it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{docker, docker_run, docker_start, eventually, shell, spawn};
use crate::terminal::Terminal;

pub const STORIES: &[(&str, Story)] = &[
    ("a_detached_container_logs_and_is_removed", a_detached_container_logs_and_is_removed),
    ("exec_runs_beside_the_container", exec_runs_beside_the_container),
    ("exec_on_a_terminal_follows_its_size", exec_on_a_terminal_follows_its_size),
    ("run_on_a_terminal_is_a_shell", run_on_a_terminal_is_a_shell),
    ("stop_lets_the_workload_end_itself", stop_lets_the_workload_end_itself),
    ("stop_kills_what_does_not_listen", stop_kills_what_does_not_listen),
    ("signals_reach_the_workload", signals_reach_the_workload),
    ("pause_stops_the_workload_and_unpause_goes_on", pause_stops_the_workload_and_unpause_goes_on),
    ("wait_returns_the_exit_code", wait_returns_the_exit_code),
    ("a_stopped_container_starts_again_with_its_files", a_stopped_container_starts_again_with_its_files),
    ("files_are_copied_in_and_out", files_are_copied_in_and_out),
    ("top_names_the_container", top_names_the_container),
    ("orphans_are_reaped", orphans_are_reaped),
];

fn a_detached_container_logs_and_is_removed() -> Result<()> {
    let id = docker_start(&["busybox", "sh", "-c", "echo started; echo warned >&2; sleep 1000"])?;
    eventually("the log holds both lines", || {
        let log = docker(&["logs", &id])?;
        Ok(log.text() == "started" && log.error_text() == "warned\n")
    })?;
    docker(&["inspect", "-f", "{{.State.Status}}", &id])?.expect_text("running")?;
    docker(&["rm", "-f", &id])?.expect_code(0)?;
    docker(&["inspect", &id])?.expect_failure(&["No such object"]).map(drop)
}

fn exec_runs_beside_the_container() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    docker(&["exec", &id, "echo", "hello"])?.expect_text("hello")?;
    docker(&[
        "exec",
        "-u",
        "1000:1000",
        "-w",
        "/tmp",
        "-e",
        "A=b",
        &id,
        "sh",
        "-c",
        "id -u; id -g; pwd; echo $A",
    ])?
    .expect_text("1000\n1000\n/tmp\nb")?;
    docker(&["exec", &id, "sh", "-c", "exit 3"])?.expect_code(3)?;
    // Docker 26 makes 126 of every exec that cannot start, with runc too; the message tells them apart.
    docker(&["exec", &id, "no-such-program"])?.expect_code(126).map(|outcome| outcome.text()).and_then(
        |said| {
            ensure!(said.contains("executable file not found in $PATH"), "the message is: {said}");
            Ok(())
        },
    )?;
    docker(&["exec", &id, "/etc/passwd"])?.expect_code(126)?;
    let seen = docker(&["exec", &id, "ps", "-o", "pid,args"])?.expect_code(0)?.text();
    ensure!(seen.contains("    1 sleep 1000"), "exec does not see the container's processes: {seen}");
    Ok(())
}

fn exec_on_a_terminal_follows_its_size() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let mut terminal = Terminal::start(Command::new("docker").args(["exec", "-it", &id, "sh"]), 31, 99)?;
    terminal.wait_for("#")?;
    terminal.type_text("tty; stty size\n")?;
    terminal.wait_for("/dev/pts/")?;
    terminal.wait_for("31 99")?;
    terminal.type_text("exit 6\n")?;
    let code = terminal.finish()?;
    ensure!(code == 6, "the shell ended with {code}");

    // Another program hears of a change, and the size that it reads at that moment is the new one.
    let script = "trap 'stty size' WINCH; echo waiting; while :; do sleep 0.1; done";
    let mut watch = Command::new("docker");
    watch.args(["exec", "-it", &id, "sh", "-c", script]);
    let mut terminal = Terminal::start(&mut watch, 31, 99)?;
    terminal.wait_for("waiting")?;
    // The Docker client shows the first output before it listens for changes, with every runtime.
    let mut rows = 31;
    eventually("the client listens for changes", || {
        rows += 1;
        terminal.resize(rows, 99)?;
        Ok(terminal.screen().contains(" 99"))
    })?;
    terminal.resize(44, 123)?;
    terminal.wait_for("44 123")?;
    terminal.type_text("\u{3}")?;
    let code = terminal.finish()?;
    ensure!(code == 130, "the program ended with {code}");
    Ok(())
}

fn run_on_a_terminal_is_a_shell() -> Result<()> {
    let mut run = Command::new("docker");
    run.args(["run", "--rm", "-it", "--runtime=rvm", "busybox", "sh"]);
    let mut terminal = Terminal::start(&mut run, 25, 80)?;
    terminal.wait_for("#")?;
    terminal.type_text("test -t 0 && echo on-a-$((1+1))-terminal\n")?;
    terminal.wait_for("on-a-2-terminal")?;
    terminal.type_text("sh -c 'echo about to sleep; exec sleep 1000'\n")?;
    terminal.wait_for("\nabout to sleep")?;
    terminal.type_text("\u{3}")?;
    terminal.type_text("echo interrupted=$?\n")?;
    terminal.wait_for("interrupted=130")?;
    terminal.type_text("exit 4\n")?;
    let code = terminal.finish()?;
    ensure!(code == 4, "the shell ended with {code}");
    Ok(())
}

fn stop_lets_the_workload_end_itself() -> Result<()> {
    let id = docker_start(&[
        "busybox",
        "sh",
        "-c",
        "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done",
    ])?;
    eventually("the workload is up", || Ok(docker(&["logs", &id])?.text() == "up"))?;
    docker(&["stop", "-t", "60", &id])?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("7")?;
    docker(&["logs", &id])?.expect_text("up\nbye")
}

fn stop_kills_what_does_not_listen() -> Result<()> {
    // Process 1 of a pid namespace has no default action for SIGTERM.
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    docker(&["stop", "-t", "1", &id])?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("137")
}

fn signals_reach_the_workload() -> Result<()> {
    let script = "trap 'echo usr1' USR1; echo up; while :; do sleep 0.1; done";
    let id = docker_start(&["busybox", "sh", "-c", script])?;
    eventually("the workload is up", || Ok(docker(&["logs", &id])?.text() == "up"))?;
    docker(&["kill", "-s", "USR1", &id])?.expect_code(0)?;
    eventually("the signal was handled", || Ok(docker(&["logs", &id])?.text() == "up\nusr1"))
}

fn pause_stops_the_workload_and_unpause_goes_on() -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let id = docker_start(&["busybox", "sh", "-c", script])?;
    let lines = || -> Result<usize> { Ok(docker(&["logs", &id])?.text().lines().count()) };
    eventually("the workload counts", || Ok(lines()? > 2))?;
    docker(&["pause", &id])?.expect_code(0)?;
    docker(&["inspect", "-f", "{{.State.Status}}", &id])?.expect_text("paused")?;
    let paused = lines()?;
    std::thread::sleep(Duration::from_secs(2));
    // A line may have been on its way when the machine stopped.
    ensure!(lines()? <= paused + 1, "it counted on from {paused} to {} while paused", lines()?);
    docker(&["exec", &id, "true"])?.expect_failure(&["paused"])?;
    docker(&["unpause", &id])?.expect_code(0)?;
    eventually("the workload counts on", || Ok(lines()? > paused + 2))?;
    let guest: i64 = docker(&["exec", &id, "date", "+%s"])?.expect_code(0)?.text().parse()?;
    let host: i64 = shell("date +%s")?.text().parse()?;
    ensure!((guest - host).abs() <= 5, "the guest's clock says {guest}, the host's {host}");
    Ok(())
}

fn wait_returns_the_exit_code() -> Result<()> {
    let id = docker_start(&["busybox", "sh", "-c", "sleep 3; exit 12"])?;
    docker(&["wait", &id])?.expect_text("12")?;
    let gone = spawn("docker", &["wait", "no-such-container"])?.wait_with_output()?;
    ensure!(!gone.status.success(), "waiting for nothing succeeded");
    Ok(())
}

fn a_stopped_container_starts_again_with_its_files() -> Result<()> {
    let id = docker_start(&["busybox", "sh", "-c", "echo run >> /kept; cat /kept; exec sleep 1000"])?;
    eventually("the first run has written", || Ok(docker(&["logs", &id])?.text() == "run"))?;
    docker(&["restart", "-t", "0", &id])?.expect_code(0)?;
    eventually("the second run saw the file", || Ok(docker(&["logs", &id])?.text() == "run\nrun\nrun"))
}

fn files_are_copied_in_and_out() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    docker(&["exec", &id, "sh", "-c", "echo from-inside > /out"])?.expect_code(0)?;
    shell(&format!("docker cp {id}:/out - | tar -xO"))?.expect_text("from-inside")?;
    shell(&format!("cd /etc && tar -c hostname | docker cp - {id}:/root"))?.expect_code(0)?;
    let host = shell("cat /etc/hostname")?.text();
    docker(&["exec", &id, "cat", "/root/hostname"])?.expect_text(&host)?;
    let changes = docker(&["diff", &id])?.expect_code(0)?.text();
    ensure!(changes.contains("A /out") && changes.contains("A /root/hostname"), "the changes: {changes}");
    Ok(())
}

fn top_names_the_container() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let top = docker(&["top", &id])?.expect_code(0)?.text();
    ensure!(top.contains("rvm: "), "docker top shows: {top}");
    Ok(())
}

fn orphans_are_reaped() -> Result<()> {
    // Their parent is gone at once; the init that the engine puts in collects them.
    let script = "for i in 1 2 3 4 5; do (sleep 0 & ) ; done; echo done";
    let id = docker_start(&["--init", "busybox", "sleep", "1000"])?;
    docker(&["exec", &id, "sh", "-c", script])?.expect_text("done")?;
    eventually("no process is left uncollected", || {
        let states = docker(&["exec", &id, "ps", "-o", "stat,args"])?.expect_code(0)?.text();
        Ok(!states.lines().any(|line| line.starts_with('Z') || line.contains("sleep 0")))
    })?;
    docker_run(&["--init", "busybox", "sh", "-c", "exit 9"])?.expect_code(9).map(drop)
}
