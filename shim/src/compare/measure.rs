//! The measuring itself: the runtimes take turns, so that whatever else the machine does meets all of them alike.

use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus, Output};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::CompareError;
use super::calls::{self, HostCalls};
use super::processes::{self, Newcomers};
use super::runtime::{Caller, Runtime};
use super::statistics::Sample;
use crate::foreign::tame;

/// How many containers share what can be shared while their memory is measured.
pub const CROWD: usize = 5;
/// How long they may take to come to rest before.
const REST: Duration = Duration::from_secs(1);
/// Length of each field of `struct utsname`.
const NAME_FIELD: usize = 65;

/// What was found about one runtime.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// What the user calls it.
    pub name: String,
    /// From the call of the command to its return, with a program that ends at once, in milliseconds.
    pub start: Sample,
    /// The same for a further program in a container that runs.
    pub exec: Sample,
    /// How long each phase of a start took, in milliseconds; for rvm alone.
    pub phases: Vec<PhaseTime>,
    /// Share of the host's memory of a container that does nothing, in bytes.
    pub memory: Option<u64>,
    /// Whose kernel it has.
    pub kernel: Option<Kernel>,
    /// How many of the host's system calls can be made.
    pub calls: Option<HostCalls>,
    /// Why there is nothing more.
    pub failure: Option<String>,
}

/// A phase of a start.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseTime {
    /// What is reached at its end.
    pub phase: String,
    /// How long it took: the median, in milliseconds.
    pub took: f64,
}

/// The kernel that a container's program sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    /// As uname(2) tells it.
    pub release: String,
    /// Whose it is.
    pub owner: KernelOwner,
}

/// Who answers a container's system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum KernelOwner {
    /// The host's kernel: one fault in it, and the container is out.
    Host,
    /// A kernel of its own in a virtual machine.
    Machine,
    /// A program of the host that stands in for a kernel.
    Program,
}

/// Told after each step.
pub type Step<'a> = &'a mut dyn FnMut(&str) -> Result<(), CompareError>;

/// How many steps there will be.
pub fn steps(runtimes: usize, rounds: usize) -> usize {
    runtimes * (1 + rounds + 1 + rounds + 1)
}

/// Measures all of them.
pub fn measure(
    caller: &Caller,
    runtimes: &[Runtime],
    rounds: usize,
    step: Step<'_>,
) -> Result<Vec<Figures>, CompareError> {
    let numbered = runtimes.iter().enumerate();
    let mut subjects: Vec<_> =
        numbered.map(|(number, runtime)| Subject::new(caller, runtime, number)).collect();
    // The first start of each fills caches, and may leave a template.
    in_turns(&mut subjects, 1, step, "warming up", |subject| subject.warm_up())?;
    in_turns(&mut subjects, rounds, step, "start", |subject| subject.time_start())?;
    in_turns(&mut subjects, 1, step, "begin", |subject| subject.begin_first())?;
    in_turns(&mut subjects, rounds, step, "exec", |subject| subject.time_exec())?;
    in_turns(&mut subjects, 1, step, "memory", |subject| subject.weigh())?;
    Ok(subjects.into_iter().map(Subject::finish).collect())
}

/// One after another, and each round begins with another one.
fn in_turns(
    subjects: &mut [Subject<'_>],
    rounds: usize,
    step: Step<'_>,
    what: &str,
    mut act: impl FnMut(&mut Subject<'_>) -> Result<(), Failure>,
) -> Result<(), CompareError> {
    let count = subjects.len();
    for round in 0..rounds {
        for place in 0..count {
            let subject = &mut subjects[(round + place) % count];
            step(&format!("{} {what}", subject.runtime.name))?;
            if subject.figures.failure.is_none()
                && let Err(failure) = act(subject)
            {
                subject.figures.failure = Some(failure.0);
            }
        }
    }
    Ok(())
}

/// What a command had to say before it failed.
struct Failure(String);

impl Failure {
    fn of(status: ExitStatus, stderr: &[u8]) -> Failure {
        let words = String::from_utf8_lossy(stderr);
        let last = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        Failure(format!("{status}: {}", tame(last)))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure(format!("cannot be started: {error}"))
    }
}

/// A runtime while it is measured. The containers that it has end with it.
struct Subject<'a> {
    caller: &'a Caller,
    runtime: &'a Runtime,
    /// Its place on the command line: control groups go by IDs, whichever runtime made them.
    number: usize,
    figures: Figures,
    starts: Vec<f64>,
    execs: Vec<f64>,
    phases: Vec<Vec<PhaseTime>>,
    running: Vec<String>,
    count: usize,
}

impl<'a> Subject<'a> {
    fn new(caller: &'a Caller, runtime: &'a Runtime, number: usize) -> Self {
        let figures = Figures { name: runtime.name.clone(), ..Figures::default() };
        let (starts, execs, phases, running) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { caller, runtime, number, figures, starts, execs, phases, running, count: 0 }
    }

    fn next_id(&mut self) -> String {
        self.count += 1;
        format!("rvm-compare-{}-{}-{}", std::process::id(), self.number, self.count)
    }

    fn warm_up(&mut self) -> Result<(), Failure> {
        self.start().map(drop)
    }

    fn time_start(&mut self) -> Result<(), Failure> {
        let (time, output) = self.start()?;
        self.starts.push(time);
        self.phases.extend(phases(&output.stderr).filter(|_| self.runtime.has_phases));
        Ok(())
    }

    fn start(&mut self) -> Result<(f64, Output), Failure> {
        let id = self.next_id();
        let started = timed(self.caller.start(self.runtime, &id));
        if started.is_err() {
            // It may have come half-way.
            self.running.push(id);
        }
        started
    }

    fn begin(&mut self) -> Result<(), Failure> {
        let id = self.next_id();
        let mut command = self.caller.begin(self.runtime, &id);
        // One that fails half-way is removed, too.
        self.running.push(id);
        // What stays would keep a pipe open.
        let mut errors = tempfile::tempfile()?;
        let status = command.stderr(errors.try_clone()?).status()?;
        let mut words = Vec::new();
        errors.rewind()?;
        errors.read_to_end(&mut words)?;
        match status.success() {
            true => Ok(()),
            false => Err(Failure::of(status, &words)),
        }
    }

    fn begin_first(&mut self) -> Result<(), Failure> {
        let before = processes::now();
        self.begin()?;
        let has_machine = Newcomers::since(&before).has_machine;
        let id = self.running[0].clone();
        let (_, told) = timed(self.caller.kernel(self.runtime, &id))?;
        self.figures.kernel = kernel(&told.stdout, has_machine);
        if let Some(Kernel { owner, .. }) = self.figures.kernel {
            let (_, told) = timed(self.caller.process(self.runtime, &id))?;
            self.figures.calls = process(&told.stdout).and_then(|process| calls::of(process, owner));
        }
        timed(self.caller.exec(self.runtime, &id)).map(drop)
    }

    fn time_exec(&mut self) -> Result<(), Failure> {
        let id = self.running[0].clone();
        self.execs.push(timed(self.caller.exec(self.runtime, &id))?.0);
        Ok(())
    }

    /// Measures the memory of several containers that have just started, and takes the share of one.
    fn weigh(&mut self) -> Result<(), Failure> {
        self.end_all();
        let before = processes::now();
        (0..CROWD).try_for_each(|_| self.begin())?;
        std::thread::sleep(REST);
        let newcomers = Newcomers::since(&before);
        self.end_all();
        let memory = newcomers.memory_of_gone() / CROWD as u64;
        self.figures.memory = Some(memory).filter(|memory| *memory > 0);
        Ok(())
    }

    fn end_all(&mut self) {
        for id in std::mem::take(&mut self.running) {
            // What never began cannot be ended.
            let _ = timed(self.caller.end(self.runtime, &id));
        }
    }

    fn finish(mut self) -> Figures {
        let mut figures = std::mem::take(&mut self.figures);
        figures.start = Sample::new(self.starts.iter().copied());
        figures.exec = Sample::new(self.execs.iter().copied());
        figures.phases = medians(&self.phases);
        figures
    }
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        self.end_all();
    }
}

/// Runs a command to its end: how long that took, in milliseconds, and what it wrote.
fn timed(mut command: Command) -> Result<(f64, Output), Failure> {
    let begin = Instant::now();
    let output = command.output()?;
    let took = begin.elapsed().as_secs_f64() * 1e3;
    if output.status.success() {
        return Ok((took, output));
    }
    Err(Failure::of(output.status, &output.stderr))
}

/// The process as `state` or `docker inspect` told it.
fn process(told: &[u8]) -> Option<i32> {
    let told: serde_json::Value = serde_json::from_slice(told).ok()?;
    let number = told.get("pid").unwrap_or(&told).as_i64()?;
    i32::try_from(number).ok().filter(|number| *number > 0)
}

/// The kernel as `kernel` or `uname -rv` wrote it.
fn kernel(told: &[u8], has_machine: bool) -> Option<Kernel> {
    let text = String::from_utf8_lossy(told);
    let words: Vec<&str> = text.split([' ', '\0', '\n']).filter(|word| !word.is_empty()).collect();
    let host = nix::sys::utsname::uname().ok()?;
    let here = format!("{} {}", host.release().to_string_lossy(), host.version().to_string_lossy());
    let there = words.join(" ");
    // A version that fills its field has lost its end.
    let is_host =
        !there.is_empty() && here.split_whitespace().collect::<Vec<_>>().join(" ").starts_with(&there);
    let owner = match (has_machine, is_host) {
        (true, _) => KernelOwner::Machine,
        (false, true) => KernelOwner::Host,
        (false, false) => KernelOwner::Program,
    };
    let release = words.first()?.chars().take(NAME_FIELD).collect::<String>();
    Some(Kernel { release: tame(&release), owner })
}

/// What `--timeline=json` writes: each phase, and when it was reached.
#[derive(Deserialize)]
struct Reached {
    title: String,
    milliseconds: f64,
}

/// How long each phase took. The line is the last that is JSON: warnings may come before.
fn phases(stderr: &[u8]) -> Option<Vec<PhaseTime>> {
    let text = String::from_utf8_lossy(stderr);
    let reached: Vec<Reached> = text.lines().rev().find_map(|line| serde_json::from_str(line).ok())?;
    let took = reached.windows(2).map(|pair| PhaseTime {
        phase: pair[1].title.clone(),
        took: pair[1].milliseconds - pair[0].milliseconds,
    });
    Some(took.collect())
}

/// Of each phase of the most complete start, the median over all that have it.
fn medians(starts: &[Vec<PhaseTime>]) -> Vec<PhaseTime> {
    let Some(longest) = starts.iter().max_by_key(|phases| phases.len()) else { return Vec::new() };
    let of = |name: &str| {
        let all = starts.iter().flatten().filter(|phase| phase.phase == name).map(|phase| phase.took);
        Sample::new(all).summary().map_or(0.0, |summary| summary.median)
    };
    longest.iter().map(|phase| PhaseTime { phase: phase.phase.clone(), took: of(&phase.phase) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        let host = nix::sys::utsname::uname().unwrap();
        let (release, version) = (host.release().to_string_lossy(), host.version().to_string_lossy());
        let mut fields = vec![0; 130];
        fields[..release.len()].copy_from_slice(release.as_bytes());
        fields[65..65 + version.len()].copy_from_slice(version.as_bytes());
        assert_eq!(kernel(&fields, false).unwrap().owner, KernelOwner::Host);
        assert_eq!(
            kernel(format!("{release} {version}\n").as_bytes(), false).unwrap().owner,
            KernelOwner::Host
        );
        assert_eq!(kernel(&fields, true).unwrap().owner, KernelOwner::Machine);
        let other = kernel(b"4.4.0\0\0#1 SMP Sun Jan 10 15:06:54 PST 2016\0", false).unwrap();
        assert_eq!(other, Kernel { release: "4.4.0".into(), owner: KernelOwner::Program });
        assert_eq!(kernel(b"", false), None);
    }

    #[test]
    fn processes_are_told_in_two_ways() {
        assert_eq!(process(br#"{"ociVersion": "1.0.2", "pid": 17}"#), Some(17));
        assert_eq!(process(b"17\n"), Some(17));
        for nothing in ["", "0", "-1", "{}", "{\"pid\": 0}", "99999999999"] {
            assert_eq!(process(nothing.as_bytes()), None, "{nothing}");
        }
    }

    #[test]
    fn phases_are_differences_and_their_medians() {
        let line = |agent: u32| {
            format!(
                "warning: something\n[{{\"title\":\"begun\",\"milliseconds\":0}},{{\"title\":\"agent up\",\"milliseconds\":{agent}}}]\n"
            )
        };
        let starts: Vec<_> = [30, 10, 20].map(|agent| phases(line(agent).as_bytes()).unwrap()).into();
        assert_eq!(medians(&starts), [PhaseTime { phase: "agent up".into(), took: 20.0 }]);
        assert_eq!(phases(b"no JSON"), None);
        assert_eq!(medians(&[]), []);
    }

    #[test]
    fn a_runtime_that_fails_says_why_and_holds_up_nothing() {
        let caller = Caller::Docker { image: String::new() };
        let runtime = Runtime::of_docker("x");
        let mut subjects = [0, 1].map(|number| Subject::new(&caller, &runtime, number));
        let mut steps = 0;
        let mut step = |_: &str| {
            steps += 1;
            Ok(())
        };
        let mut calls = 0;
        in_turns(&mut subjects, 3, &mut step, "start", |_| {
            calls += 1;
            match calls {
                1 => Err(Failure("exit status: 1: no".into())),
                _ => Ok(()),
            }
        })
        .unwrap();
        assert_eq!((steps, calls), (6, 4), "the first is not asked again");
        assert_eq!(subjects[0].figures.failure.as_deref(), Some("exit status: 1: no"));
        assert_eq!(subjects[1].figures.failure, None);
    }
}
