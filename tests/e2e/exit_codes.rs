//! The exit code that the workload ends with is the one that the user sees.

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{docker, docker_run, docker_start, ensure_guest_kernel, eventually};

pub const STORIES: &[(&str, Story)] = &[
    ("success_is_0", success_is_0),
    ("a_code_of_its_own_arrives", a_code_of_its_own_arrives),
    ("a_command_that_does_not_exist_is_127", a_command_that_does_not_exist_is_127),
    ("a_file_that_is_not_executable_is_126", a_file_that_is_not_executable_is_126),
    ("kill_9_inside_is_137", kill_9_inside_is_137),
    ("memory_that_runs_out_is_137", memory_that_runs_out_is_137),
    ("any_signal_arrives_as_128_and_its_number", any_signal_arrives_as_128_and_its_number),
    ("docker_kill_is_137", docker_kill_is_137),
    ("the_command_is_process_1_of_the_guest", the_command_is_process_1_of_the_guest),
];

fn success_is_0() -> Result<()> {
    docker_run(&["busybox", "true"])?.expect_text("")
}

fn a_code_of_its_own_arrives() -> Result<()> {
    docker_run(&["busybox", "sh", "-c", "exit 3"])?.expect_code(3).map(drop)
}

fn a_command_that_does_not_exist_is_127() -> Result<()> {
    let outcome = docker_run(&["busybox", "no-such-program"])?.expect_code(127)?;
    let message = outcome.error_text();
    ensure!(message.contains("executable file not found in $PATH"), "the message is: {message}");
    docker_run(&["busybox", "/no/such/program"])?.expect_code(127).map(drop)
}

fn a_file_that_is_not_executable_is_126() -> Result<()> {
    let outcome = docker_run(&["busybox", "/etc/passwd"])?.expect_code(126)?;
    ensure!(outcome.error_text().contains("permission denied"), "the message is: {}", outcome.error_text());
    Ok(())
}

fn kill_9_inside_is_137() -> Result<()> {
    // A pid namespace protects its first process from signals of its own, so the one that dies is a child.
    docker_run(&["busybox", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?.expect_code(137)?;
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    docker(&["exec", &id, "sh", "-c", "kill -9 $$"])?.expect_code(137)?;
    docker(&["rm", "-f", &id])?.expect_code(0).map(drop)
}

fn memory_that_runs_out_is_137() -> Result<()> {
    // The guest's kernel kills process 1 itself. `tail` keeps what it reads until a line ends.
    docker_run(&["--memory", "64m", "busybox", "tail", "-n", "1", "/dev/zero"])?.expect_code(137).map(drop)
}

fn any_signal_arrives_as_128_and_its_number() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    for signal in [6, 11, 15, 34, 40, 64] {
        docker(&["exec", &id, "sh", "-c", &format!("kill -{signal} $$")])?.expect_code(128 + signal)?;
    }
    docker(&["rm", "-f", &id])?.expect_code(0).map(drop)
}

fn docker_kill_is_137() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    docker(&["kill", &id])?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("137")?;
    eventually("the container is listed as ended", || {
        Ok(docker(&["inspect", "-f", "{{.State.Status}}", &id])?.text() == "exited")
    })
}

fn the_command_is_process_1_of_the_guest() -> Result<()> {
    ensure_guest_kernel(&docker_run(&["busybox", "uname", "-r"])?.expect_code(0)?.text())?;

    let command = docker_run(&["busybox", "cat", "/proc/1/cmdline"])?.expect_code(0)?;
    ensure!(command.stdout == b"cat\0/proc/1/cmdline\0", "process 1 is {:?}", command.text());

    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let name = docker(&["exec", &id, "hostname"])?.expect_code(0)?.text();
    ensure!(id.starts_with(&name) && name.len() == 12, "the host name {name:?} is not the id {id}");
    Ok(())
}
