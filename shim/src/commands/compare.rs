//! `compare`: runtimes beside one another, on this machine.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use super::inspect::Format;
use crate::compare::{self, CompareError, Comparison, Runtime, Subject};
use crate::error::Error;
use crate::signals::{Signals, is_fatal};

#[derive(Debug, Args)]
pub(super) struct CompareArguments {
    /// The runtimes, separated by commas: names in PATH (of Docker's with --docker), NAME=COMMAND, rvm, or rvm:cold for rvm
    /// without templates. Without this option: all that are installed
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    runtime: Vec<String>,
    /// How often each starts a container, and runs a program in one
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Start this bundle instead of the smallest program there can be; its files are copied
    #[arg(long, value_name = "DIR", conflicts_with = "docker")]
    bundle: Option<PathBuf>,
    /// Go through Docker, and start `true` in this image
    #[arg(long, value_name = "IMAGE")]
    docker: Option<String>,
    /// Write a page with plots as well
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// How to show the figures
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
}

pub(super) fn compare(_context: &Context, arguments: CompareArguments) -> Result<(), Error> {
    // Before there is anything that would have to be taken away again.
    let mut signals = Signals::block().map_err(Error::system("cannot wait for signals"))?;
    let runtimes = runtimes(&arguments)?;
    let subject = match (&arguments.bundle, &arguments.docker) {
        (_, Some(image)) => Subject::Docker(image.clone()),
        (Some(bundle), None) => Subject::Bundle(bundle.clone()),
        (None, None) => Subject::Least,
    };
    let rounds = usize::from(arguments.rounds);
    let progress = progress(compare::steps(runtimes.len(), rounds));
    let mut step = |what: &str| {
        progress.inc(1);
        progress.set_message(what.to_owned());
        match signals.take().filter(|signal| is_fatal(*signal)) {
            Some(signal) => Err(CompareError::Interrupted(signal)),
            None => Ok(()),
        }
    };
    let comparison = compare::compare(&runtimes, &subject, rounds, &mut step);
    progress.finish_and_clear();
    show(&comparison?, &arguments)
}

fn runtimes(arguments: &CompareArguments) -> Result<Vec<Runtime>, CompareError> {
    match (&arguments.docker, arguments.runtime.is_empty()) {
        (Some(_), true) => Runtime::all_of_docker(),
        (Some(_), false) => Ok(arguments.runtime.iter().map(|name| Runtime::of_docker(name)).collect()),
        (None, true) => Runtime::all(),
        (None, false) => arguments.runtime.iter().map(|text| Runtime::parse(text)).collect(),
    }
}

/// A bar on a terminal, and nothing where nobody looks.
fn progress(steps: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} [{elapsed}] {wide_msg}");
    ProgressBar::new(steps as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(comparison: &Comparison, arguments: &CompareArguments) -> Result<(), Error> {
    arguments.format.print(comparison, compare::to_text)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, compare::to_html(comparison))
            .map_err(Error::system(format!("cannot write the report {}", path.display())))?;
    }
    Ok(())
}
