//! `cargo xtask host`: commands in the test host, as if it were this machine.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};

use anyhow::{Context, Result};
use rvm_tests::host::{Host, Suite};

use crate::build;

/// What to do with the test host. With no argument at all it is made and booted, to have it ready.
#[derive(Debug, clap::Args)]
pub struct HostArgs {
    /// Run the command, or a login shell when there is none, on a terminal of its own.
    #[arg(long)]
    shell: bool,
    /// End the test host; what was written in it is lost.
    #[arg(long, conflicts_with_all = ["shell", "command"])]
    stop: bool,
    /// Use rvm as it was built last, without building it
    #[arg(long)]
    no_build: bool,
    /// The command to run as root in the test host, and its arguments.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs the chore; the exit code is the command's.
pub fn run(args: HostArgs) -> Result<ExitCode> {
    if args.stop {
        let message = if Host::stop_all()? == 0 { "no test host runs" } else { "the test host has ended" };
        eprintln!("{message}");
        return Ok(ExitCode::SUCCESS);
    }
    let host = up_to_date(!args.no_build)?;
    let mut command = match (args.shell, args.command.is_empty()) {
        (false, true) => return Ok(ExitCode::SUCCESS),
        (false, false) => host.command(args.command),
        (true, true) => host.terminal(["bash", "-l"]),
        (true, false) => host.terminal(args.command),
    };
    Ok(exit_code(command.status().context("cannot start ssh")?))
}

/// The test host, with the newest rvm unless tests run in it, which must not see it change.
pub fn up_to_date(build: bool) -> Result<Host> {
    rvm_tests::host::may_make_image()?;
    let Some(_idle) = Suite::begin_other()? else {
        eprintln!("Tests run in the test host: it keeps the rvm that they began with.");
        return Host::as_it_runs();
    };
    if build {
        build::artefacts()?;
    }
    Host::ensure()
}

/// The exit code of a command in the test host, as a shell tells it.
pub fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
