//! `cargo xtask test` and `cargo xtask check`: from the formatting of a line to a container under a real engine.
//!
//! Every part is run, whatever became of those before it, and the last line always says how many tests passed and failed.
//! A check without tests of its own, such as formatting, counts as one.

mod hosted;
#[cfg(test)]
mod promises;
mod run;
mod skips;

use std::io::{self, IsTerminal};
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use rvm_tests::support::process;

use crate::build::{cargo, checked};
use crate::needs;
use crate::tally::Tally;
use run::{Report, tallied};

/// What the workspace needs from Debian: to be compiled, and for tests with containers and kernel modules.
pub const PACKAGES: &[&str] = &["busybox-static", "gcc", "kmod", "libc6-dev", "libseccomp-dev"];

/// The arguments of `cargo test` that select all tests of the workspace. `--bins` is none of them: it would select programs
/// that are declared to have no tests, too, and so start the agent itself.
const ALL_TESTS: &[&str] = &["test", "--workspace", "--tests", "--no-fail-fast", "--quiet"];

/// Which parts to run.
#[derive(Debug, clap::Args)]
pub struct TestArgs {
    /// Only formatting, clippy and unit tests
    #[arg(long)]
    unit: bool,
    /// Only the tests in the test host: unit tests that need a genuine host, and the end-to-end suites
    #[arg(long, conflicts_with = "unit")]
    e2e: bool,
    /// Names of end-to-end tests (a part is enough), and options of their runner, such as --list or --exact
    #[arg(last = true, value_name = "FILTER")]
    suites: Vec<String>,
}

/// Runs what was asked for, and ends with one line: `N passed, N failed`.
pub fn run(args: &TestArgs) -> ExitCode {
    let (checks, suites) = (!args.e2e, !args.unit);
    let mut report = Report::default();
    // What cannot come to its end should not first take half an hour.
    if report.run("what the tests need", |_| needs::tests(checks, suites)) {
        if checks {
            checks_and_unit_tests(&mut report);
        }
        if suites {
            report.run("the tests in the test host", |tally| hosted::run(&args.suites, tally));
        }
    }
    report.close()
}

/// Formatting, clippy and unit tests.
pub fn check() -> ExitCode {
    let mut report = Report::default();
    if report.run("what the checks need", |_| needs::tests(true, false)) {
        checks_and_unit_tests(&mut report);
    }
    report.close()
}

fn checks_and_unit_tests(report: &mut Report) {
    report.run("formatting (`cargo fmt` repairs it)", |tally| {
        title("Formatting");
        component("fmt", "rustfmt")?;
        checked(cargo().args(["fmt", "--all", "--check"]), "the check of formatting")?;
        tally.passed += 1;
        Ok(())
    });
    report.run("clippy", |tally| {
        title("Clippy");
        component("clippy", "clippy")?;
        let arguments = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        checked(cargo().args(arguments), "the check by clippy")?;
        tally.passed += 1;
        Ok(())
    });
    report.run("the unit tests", |tally| {
        title("Unit tests");
        unit_tests(tally)
    });
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

fn unit_tests(tally: &mut Tally) -> Result<()> {
    let mut command = cargo();
    if has_subcommand("nextest") {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "fail"]);
    } else {
        command.args(ALL_TESTS);
    }
    if io::stderr().is_terminal() {
        command.args(["--color", "always"]);
    }
    tallied(&mut command, "the unit tests", tally)?;
    // Neither runner's short form names what it leaves out.
    let list = process::text(cargo().args(ALL_TESTS).args(["--", "--list", "--ignored"]))?;
    tally.skipped.extend(skips::listed(&list));
    Ok(())
}

fn title(text: &str) {
    eprintln!("\n== {text}");
}
