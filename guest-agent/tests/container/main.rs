//! Containers made by the real agent, in namespaces of the machine that runs the tests instead of a guest.
//!
//! The agent must be single-threaded, which a test harness is not: this program starts itself once more, as
//! the agent, for every test. It needs root, for namespaces and mounts; without it the tests are ignored.

mod execs;
mod failures;
mod guest;
mod host;
mod identity;
mod limits;
mod mounts;
mod rehearsals;
mod streams;
mod terminals;

use std::path::Path;

use libtest_mimic::{Arguments, Trial};

/// First argument of the process that is to be the agent.
const AGENT: &str = "--be-the-agent-under-test";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == AGENT) {
        let directory = arguments.next().expect("a directory to serve from");
        guest::serve(Path::new(&directory));
        return;
    }
    let obstacle = obstacle();
    let suites = [
        (streams::tests(), obstacle),
        (failures::tests(), obstacle),
        (identity::tests(), obstacle),
        (mounts::tests(), obstacle),
        (terminals::tests(), obstacle),
        (execs::tests(), obstacle),
        (rehearsals::tests(), obstacle),
        (limits::tests(), obstacle.or_else(limits::obstacle)),
    ];
    let arguments = Arguments::from_args();
    let trials = suites
        .into_iter()
        .flat_map(|(tests, obstacle)| tests.into_iter().map(move |test| trial(test, obstacle)));
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn trial((name, test): Test, obstacle: Option<&'static str>) -> Trial {
    let run = move || {
        test();
        Ok(())
    };
    // The reason is shown beside the name, as the kind of the test.
    Trial::test(name, run).with_ignored_flag(obstacle.is_some()).with_kind(obstacle.unwrap_or_default())
}

/// A test and its name.
type Test = (&'static str, fn());

/// Lists functions as tests, by their names.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub fn tests() -> Vec<crate::Test> {
            vec![$((concat!(module_path!(), "::", stringify!($name)), $name as fn())),*]
        }
    };
}
pub(crate) use tests;

fn obstacle() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("they need root");
    }
    host::busybox().is_none().then_some("they need busybox (package busybox-static)")
}
