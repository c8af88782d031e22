//! `cargo xtask demo`: from a fresh machine to a container in a microVM, and what is special about it; and the tutorial,
//! in the test host.

use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rvm_tests::support::kvm::{self, Accelerator};

use crate::{build, host, minihost, needs, rootfs};

const SCRIPT: &str = include_str!("demo/script");
const WALKTHROUGH: &str = include_str!("../../tests/walkthrough/script");
/// Runs the script in the environment with rvm as Docker's default runtime.
const WITH_DEFAULT: &str = include_str!("demo/with-default");

/// The demo itself takes seconds; this ends one that hangs.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What to show.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Show the tutorial instead: an API and its database, each in a microVM, with Docker in the test host
    #[arg(value_enum)]
    show: Option<Show>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Show {
    Walkthrough,
}

/// Prepares what is missing, and shows a container or the tutorial.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    match args.show {
        None => container(),
        Some(Show::Walkthrough) => walkthrough(),
    }
}

fn walkthrough() -> Result<ExitCode> {
    let host = host::up_to_date(true)?;
    let mut words = vec!["env".to_owned(), format!("SCRIPT={WALKTHROUGH}")];
    words.extend(colours().map(|(name, value)| format!("{name}={value}")));
    words.extend(["sh", "-c", WITH_DEFAULT].map(String::from));
    Ok(host::exit_code(host.command(words).status().context("cannot start ssh")?))
}

fn container() -> Result<ExitCode> {
    needs::demo()?;
    let artefacts = build::artefacts()?;
    let rootfs = rootfs::busybox()?;
    let Some(obstacle) = obstacle(&artefacts, &rootfs)? else {
        return on_this_machine(&artefacts, &rootfs);
    };
    let consequence = match Accelerator::detect() {
        Accelerator::Kvm => "on this machine's KVM",
        Accelerator::Software => "in software; expect times 30 times those of hardware",
    };
    eprintln!("{obstacle}, so rvm runs in a small host, {consequence}.");
    in_small_host(&artefacts, &rootfs)
}

/// Why the demo cannot run on this machine itself, if it cannot.
fn obstacle(artefacts: &Path, rootfs: &Path) -> Result<Option<String>> {
    if !kvm::is_usable() {
        return Ok(Some("This machine has no usable KVM".into()));
    }
    if !nix::unistd::geteuid().is_root() {
        return Ok(Some("rvm needs root".into()));
    }
    // A container with /dev/kvm is no whole host, for one.
    let mut trial = Command::new(artefacts.join("bin/rvm"));
    trial.args(["do", "--rootfs"]).arg(rootfs).args(["--", "true"]).stdin(Stdio::null());
    let output = trial.output().context("cannot start rvm")?;
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok((!output.status.success()).then(|| format!("rvm does not work on this machine ({complaint})")))
}

fn on_this_machine(artefacts: &Path, rootfs: &Path) -> Result<ExitCode> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(artefacts.join("bin")).chain(std::env::split_paths(&path));
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "demo"]).arg(rootfs);
    command.env("PATH", std::env::join_paths(path)?).env_remove("RVM").envs(colours());
    let status = command.status().context("cannot start a shell")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_small_host(artefacts: &Path, rootfs: &Path) -> Result<ExitCode> {
    let mut words = vec!["env".to_owned()];
    words.extend(colours().map(|(name, value)| format!("{name}={value}")));
    words.extend(["sh", "-c", SCRIPT, "demo"].map(String::from));
    words.push(minihost::added(rootfs)?);
    let status = minihost::run(&minihost::Job {
        command: &words,
        add: &[rootfs.to_path_buf()],
        artefacts,
        memory_mib: 2048,
        show_console: false,
        timeout: TIMEOUT,
    })?;
    Ok(ExitCode::from(status))
}

/// Escape sequences, where there is a terminal to understand them.
fn colours() -> [(&'static str, &'static str); 3] {
    let values = if std::io::stdout().is_terminal() { ["\x1b[1m", "\x1b[2m", "\x1b[0m"] } else { [""; 3] };
    [("BOLD", values[0]), ("DIM", values[1]), ("PLAIN", values[2])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Runs the demo's script over a pretended `rvm`, which is a shell script.
    fn demo(rvm: &str) -> (bool, String, String) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("rvm");
        fs::write(&program, rvm).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT, "demo", "/rootfs"]).env("RVM", format!("sh {}", program.display()));
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }

    #[test]
    fn the_demo_shows_output_kernels_and_timeline() {
        let (success, output, errors) = demo(
            r#"case "$*" in *true) exit 0;; esac
            echo hello; echo kernel=9.9; echo memory=123; echo "agent up 12 ms" >&2; exit 42"#,
        );
        assert!(success, "{errors}");
        for part in ["hello\n", "container   9.9 ", "123 MiB", "agent up 12 ms"] {
            assert!(output.contains(part), "no `{part}` in:\n{output}");
        }
        assert!(!output.contains("kernel=9.9"));
    }

    #[test]
    fn a_container_that_fails_fails_the_demo() {
        let (success, _, errors) = demo("echo 'error: no kernel' >&2; exit 1");
        assert!(!success && errors.contains("no kernel"), "{errors}");
        let (success, _, errors) = demo(r#"case "$*" in *true) exit 0;; esac; echo late >&2; exit 3"#);
        assert!(!success && errors.contains("late"), "{errors}");
    }
}
