//! `cargo xtask test` and `cargo xtask check`: from the formatting of a line to a container under a real engine.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::host::Host;
use rvm_tests::support::packages;

use crate::build::{self, cargo, checked};
use crate::tally::Tally;

/// What compiling the workspace needs from Debian, and the containers of the agent's own tests.
pub const PACKAGES: &[&str] = &["busybox-static", "gcc", "libc6-dev", "libseccomp-dev"];

/// Where the test host keeps the end-to-end suites.
const SUITES: &str = "/usr/local/bin/rvm-e2e";

/// Which parts to run.
#[derive(Debug, clap::Args)]
pub struct TestArgs {
    /// Only formatting, clippy and unit tests
    #[arg(long)]
    unit: bool,
    /// Only the end-to-end suites, in the test host
    #[arg(long, conflicts_with = "unit")]
    e2e: bool,
    /// Names of end-to-end tests (a part is enough), and options of their runner, such as --list or --exact
    #[arg(last = true, value_name = "FILTER")]
    suites: Vec<String>,
}

/// Runs what was asked for, and ends with one line: `N passed, N failed`.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let mut tally = Tally::default();
    if !args.e2e {
        tally += static_checks_and_unit_tests()?;
    }
    if !args.unit {
        tally += end_to_end(&args.suites)?;
    }
    Ok(report(tally))
}

/// Formatting, clippy and unit tests.
pub fn check() -> Result<ExitCode> {
    Ok(report(static_checks_and_unit_tests()?))
}

fn report(tally: Tally) -> ExitCode {
    println!("\n{tally}");
    if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn static_checks_and_unit_tests() -> Result<Tally> {
    packages::ensure(PACKAGES)?;
    component("fmt", "rustfmt")?;
    component("clippy", "clippy")?;
    title("Formatting");
    checked(cargo().args(["fmt", "--all", "--check"]), "the check of formatting (`cargo fmt` repairs it)")?;
    title("Clippy");
    checked(
        cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
        "the check by clippy",
    )?;
    title("Unit tests");
    unit_tests()
}

/// Sees to it that cargo has the subcommand; rustup's minimal installation lacks some.
fn component(subcommand: &str, component: &str) -> Result<()> {
    if has_subcommand(subcommand) {
        return Ok(());
    }
    eprintln!("Installing the Rust component {component}");
    checked(Command::new("rustup").args(["component", "add", component]), "rustup")
}

fn has_subcommand(name: &str) -> bool {
    let mut command = cargo();
    command.args([name, "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn unit_tests() -> Result<Tally> {
    let mut command = cargo();
    if has_subcommand("nextest") {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "fail"]);
    } else {
        command.args(["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast", "--quiet"]);
    }
    if io::stderr().is_terminal() {
        command.args(["--color", "always"]);
    }
    tallied(&mut command, "the unit tests")
}

fn end_to_end(arguments: &[String]) -> Result<Tally> {
    build::with_suites()?;
    let host = Host::ensure()?;
    title("End-to-end tests, in the test host");
    let words = std::iter::once(SUITES).chain(arguments.iter().map(String::as_str));
    tallied(&mut host.command(words), "the end-to-end tests")
}

fn title(text: &str) {
    eprintln!("\n== {text}");
}

/// Runs tests with their output on the terminal, and counts. A run that fails without a failed test (it did not even
/// compile, or died) is an error.
fn tallied(command: &mut Command, what: &str) -> Result<Tally> {
    let (reader, writer) = io::pipe()?;
    // One pipe for both streams keeps their order: nextest reports on stderr, libtest on stdout.
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
    // While the command holds its copies of the writing end, the loop below would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (tally, summaries) = count(BufReader::new(reader), io::stdout())?;
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        bail!("{what} ended with {status}, though no test failed");
    }
    ensure!(summaries > 0 || !status.success(), "{what} printed no summary");
    Ok(tally)
}

/// Copies lines, and sums up the summaries among them; returns how many of those there were, too.
fn count(mut from: impl BufRead, mut to: impl Write) -> Result<(Tally, usize)> {
    let (mut tally, mut summaries) = (Tally::default(), 0);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        if let Some(found) = Tally::of_line(&String::from_utf8_lossy(&line)) {
            tally += found;
            summaries += 1;
        }
        line.clear();
    }
    Ok((tally, summaries))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Result<Tally> {
        tallied(Command::new("sh").args(["-c", text]), "the script")
    }

    #[test]
    fn every_summary_counts() {
        let tally = script(
            "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'
             echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored' >&2; exit 101",
        );
        assert_eq!(tally.unwrap(), Tally { passed: 3, failed: 1 });
    }

    #[test]
    fn a_run_that_breaks_is_never_taken_for_a_success() {
        assert!(script("echo 'error: could not compile'; exit 101").is_err());
        assert!(script("echo 'test result: ok. 2 passed; 0 failed'; exit 1").is_err());
        assert!(script("true").is_err());
    }

    #[test]
    fn output_is_repeated_as_it_is() {
        let mut output = Vec::new();
        count(&b"a\n\xff\nno newline"[..], &mut output).unwrap();
        assert_eq!(output, b"a\n\xff\nno newline");
    }
}
