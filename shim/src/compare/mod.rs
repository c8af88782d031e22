//! The comparison of runtimes on one machine: how long a start and an `exec` take, what a container's memory costs, and
//! whose kernel it has, and how much of the host's it reaches.
//!
//! [`measure`] lets the runtimes take turns; [`statistics`] says what the figures are worth; [`table`] and [`report`]
//! show them.

mod bundle;
mod calls;
mod filter;
mod measure;
mod plot;
mod processes;
mod report;
mod runtime;
mod statistics;
mod table;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::measure::Figures;
pub use self::report::to_html;
use self::runtime::Caller;
pub use self::runtime::Runtime;
pub use self::table::to_text;

/// Why nothing was compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A program that was named is not there.
    #[error("the runtime {0} is not in PATH; name its program with {0}=/path/to/it, or leave it out")]
    NotInstalled(String),
    /// What names a runtime makes no sense.
    #[error("`{0}` names no runtime: give NAME or NAME=COMMAND")]
    NoRuntime(String),
    /// Docker does not tell its runtimes.
    #[error("docker does not answer: {0}")]
    Docker(String),
    /// A bundle's configuration is no JSON.
    #[error("{path}: {1}", path = .0.display())]
    Config(PathBuf, serde_json::Error),
    /// Files could not be copied.
    #[error("cannot copy {path}: {1}", path = .0.display())]
    Copy(PathBuf, String),
    /// A signal came.
    #[error("the comparison was ended by signal {0}")]
    Interrupted(i32),
    /// An operation of the system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the operating system reported.
        source: io::Error,
    },
}

impl CompareError {
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> CompareError {
        let what = what.into();
        move |source| CompareError::System { what, source }
    }
}

/// What containers are started from.
#[derive(Clone, Debug)]
pub enum Subject {
    /// The smallest bundle there can be.
    Least,
    /// A bundle of the user's.
    Bundle(PathBuf),
    /// An image, through Docker.
    Docker(String),
}

/// All that was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// The machine.
    pub host: Host,
    /// What was started.
    pub subject: String,
    /// How often each was started, and entered.
    pub rounds: usize,
    /// What was found about each runtime.
    pub runtimes: Vec<Figures>,
}

/// The machine on which it was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// Release of its kernel.
    pub kernel: String,
    /// Its processor, as it calls itself.
    pub processor: String,
    /// How many of them this program may use.
    pub processors: usize,
}

impl Host {
    fn read() -> Host {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Host {
            kernel: kernel.trim().to_owned(),
            processor: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// How many steps there will be, for a bar of progress.
pub fn steps(runtimes: usize, rounds: usize) -> usize {
    measure::steps(runtimes, rounds)
}

/// Compares the runtimes. `step` is called before each step, and can end it all.
pub fn compare(
    runtimes: &[Runtime],
    subject: &Subject,
    rounds: usize,
    step: &mut dyn FnMut(&str) -> Result<(), CompareError>,
) -> Result<Comparison, CompareError> {
    let work = tempfile::Builder::new()
        .prefix("rvm-compare-")
        .tempdir()
        .map_err(CompareError::system("cannot make a folder for temporary files"))?;
    let bundled = |given: Option<&Path>| -> Result<Caller, CompareError> {
        let (short, long) = bundle::make(work.path(), given)?;
        Ok(Caller::Bundles { short, long, state: work.path().join("state") })
    };
    let (caller, what) = match subject {
        Subject::Least => (bundled(None)?, "the smallest program there can be".to_owned()),
        Subject::Bundle(path) => (bundled(Some(path))?, format!("the bundle {}", path.display())),
        Subject::Docker(image) => (Caller::Docker { image: image.clone() }, format!("{image}, by Docker")),
    };
    let runtimes = measure::measure(&caller, runtimes, rounds, step)?;
    Ok(Comparison { host: Host::read(), subject: what, rounds, runtimes })
}

#[cfg(test)]
mod testing {
    use super::calls::HostCalls;
    use super::measure::{Kernel, KernelOwner, PhaseTime};
    use super::statistics::Sample;
    use super::*;

    /// A comparison of three runtimes, of which one failed.
    pub fn comparison() -> Comparison {
        let figures = |name: &str, base: f64, owner| Figures {
            name: name.into(),
            start: Sample::new((0..20).map(|index| base + f64::from(index))),
            exec: Sample::new((0..20).map(|index| base / 2.0 + f64::from(index))),
            phases: vec![PhaseTime { phase: "agent up".into(), took: base / 2.0 }],
            memory: Some(20 << 20),
            kernel: Some(Kernel { release: "6.12.0".into(), owner }),
            calls: Some(match owner {
                KernelOwner::Host => HostCalls { workload: 310, most: 310, least: 310, known: 370 },
                _ => HostCalls { workload: 0, most: 305, least: 35, known: 370 },
            }),
            failure: None,
        };
        let failed = Figures {
            name: "gone".into(),
            failure: Some("exit status: 1: <no>".into()),
            ..Figures::default()
        };
        Comparison {
            host: Host { kernel: "6.12.1".into(), processor: "A & B".into(), processors: 2 },
            subject: "the smallest program there can be".into(),
            rounds: 20,
            runtimes: vec![
                figures("rvm", 100.0, KernelOwner::Machine),
                figures("runc", 300.0, KernelOwner::Host),
                failed,
            ],
        }
    }
}
