//! The end-to-end suites of rvm. This program runs as root inside the test host, beside real engines, and
//! each test is a story: what a user does, and what must come out.
//!
//! Stories run one after another, because after each of them the whole host is searched for leftovers
//! ([`leftovers`]).

mod accidents;
mod bad_input;
mod beside_runc;
mod bundle;
mod command;
mod compare;
mod counts;
mod daemon;
mod daemons;
mod durations;
mod engines;
mod execs;
mod exit_codes;
mod leftovers;
mod lifecycle;
mod limits;
mod memory;
mod network;
mod options;
mod probe;
mod programs;
mod specification;
mod streams;
mod systemd;
mod templates;
mod terminal;
mod volumes;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

/// What a user does, and what must come out.
type Story = fn() -> anyhow::Result<()>;

/// The longest come first, for whoever shares them out among several hosts.
const SUITES: &[(&str, &[(&str, Story)])] = &[
    ("network", network::bridge::STORIES),
    ("network", network::own::STORIES),
    ("network", network::publishing::STORIES),
    ("network", network::podman::STORIES),
    ("network", network::cni::STORIES),
    ("network", network::compose::STORIES),
    ("network", network::walkthrough::STORIES),
    ("network", network::names::STORIES),
    ("network", network::changes::STORIES),
    ("network", network::hostile::STORIES),
    ("network", network::accidents::STORIES),
    ("beside_runc", beside_runc::STORIES),
    ("volumes", volumes::STORIES),
    ("volumes", volumes::large::STORIES),
    ("volumes", volumes::small::STORIES),
    ("options", options::STORIES),
    ("accidents", accidents::STORIES),
    ("templates", templates::STORIES),
    ("templates", templates::clocks::STORIES),
    ("templates", templates::clones::STORIES),
    ("templates", templates::code::STORIES),
    ("templates", templates::damage::STORIES),
    ("templates", templates::boot::STORIES),
    ("programs", programs::STORIES),
    ("lifecycle", lifecycle::STORIES),
    ("bad_input", bad_input::STORIES),
    ("engines", engines::STORIES),
    ("exit_codes", exit_codes::STORIES),
    ("limits", limits::STORIES),
    ("memory", memory::STORIES),
    ("compare", compare::STORIES),
    ("counts", counts::STORIES),
    ("execs", execs::STORIES),
    ("streams", streams::STORIES),
    ("specification", specification::STORIES),
    ("specification", specification::hooks::STORIES),
    ("specification", specification::operations::STORIES),
    ("specification", specification::process::STORIES),
    ("specification", specification::files::STORIES),
    ("daemons", daemons::STORIES),
    ("systemd", systemd::STORIES),
];

fn main() -> ExitCode {
    if let Some(code) = probe::run_if_called() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    // Before the first look at the host: exporting an image leaves traces of Docker's own for a while.
    if let Err(error) = bundle::busybox_tree() {
        eprintln!("the stories about bundles will fail: {error:?}");
    }
    let trials = SUITES
        .iter()
        .flat_map(|(suite, stories)| stories.iter().map(move |(name, story)| trial(suite, name, *story)))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    durations::tell_longest();
    conclusion.exit_code()
}

fn trial(suite: &str, name: &str, story: Story) -> Trial {
    let name = format!("{suite}::{name}");
    Trial::test(name.clone(), move || {
        durations::noted(&name, || tell(story)).map_err(|error| Failed::from(format!("{error:?}")))
    })
}

/// Runs a story, and searches for what it has left.
fn tell(story: Story) -> anyhow::Result<()> {
    let before = leftovers::Traces::find()?;
    let outcome = story();
    command::empty_engines();
    let clean = leftovers::assert_none_since(&before);
    if outcome.is_err() || clean.is_err() {
        command::remove_remains();
    }
    match (outcome, clean) {
        // What it has left may tell why it failed.
        (Err(error), Err(left)) => Err(anyhow::anyhow!("{error:?}\n{left}")),
        (outcome, clean) => outcome.and(clean),
    }
}
