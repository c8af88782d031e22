//! `cargo xtask bench`: figures of rvm beside those of runc, taken in the test host.

mod files;

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
    /// How fast files of a volume are
    Files(files::FilesArgs),
}

/// Runs the chore.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    match &args.what {
        What::Files(args) => files::run(args),
    }
}
