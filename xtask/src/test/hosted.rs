//! The tests that run in test hosts: unit tests that need a genuine host, and the end-to-end suites.
//!
//! A test host has one processor, so several of them run side by side where the machine carries them, and each takes the
//! next part of the work when it is done with one.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Result, ensure};
use rvm_tests::host::{Host, HostConfig, Suite};
use rvm_tests::support::process;

use super::run::{tallied, tallied_to};
use super::{skips, title};
use crate::build::{self, TestProgram, checked};
use crate::tally::Tally;

/// Where a test host keeps the end-to-end suites.
const SUITES: &str = "/usr/local/bin/rvm-e2e";

/// Tells unit tests that this is a host where nothing they need is missing: they fail instead of leaving themselves out.
const IN_TEST_HOST: &str = "RVM_TEST_HOST=1";

/// Runs the end-to-end tests that `arguments` name, or all that test hosts are for when there are none.
pub fn run(arguments: &[String], tally: &mut Tally) -> Result<()> {
    let suite = Suite::begin()?;
    build::with_suites()?;
    if arguments.is_empty() {
        all(tally)?
    } else {
        chosen(arguments, tally)?
    }
    suite.end()
}

/// Whoever asks for stories by name watches them, on one host.
fn chosen(arguments: &[String], tally: &mut Tally) -> Result<()> {
    title("End-to-end tests, in the test host");
    let host = Host::ensure()?;
    let mut command = host.command(std::iter::once(SUITES).chain(arguments.iter().map(String::as_str)));
    if arguments.iter().any(|argument| argument == "--list") {
        return checked(&mut command, "the list of end-to-end tests");
    }
    tallied(&mut command, "the end-to-end tests", tally)
}

fn all(tally: &mut Tally) -> Result<()> {
    let programs = build::unit_tests()?;
    let first = Host::ensure()?;
    let stories = process::text(first.command([SUITES, "--list"]).stdin(Stdio::null()))?;
    let suites = suites(&stories).into_iter().map(Part::Stories);
    // The suites are longer, and the longest of them come first: no host is left with one of those at the end.
    let parts: VecDeque<_> = suites.chain(programs.into_iter().map(Part::UnitTests)).collect();
    share_out(parts, HostConfig::default().side_by_side(), tally)?;
    // What this machine could not run has now been run.
    tally.skipped.retain(|name| !skips::is_for_test_host(name));
    Ok(())
}

/// The names of the suites, in the order of the list of their stories.
fn suites(list: &str) -> Vec<String> {
    let mut suites = Vec::new();
    for story in skips::listed(list) {
        let suite = story.split("::").next().unwrap_or_default().to_owned();
        if !suites.contains(&suite) {
            suites.push(suite);
        }
    }
    suites
}

/// What a test host is given at a time.
enum Part {
    UnitTests(TestProgram),
    /// The end-to-end suite of this name.
    Stories(String),
}

impl Part {
    fn name(&self) -> String {
        match self {
            Part::UnitTests(program) => format!("unit tests that run in a test host, too: {}", program.name),
            Part::Stories(suite) => format!("end-to-end tests: {suite}"),
        }
    }

    fn run(&self, host: &Host, to: &mut impl Write, tally: &mut Tally) -> Result<()> {
        match self {
            Part::UnitTests(program) => unit_tests(program, host, to, tally),
            Part::Stories(suite) => {
                let mut command = host.command([SUITES, &format!("{suite}::")]);
                tallied_to(to, &mut command, suite, tally)
            }
        }
    }
}

fn unit_tests(program: &TestProgram, host: &Host, to: &mut impl Write, tally: &mut Tally) -> Result<()> {
    let command = |words: &[&str]| host.command(["env", IN_TEST_HOST, &program.path].iter().chain(words));
    // In one process, unlike with nextest, tests would disturb each other.
    tallied_to(to, &mut command(&["--quiet", "--test-threads=1"]), &program.name, tally)?;
    let list = process::text(command(&["--list", "--ignored"]).stdin(Stdio::null()))?;
    tally.skipped.extend(skips::in_test_host(&list));
    Ok(())
}

/// Runs all parts on this many test hosts.
fn share_out(parts: VecDeque<Part>, hosts: usize, tally: &mut Tally) -> Result<()> {
    let (parts, tally) = (Mutex::new(parts), Mutex::new(tally));
    thread::scope(|scope| {
        for number in 0..hosts {
            let (parts, tally) = (&parts, &tally);
            scope.spawn(move || match Host::ensure_with(&HostConfig { number, ..HostConfig::default() }) {
                Ok(host) => work(number, &host, parts, tally),
                Err(error) => locked(tally).fail(&format!("test host {number}"), &error),
            });
        }
    });
    let left: Vec<_> = locked(&parts).iter().map(Part::name).collect();
    ensure!(left.is_empty(), "no test host was there to run: {}", left.join(", "));
    Ok(())
}

/// Has one host run parts as long as there are any. What a part prints is shown when it is done, so that the reports of
/// several hosts do not mix.
fn work(number: usize, host: &Host, parts: &Mutex<VecDeque<Part>>, tally: &Mutex<&mut Tally>) {
    loop {
        let Some(part) = locked(parts).pop_front() else { return };
        let name = part.name();
        eprintln!("Test host {number} begins with {name}");
        let (mut output, mut result) = (Vec::new(), Tally::default());
        if let Err(error) = part.run(host, &mut output, &mut result) {
            result.fail(&name, &error);
        }
        let mut tally = locked(tally);
        title(&format!("Test host {number} has run {name}"));
        // A closed standard output is noticed when the tally is printed.
        let _ = io::stdout().write_all(&output);
        **tally += result;
    }
}

/// A thread that panicked has broken neither the list of parts nor the tally.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_named_once_and_in_order() {
        let list = "b::one: test\nb::two: test\na::one: test\n\n3 tests, 0 benchmarks\n";
        assert_eq!(suites(list), ["b", "a"]);
    }

    #[test]
    fn without_a_host_every_part_is_named_as_not_run() {
        let parts = VecDeque::from([Part::Stories("a".into()), Part::Stories("b".into())]);
        let error = share_out(parts, 0, &mut Tally::default()).unwrap_err().to_string();
        assert_eq!(error, "no test host was there to run: end-to-end tests: a, end-to-end tests: b");
    }
}
