//! The two suites: how each is built, what parts it has, and how one part is run in the test host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use rvm_tests::host::Host;
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::process;
use rvm_tests::support::progress::Progress;

use super::results::{self, Outcome, Outcomes};
use super::sources::Source;
use crate::build;

/// What copies the suites into the test host.
const SET_UP: &str = include_str!("set-up");

/// What runs one part there.
const RUN: &str = include_str!("run");

/// Where the suites lie in the test host.
const THERE: &str = "/root/conformance";

/// A part that takes longer hangs. Some start twenty containers one after the other, on a software processor.
const SECONDS: &str = "240";

/// What timeout(1) exits with when the time is up, and when it had to kill.
const TIMED_OUT: i32 = 124;
const KILLED: i32 = 137;

/// Changes here when the steps below change in a way that the sources' commits do not show.
const RECIPE: &str = "1";

/// A suite.
pub struct Suite {
    /// Its name.
    pub name: &'static str,
    source: Source,
    /// Builds the sources in the first directory, and puts what is needed to run into the second.
    build: fn(&Path, &Path) -> Result<()>,
    /// The command that prints the names of the parts, a line each, among others without letters.
    list: &'static [&'static str],
    /// The command that runs the part PART with the runtime that the environment names.
    run: &'static [&'static str],
    understand: fn(&str) -> Outcomes,
    /// Whether a part's cases can be run by themselves, as PART::CASE.
    single_cases: bool,
}

/// A program or group of a suite, which is run at once.
pub struct Part {
    /// Its name.
    pub name: String,
}

/// The suites.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "validation",
        source: Source {
            name: "runtime-tools",
            address: "https://github.com/opencontainers/runtime-tools",
            commit: "260e151b8552afa2678ef6d41820ea0f31cd8be1",
            paths: &["."],
        },
        build: build_validation,
        list: &["ls", "programs"],
        run: &["programs/PART"],
        understand: results::of_tap,
        single_cases: false,
    },
    Suite {
        name: "contest",
        source: Source {
            name: "youki",
            address: "https://github.com/youki-dev/youki",
            commit: "bc78720681ad34be682fe1a6daa61cb3bf47762d",
            paths: &["Cargo.toml", "Cargo.lock", "crates", "experiment", "tests", "tools"],
        },
        build: build_contest,
        list: &["./contest", "list"],
        run: &["./contest", "run", "--runtime", "../patient", "--runtimetest", "./runtimetest", "-t", "PART"],
        understand: results::of_contest,
        single_cases: true,
    },
];

/// Builds the suites as far as they are not in the cache; returns the cache entry.
pub fn built() -> Result<PathBuf> {
    let directory = cache::cache_dir().join("conformance");
    let key = SUITES.iter().fold(Key::new().with("recipe", RECIPE), |key, suite| suite.source.add_to(key));
    let entry = cache::build_once(&directory.join(format!("suites-{}", key.hex())), |entry| {
        for suite in SUITES {
            let work = entry.join("work");
            let made = entry.join(suite.name);
            fs::create_dir(&work)?;
            fs::create_dir(&made)?;
            suite.source.unpack(&work)?;
            let progress = Progress::spinner(&format!("Building the suite {}", suite.name));
            (suite.build)(&work, &made)?;
            progress.finish();
            cache::remove(&work)?;
        }
        Ok(())
    })?;
    cache::remove_unused(&directory)?;
    Ok(entry)
}

/// A program for each test, one that runs inside containers, and the containers' root.
fn build_validation(work: &Path, made: &Path) -> Result<()> {
    let programs = made.join("programs/");
    let inner = made.join("runtimetest");
    for (output, package) in [(&programs, "./validation/..."), (&inner, "./cmd/runtimetest")] {
        let mut go = Command::new("go");
        go.args(["build", "-mod=vendor", "-buildvcs=false", "-trimpath", "-ldflags=-s -w"]);
        go.args(["-tags", "netgo osusergo", "-o"]).arg(output).arg(package).current_dir(work);
        go.env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env("GOFLAGS", "");
        // What it keeps between builds serves nobody after this one.
        process::run(go.env("GOCACHE", work.join("go-cache")))?;
    }
    let root = "rootfs-amd64.tar.gz";
    fs::copy(work.join(root), made.join(root))?;
    Ok(())
}

/// One program for all tests, one that runs inside containers, and the containers' root.
fn build_contest(work: &Path, made: &Path) -> Result<()> {
    let target = work.join("target");
    let mut cargo = build::static_cargo("build", build::RELEASE);
    cargo.args(["--locked", "--package", "contest", "--package", "runtimetest", "--target-dir"]).arg(&target);
    process::run(cargo.current_dir(work).env_remove("CARGO_TARGET_DIR").stdin(Stdio::null()))?;
    for program in ["contest", "runtimetest"] {
        fs::copy(target.join(build::TARGET).join("release").join(program), made.join(program))?;
    }
    fs::copy(work.join("tests/contest/contest/bundle.tar.gz"), made.join("bundle.tar.gz"))?;
    Ok(())
}

impl Suite {
    /// What can be run by itself, in order.
    pub fn parts(&self, bench: &Bench) -> Result<Vec<Part>> {
        let output = bench.script(RUN, &[self.name, "none", SECONDS], self.list)?;
        ensure!(output.status.success(), "{} does not list its tests", self.name);
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(listing.lines().map(str::trim).filter(|name| !name.is_empty()).map(Part::named).collect())
    }
}

impl Part {
    fn named(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    fn single(&self, case: &str) -> Self {
        Self { name: format!("{}::{case}", self.name) }
    }
}

/// The test host with the suites in it.
pub struct Bench {
    host: Host,
    /// Where the whole output of each run goes.
    outputs: PathBuf,
}

impl Bench {
    /// Copies the suites in the cache entry `built` to the test host.
    pub fn set_up(host: Host, built: &Path) -> Result<Self> {
        let outputs = cache::cache_dir().join("conformance-outputs");
        cache::remove(&outputs)?;
        fs::create_dir_all(&outputs)?;
        let bench = Self { host, outputs };
        let below = built.strip_prefix(cache::cache_dir()).context("the suites lie outside of the cache")?;
        let output = bench.script(SET_UP, &[&below.display().to_string(), THERE], &[])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "the suites do not get into the test host: {}", said.trim());
        Ok(bench)
    }

    /// Runs those of the cases `known` by themselves that are not among `outcomes`, because the program broke before it
    /// came to them or before it told of them.
    pub fn complete(
        &self,
        suite: &Suite,
        part: &Part,
        runtime: &str,
        known: &Outcomes,
        outcomes: &mut Outcomes,
    ) -> Result<()> {
        // What hung once hangs again.
        if results::has_timed_out(outcomes) {
            return Ok(());
        }
        let missing = results::missing(known, outcomes);
        for name in missing.iter().filter(|_| suite.single_cases) {
            let single = self.run(suite, &part.single(name), runtime)?;
            let outcome = single.iter().find(|(found, _)| found == name).map(|(_, outcome)| *outcome);
            results::add(outcomes, name, outcome.unwrap_or(Outcome::Failed));
        }
        Ok(())
    }

    /// Runs a part with a runtime.
    pub fn run(&self, suite: &Suite, part: &Part, runtime: &str) -> Result<Outcomes> {
        let path = self.host.run(["which", runtime])?;
        let path = String::from_utf8_lossy(&path.stdout).trim().to_owned();
        ensure!(!path.is_empty(), "the test host has no {runtime}");
        let words: Vec<_> = suite.run.iter().map(|word| word.replace("PART", &part.name)).collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let output = self.script(RUN, &[suite.name, &path, SECONDS], &words)?;
        let file = format!("{}-{}-{runtime}", suite.name, part.name.replace("::", "-"));
        let whole = [output.stdout.as_slice(), b"\n-- stderr\n", output.stderr.as_slice()].concat();
        fs::write(self.outputs.join(&file), whole).with_context(|| format!("cannot write {file}"))?;
        let mut outcomes = (suite.understand)(&String::from_utf8_lossy(&output.stdout));
        match output.status.code() {
            Some(TIMED_OUT | KILLED) => results::add(&mut outcomes, results::END, Outcome::Missing),
            // What the end of one case takes from the others, each gets by itself.
            _ if suite.single_cases => {}
            Some(0) => results::add(&mut outcomes, results::END, Outcome::Passed),
            _ => results::add(&mut outcomes, results::END, Outcome::Failed),
        }
        Ok(outcomes)
    }

    /// Runs a script in the test host.
    fn script(&self, script: &str, arguments: &[&str], words: &[&str]) -> Result<Output> {
        let mut command = self.host.command(["sh", "-c", script, "sh"].iter().chain(arguments).chain(words));
        command.stdin(Stdio::null()).output().context("cannot start ssh")
    }
}
