//! `check`: is this host fit?

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::{Context, pretty, print};
use crate::check::{self, Subject};
use crate::error::{Error, FAILURE};
use crate::install;

#[derive(Debug, Args)]
pub(super) struct CheckArguments {
    /// Print JSON instead of lines for people
    #[arg(long)]
    json: bool,
}

pub(super) fn check(context: &Context, arguments: &CheckArguments) -> Result<ExitCode, Error> {
    let find = |name| install::find(name).map_err(|error| error.to_string());
    let report = check::run(&Subject {
        state_root: &context.root,
        kernel: context.kernel.as_deref().map_or_else(|| find(install::KERNEL), existing),
        agent: find(install::AGENT),
    });
    if arguments.json {
        print(&pretty(&report.to_json())?);
    } else {
        print(&report.to_text(std::io::stdout().is_terminal()));
    }
    Ok(if report.ok() { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

fn existing(path: &Path) -> Result<std::path::PathBuf, String> {
    if path.is_file() { Ok(path.to_owned()) } else { Err(format!("there is no file {}", path.display())) }
}
