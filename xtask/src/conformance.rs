//! `cargo xtask conformance`: two suites of the OCI runtime field, run in the test host against runc and rvm alike.
//!
//! `validation` of opencontainers/runtime-tools and `contest` of youki are fetched and built below the cache, never kept here.
//! runc is the measure: what passes with runc must pass with rvm, or stand in [`impossible`] with a reason.

mod impossible;
mod results;
mod sources;
mod suites;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use rvm_tests::host::{Host, Suite as Turn};
use rvm_tests::support::packages;
use rvm_tests::support::progress::Progress;

use crate::{build, kernel};
use results::{Case, Comparison};
use suites::{Bench, Part, SUITES};

/// The runtime that is the measure.
const RUNC: &str = "runc";
/// Ours.
const RVM: &str = "rvm";

/// What to run, and where the results go.
#[derive(Debug, clap::Args)]
pub struct ConformanceArgs {
    /// Write every case and its outcome to FILE, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Names of programs of `validation` and groups of `contest`; a part of the name is enough
    #[arg(last = true, value_name = "FILTER")]
    filters: Vec<String>,
}

/// Runs the suites; a success when rvm passes all that runc passes and that is possible.
pub fn run(args: &ConformanceArgs) -> Result<ExitCode> {
    rvm_tests::host::may_make_image()?;
    packages::ensure(
        &[sources::PACKAGES, build::PACKAGES, kernel::packages(), rvm_tests::host::PACKAGES].concat(),
    )?;
    let built = suites::built()?;
    let turn = Turn::begin()?;
    build::artefacts()?;
    let bench = Bench::set_up(Host::ensure()?, &built)?;
    let cases = compared(&bench, &args.filters)?;
    turn.end()?;
    ensure!(!cases.is_empty(), "no program and no group has a name with {}", args.filters.join(" or "));
    print!("{}", table::of(&cases));
    if let Some(file) = &args.json {
        fs::write(file, table::json(&cases)).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(verdict(&Comparison::of(&cases, args.filters.is_empty())))
}

/// Every case that `filters` select, with its outcome under both runtimes.
fn compared(bench: &Bench, filters: &[String]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for suite in SUITES {
        let parts: Vec<_> =
            suite.parts(bench)?.into_iter().filter(|part| is_selected(part, filters)).collect();
        let mut progress = Progress::bar(suite.name, (parts.len() * 2) as u64);
        for part in &parts {
            let mut run = |runtime| {
                progress.note(&format!("{} with {runtime}", part.name));
                let outcomes = bench.run(suite, part, runtime);
                progress.step();
                outcomes
            };
            let (mut runc, mut rvm) = (run(RUNC)?, run(RVM)?);
            bench.complete(suite, part, RUNC, &rvm, &mut runc)?;
            bench.complete(suite, part, RVM, &runc, &mut rvm)?;
            cases.extend(results::paired(suite.name, &part.name, runc, rvm));
        }
        progress.finish();
    }
    Ok(cases)
}

fn is_selected(part: &Part, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| part.name.contains(filter.as_str()))
}

fn verdict(comparison: &Comparison) -> ExitCode {
    for problem in &comparison.problems {
        eprintln!("{problem}");
    }
    println!("{}", comparison.summary);
    if comparison.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
