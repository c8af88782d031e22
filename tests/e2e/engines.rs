//! The same workload under every engine: rvm alone, podman, and containerd.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, ensure_guest_kernel, eventually, run, run_with_input, rvm, shell};
use crate::terminal::Terminal;

pub const STORIES: &[(&str, Story)] = &[
    ("rvm_run_runs_a_bundle", rvm_run_runs_a_bundle),
    ("rvm_leads_a_container_through_its_life", rvm_leads_a_container_through_its_life),
    ("two_hundred_execs_leave_nothing", two_hundred_execs_leave_nothing),
    ("pidfds_go_to_whoever_asks", pidfds_go_to_whoever_asks),
    ("rvm_run_uses_the_terminal_it_has", rvm_run_uses_the_terminal_it_has),
    ("rvm_do_needs_no_bundle", rvm_do_needs_no_bundle),
    ("a_compressed_kernel_of_ones_own_boots", a_compressed_kernel_of_ones_own_boots),
    ("several_vcpus_work", several_vcpus_work),
    ("podman_runs_it", podman_runs_it),
    ("containerd_runs_it", containerd_runs_it),
    ("the_same_root_runs_under_all_three", the_same_root_runs_under_all_three),
    ("rvm_check_finds_the_host_fit", rvm_check_finds_the_host_fit),
    ("rvm_says_what_it_is", rvm_says_what_it_is),
];

fn rvm_run_runs_a_bundle() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "uname -r; cat; exit 3"])?;
    let outcome =
        run_with_input("rvm", &["run", "--bundle", bundle.path(), "story"], b"given")?.expect_code(3)?;
    let text = outcome.text();
    let (release, given) = text.split_once('\n').unwrap_or_default();
    ensure_guest_kernel(release)?;
    ensure!(given == "given", "{outcome:?}");
    Ok(())
}

fn rvm_leads_a_container_through_its_life() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "echo hello; exec sleep 1000"])?;
    let pid_file = format!("{}/pid", bundle.path());
    let create =
        format!("rvm create --bundle {} --pid-file {pid_file} story </dev/null >{0}/out 2>&1", bundle.path());
    shell(&create)?.expect_code(0)?;
    ensure!(status()? == "created", "it is {} after create", status()?);
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.text())?;
    let written: u32 = std::fs::read_to_string(&pid_file)?.parse()?;
    ensure!(state["pid"] == json!(written), "the pid file says {written}, the state {state}");
    ensure!(state["bundle"] == json!(bundle.path()), "the bundle is {}", state["bundle"]);

    rvm(&["start", "story"])?.expect_code(0)?;
    ensure!(status()? == "running", "it is {} after start", status()?);
    rvm(&["start", "story"])?.expect_failure(&["already running"])?;
    let listed = rvm(&["list"])?.expect_code(0)?.text();
    ensure!(listed.contains("story") && listed.contains("running"), "{listed}");
    rvm(&["exec", "story", "echo", "from exec"])?.expect_text("from exec")?;
    rvm(&["delete", "story"])?.expect_failure(&["story", "running"])?;

    rvm(&["pause", "story"])?.expect_code(0)?;
    ensure!(status()? == "paused", "it is {} after pause", status()?);
    rvm(&["resume", "story"])?.expect_code(0)?;
    rvm(&["ps", "story"])?.expect_code(0)?;

    rvm(&["kill", "story", "KILL"])?.expect_code(0)?;
    eventually("the container has stopped", || Ok(status()? == "stopped"))?;
    rvm(&["kill", "story", "TERM"])?.expect_failure(&["container not running"])?;
    rvm(&["delete", "story"])?.expect_code(0)?;
    rvm(&["state", "story"])?.expect_failure(&["does not exist"])?;
    let output = std::fs::read_to_string(format!("{}/out", bundle.path()))?;
    ensure!(output == "hello\n", "the output was {output:?}");
    Ok(())
}

fn status() -> Result<String> {
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.expect_code(0)?.text())?;
    Ok(state["status"].as_str().unwrap_or_default().to_owned())
}

fn two_hundred_execs_leave_nothing() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    shell(&format!("rvm run -d --bundle {} story </dev/null >/dev/null 2>&1", bundle.path()))?
        .expect_code(0)?;
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.expect_code(0)?.text())?;
    let execs = |count: u32| {
        shell(&format!("for i in $(seq {count}); do rvm exec story true || exit; done"))?.expect_code(0)
    };
    let line = format!("pid={}; ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l", state["pid"]);
    let look = || -> Result<(String, u64, u64)> {
        let counts = shell(&line)?.expect_code(0)?.text();
        // All its memory but the guest's.
        let costs: Value = serde_json::from_str(&rvm(&["stats", "--format", "json", "story"])?.text())?;
        let own = costs[0]["monitor"].as_u64().with_context(|| costs.to_string())? >> 10;
        let free = rvm(&["exec", "story", "awk", "/^MemAvailable:/ {print $2}", "/proc/meminfo"])?.text();
        Ok((counts, own, free.parse()?))
    };
    execs(20)?;
    let (counts, own, free) = look()?;
    execs(200)?;
    let (counts_after, own_after, free_after) = look()?;
    ensure!(counts_after == counts, "descriptors and threads of the monitor: {counts} became {counts_after}");
    ensure!(own_after < own + 1024, "the monitor's memory: {own} KiB became {own_after} KiB");
    ensure!(free_after + 4096 > free, "free memory of the guest: {free} KiB became {free_after} KiB");
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

fn pidfds_go_to_whoever_asks() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    let folder = bundle.path();
    let sockets = UnixListener::bind(format!("{folder}/sock"))?;
    let asked = format!("--pidfd-socket {folder}/sock --pid-file {folder}/pid");
    let quiet = "</dev/null >/dev/null 2>&1";
    for command in [
        format!("rvm create --bundle {folder} {asked} story {quiet} && rvm start story"),
        format!("rvm exec --detach {asked} story sleep 1000 {quiet}"),
    ] {
        shell(&command)?.expect_code(0)?;
        let sent = process_of(&received_descriptor(&sockets.accept()?.0)?)?;
        let written = std::fs::read_to_string(format!("{folder}/pid"))?;
        ensure!(sent == written, "the descriptor is of process {sent}, the pid file says {written}");
    }
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

/// The descriptor that arrives on a socket.
fn received_descriptor(socket: &UnixStream) -> Result<OwnedFd> {
    let (mut text, mut room) = ([0; 64], nix::cmsg_space!([RawFd; 1]));
    let mut buffers = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut room), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            let descriptor = *descriptors.first().context("no descriptor was sent")?;
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    bail!("no descriptor was sent")
}

/// The id of the process that a pidfd refers to (pidfd_open(2), proc_pid_fdinfo(5)).
fn process_of(pidfd: &OwnedFd) -> Result<String> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(line.context("it is no pidfd")?.trim().to_owned())
}

fn rvm_run_uses_the_terminal_it_has() -> Result<()> {
    let bundle = Bundle::new(&["sh"])?.edit(|config| config["process"]["terminal"] = json!(true))?;
    let mut run = Command::new("rvm");
    run.args(["run", "--bundle", bundle.path(), "story"]);
    let mut terminal = Terminal::start(&mut run, 33, 101)?;
    terminal.wait_for("#")?;
    terminal.type_text("stty size\n")?;
    terminal.wait_for("33 101")?;
    terminal.type_text("exit 5\n")?;
    let code = terminal.finish()?;
    ensure!(code == 5, "the shell ended with {code}");
    Ok(())
}

fn rvm_do_needs_no_bundle() -> Result<()> {
    let kept = tempfile::Builder::new().prefix("e2e-do").tempdir_in("/root")?;
    let line = format!(
        "uname -r; touch {0}/made && test -e {0}/made && echo written; exit 8",
        kept.path().display()
    );
    let outcome = rvm(&["do", "--", "sh", "-c", &line])?.expect_code(8)?;
    let text = outcome.text();
    let (release, written) = text.split_once('\n').unwrap_or_default();
    ensure_guest_kernel(release)?;
    ensure!(written == "written", "{outcome:?}");
    ensure!(!kept.path().join("made").exists(), "what was written in the microVM is on the host");
    rvm(&["do", "--", "no-such-program"])?.expect_code(127).map(drop)
}

fn a_compressed_kernel_of_ones_own_boots() -> Result<()> {
    let outcome = rvm(&["--kernel", "/usr/local/lib/rvm-tests/bzImage", "do", "--", "uname", "-r"])?;
    ensure_guest_kernel(&outcome.expect_code(0)?.text())
}

fn several_vcpus_work() -> Result<()> {
    let bundle = Bundle::new(&[
        "sh",
        "-c",
        "nproc; for i in 1 2 3; do (while :; do :; done) & done; sleep 1; echo alive",
    ])?
    .edit(|config| config["linux"]["resources"]["cpu"] = json!({"quota": 300_000, "period": 100_000}))?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_text("3\nalive")
}

fn podman_runs_it() -> Result<()> {
    let outcome = podman(&["run", "--rm", "--network", "none", "busybox", "sh", "-c", "uname -r; exit 3"])?;
    ensure_guest_kernel(&outcome.expect_code(3)?.text())?;
    for (program, code, words) in [
        ("no-such-program", 127, "executable file not found in $PATH"),
        ("/no/such/program", 127, "no such file or directory"),
        ("/etc/passwd", 126, "permission denied"),
    ] {
        podman(&["run", "--rm", "--network", "none", "busybox", program])?
            .expect_code(code)?
            .expect_failure(&[words])?;
    }
    let id = podman(&["run", "-d", "--network", "none", "busybox", "sleep", "1000"])?.expect_code(0)?.text();
    podman(&["exec", &id, "echo", "in podman"])?.expect_text("in podman")?;
    podman(&["cp", "/etc/hostname", &format!("{id}:/copied")])?.expect_code(0)?;
    podman(&["exec", &id, "cat", "/copied"])?.expect_text(&shell("cat /etc/hostname")?.text())?;
    podman(&["pause", &id])?.expect_code(0)?;
    podman(&["unpause", &id])?.expect_code(0)?;
    podman(&["rm", "-f", "-t", "0", &id])?.expect_code(0).map(drop)
}

fn podman(arguments: &[&str]) -> Result<Outcome> {
    run("podman", &[&["--runtime", "rvm"], arguments].concat())
}

fn containerd_runs_it() -> Result<()> {
    let image = shell("ctr images ls -q | grep busybox | head -n 1")?.expect_code(0)?.text();
    ensure!(!image.is_empty(), "containerd has no busybox image");
    let outcome = shell(&format!("{CTR_RUN} {image} story sh -c 'uname -r; exit 3'"))?.expect_code(3)?;
    ensure_guest_kernel(&outcome.text())
}

/// containerd's client, with rvm as the program of its shim for runc.
const CTR_RUN: &str = "ctr run --rm --runtime io.containerd.runc.v2 --runc-binary $(command -v rvm)";

fn the_same_root_runs_under_all_three() -> Result<()> {
    let line = "uname -r; cat /mark; exit 6";
    let bundle = Bundle::new(&["sh", "-c", line])?;
    let root = format!("{}/rootfs", bundle.path());
    std::fs::write(format!("{root}/mark"), "the very same files")?;
    let outcomes = [
        rvm(&["run", "--bundle", bundle.path(), "story"])?,
        podman(&["run", "--rm", "--network", "none", "--rootfs", &root, "sh", "-c", line])?,
        // Without an image containerd's client sets no PATH.
        shell(&format!("{CTR_RUN} --rootfs {root} story /bin/sh -c '{line}'"))?,
    ];
    for outcome in outcomes {
        let outcome = outcome.expect_code(6)?;
        let text = outcome.text();
        let (release, mark) = text.split_once('\n').unwrap_or_default();
        ensure_guest_kernel(release)?;
        ensure!(mark == "the very same files", "{outcome:?}");
    }
    Ok(())
}

fn rvm_check_finds_the_host_fit() -> Result<()> {
    let report = rvm(&["check"])?.expect_code(0)?.text();
    for part in ["KVM", "kernel", "cgroup", "network", "space"] {
        ensure!(report.contains(part), "the report says nothing of {part}: {report}");
    }
    Ok(())
}

fn rvm_says_what_it_is() -> Result<()> {
    let version = rvm(&["--version"])?.expect_code(0)?.text();
    ensure!(version.starts_with("rvm version ") && version.contains("spec: 1."), "{version}");
    let features: Value = serde_json::from_str(&rvm(&["features"])?.expect_code(0)?.text())?;
    ensure!(features["linux"]["namespaces"].is_array(), "{features}");
    let help = rvm(&["--help"])?.expect_code(0)?.text();
    ensure!(help.contains("create") && help.contains("docker"), "{help}");
    Ok(())
}
