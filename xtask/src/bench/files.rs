//! `cargo xtask bench files`: the same work with files of one directory of the host, in a container of runc and in one of
//! rvm, by turns.
//!
//! Both containers stay up all the time, and each kind of work is done once in each before it counts, so the host's page
//! cache is warm. What the guest's own caches hold is told apart: "first" means that the file or tree has changed on
//! the host since the guest saw it, so that everything has to come through the file system device once more.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use rvm_tests::host::{Host, Suite as Turn};
use rvm_tests::support::process;
use rvm_tests::support::progress::Progress;
use serde_json::json;

use crate::build;

/// How often to measure, and where the figures go.
#[derive(Debug, clap::Args)]
pub struct FilesArgs {
    /// Measure each kind of work so many times; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many files there are in a tree
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,
    /// Write the figures to FILE, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Kinds of work; a part of the name is enough
    #[arg(last = true, value_name = "FILTER")]
    filters: Vec<String>,
}

/// The directory of the test host that both containers work in.
const DIRECTORY: &str = "/var/lib/rvm-bench";
const RUNTIMES: [&str; 2] = ["runc", "rvm"];

/// A kind of work.
struct Kind {
    /// Its name for people.
    name: &'static str,
    /// Its name for the program that does it.
    work: &'static str,
    /// What the host does before each run.
    before: &'static str,
    /// How much is done.
    amount: Amount,
}

/// How much a kind of work does.
#[derive(Clone, Copy)]
enum Amount {
    Mebibytes(u32),
    Blocks(u32),
    /// So many times each file of the tree.
    Tree(u32),
}

impl Amount {
    fn unit(self) -> &'static str {
        match self {
            Self::Mebibytes(_) => "MiB/s",
            Self::Blocks(_) => "blocks/s",
            Self::Tree(_) => "files/s",
        }
    }

    fn of_tree(self, files: u32) -> f64 {
        f64::from(match self {
            Self::Mebibytes(count) | Self::Blocks(count) => count,
            Self::Tree(times) => times * files,
        })
    }
}

/// Changes nothing but the time, for which the guest drops what it has of a file.
const TOUCH: &str = "touch large";
/// More than the time that names and attributes are valid for.
const WAIT: &str = "sleep 0.1";

const KINDS: &[Kind] = &[
    Kind { name: "write, 1 MiB blocks", work: "write", before: WAIT, amount: Amount::Mebibytes(128) },
    Kind { name: "write and fsync", work: "write-sync", before: WAIT, amount: Amount::Mebibytes(128) },
    Kind { name: "read, first", work: "read", before: TOUCH, amount: Amount::Mebibytes(128) },
    Kind { name: "read, again", work: "read", before: WAIT, amount: Amount::Mebibytes(128) },
    Kind {
        name: "random 4 KiB read, first",
        work: "random-read",
        before: TOUCH,
        amount: Amount::Blocks(4096),
    },
    Kind {
        name: "random 4 KiB read, again",
        work: "random-read",
        before: WAIT,
        amount: Amount::Blocks(4096),
    },
    Kind { name: "random 4 KiB write", work: "random-write", before: WAIT, amount: Amount::Blocks(4096) },
    Kind { name: "create a tree", work: "create", before: WAIT, amount: Amount::Tree(1) },
    Kind { name: "tar of a tree", work: "tar", before: WAIT, amount: Amount::Tree(1) },
    Kind { name: "status of a tree", work: "status", before: WAIT, amount: Amount::Tree(2) },
    Kind { name: "delete a tree", work: "delete", before: WAIT, amount: Amount::Tree(1) },
];

/// Nanoseconds that a kind of work took, under each of the runtimes.
struct Figures<'k> {
    kind: &'k Kind,
    files: u32,
    times: [Vec<u64>; 2],
}

/// Runs the chore.
pub fn run(args: &FilesArgs) -> Result<ExitCode> {
    rvm_tests::host::may_make_image()?;
    let turn = Turn::begin()?;
    let workload = build::with_workload()?;
    let host = Host::ensure()?;
    let containers = Containers::start(&host, &workload)?;
    let is_wanted =
        |kind: &&Kind| args.filters.is_empty() || args.filters.iter().any(|part| kind.name.contains(part));
    let kinds: Vec<_> = KINDS.iter().filter(is_wanted).collect();
    ensure!(!kinds.is_empty(), "no kind of work has a name with {}", args.filters.join(" or "));
    let mut progress = Progress::bar("Measuring", kinds.len() as u64 * 2 * (u64::from(args.rounds) + 1));
    let mut all = Vec::new();
    for kind in kinds {
        progress.note(kind.name);
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=args.rounds {
            for (runtime, times) in RUNTIMES.into_iter().zip(&mut times) {
                let time = containers.measure(runtime, kind, args.files)?;
                progress.step();
                // The first one warms the caches.
                times.extend(Some(time).filter(|_| round > 0));
            }
        }
        all.push(Figures { kind, files: args.files, times });
    }
    progress.finish();
    drop(containers);
    turn.end()?;
    print!("{}", table(&all));
    if let Some(file) = &args.json {
        fs::write(file, as_json(&all)).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The two containers. They and the directory end with this value.
struct Containers<'h> {
    host: &'h Host,
}

impl<'h> Containers<'h> {
    fn start(host: &'h Host, workload: &str) -> Result<Containers<'h>> {
        let containers = Containers { host };
        containers.remove();
        for runtime in RUNTIMES {
            let place = format!("{DIRECTORY}/{runtime}");
            process::text(&mut host.command(["mkdir", "-p", &place]))?;
            let run =
                ["docker", "run", "-d", "--name", &name(runtime), "--runtime", runtime].map(str::to_owned);
            let volumes = ["-v", &format!("{place}:/work"), "-v", &format!("{workload}:/workload:ro")]
                .map(str::to_owned);
            let rest = ["debian", "sleep", "infinity"].map(str::to_owned);
            process::text(&mut host.command(run.iter().chain(&volumes).chain(&rest)))?;
        }
        Ok(containers)
    }

    fn measure(&self, runtime: &str, kind: &Kind, files: u32) -> Result<u64> {
        let line = format!(
            "cd {DIRECTORY}/{runtime} && {} 2>/dev/null; docker exec {} /workload {} /work {files}",
            kind.before,
            name(runtime),
            kind.work
        );
        let text = process::text(&mut self.host.command(["sh", "-c", &line]))?;
        text.trim().parse().with_context(|| format!("{} took '{text}'", kind.name))
    }

    fn remove(&self) {
        let names = RUNTIMES.map(name).join(" ");
        let line = format!("docker rm -f {names} >/dev/null 2>&1; rm -rf {DIRECTORY}");
        // What is not there need not go.
        let _ = self.host.run(["sh", "-c", &line]);
    }
}

impl Drop for Containers<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

fn name(runtime: &str) -> String {
    format!("bench-{runtime}")
}

impl Figures<'_> {
    /// How much was done in a second under a runtime.
    fn rates(&self) -> [f64; 2] {
        self.times.each_ref().map(|times| self.kind.amount.of_tree(self.files) * 1e9 / median(times) as f64)
    }
}

fn median(times: &[u64]) -> u64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(1).max(1)
}

fn table(figures: &[Figures<'_>]) -> String {
    let mut text = format!("{:<28} {:>10} {:>10} {:>7} {}\n", "", "runc", "rvm", "ratio", "");
    for of_kind in figures {
        let [runc, rvm] = of_kind.rates();
        let (name, unit) = (of_kind.kind.name, of_kind.kind.amount.unit());
        text += &format!("{name:<28} {runc:>10.0} {rvm:>10.0} {:>7.2} {unit}\n", rvm / runc);
    }
    text
}

fn as_json(figures: &[Figures<'_>]) -> String {
    let figures: Vec<_> = figures
        .iter()
        .map(|of_kind| {
            let [runc, rvm] = of_kind.rates();
            let [times_runc, times_rvm] = &of_kind.times;
            json!({
                "work": of_kind.kind.name,
                "unit": of_kind.kind.amount.unit(),
                "runc": runc,
                "rvm": rvm,
                "ratio": rvm / runc,
                "nanoseconds": { "runc": times_runc, "rvm": times_rvm },
            })
        })
        .collect();
    format!("{:#}\n", json!({ "files": figures }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_counts() {
        let figures =
            [Figures { kind: &KINDS[0], files: 1, times: [vec![3, 1, 2_000_000_000], vec![6, 9, 1]] }];
        assert!(table(&figures).contains("  0.50 MiB/s"), "{}", table(&figures));
        let value: serde_json::Value = serde_json::from_str(&as_json(&figures)).unwrap();
        assert_eq!(value["files"][0]["ratio"], 0.5);
        assert_eq!(value["files"][0]["nanoseconds"]["rvm"][1], 9);
    }
}
