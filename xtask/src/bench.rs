//! `cargo xtask bench`: figures of rvm beside those of runc, taken in the test host.

mod files;
mod start;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// How long starts take beside other runtimes, and what they take, as JSON
    Start(start::StartArgs),
    /// How fast files of a volume are
    Files(files::FilesArgs),
}

/// Runs the chore.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    match &args.what {
        What::Start(args) => start::run(args),
        What::Files(args) => files::run(args),
    }
}
