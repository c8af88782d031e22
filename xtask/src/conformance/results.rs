//! What the suites' programs print, as cases with outcomes, and the comparison of two runtimes.

use std::fmt;

use super::impossible;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It was left out by the suite.
    Skipped,
    /// It failed.
    Failed,
    /// Its program ended before it.
    Missing,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
            Self::Missing => "missing",
        })
    }
}

/// The outcomes of one run of a program, in order, each name once.
pub type Outcomes = Vec<(String, Outcome)>;

/// A case with its outcome under both runtimes.
#[derive(Debug, PartialEq)]
pub struct Case {
    /// The suite.
    pub suite: &'static str,
    /// The program or group.
    pub part: String,
    /// What is asserted.
    pub name: String,
    /// The outcome under runc.
    pub runc: Outcome,
    /// The outcome under rvm.
    pub rvm: Outcome,
}

impl Case {
    /// Whether rvm fails what runc passes.
    pub fn is_behind(&self) -> bool {
        self.runc == Outcome::Passed && self.rvm != Outcome::Passed
    }
}

/// The case that every program of `validation` has, and every one that hung: that it came to its end, and was content.
pub const END: &str = "comes to its end";

/// The cases in TAP (the Test Anything Protocol).
pub fn of_tap(text: &str) -> Outcomes {
    let mut outcomes = Outcomes::new();
    for line in text.lines() {
        let (rest, passed) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => continue,
        };
        let name = rest.trim_start_matches(|digit: char| digit.is_ascii_digit()).trim_start();
        let (name, outcome) = match name.strip_prefix("# SKIP") {
            Some(reason) => (reason.trim_start(), Outcome::Skipped),
            None => (name.trim_start_matches("- "), if passed { Outcome::Passed } else { Outcome::Failed }),
        };
        add(&mut outcomes, name, outcome);
    }
    outcomes
}

/// The cases in what contest prints: lines like `1 / 3 : name : not ok`.
pub fn of_contest(text: &str) -> Outcomes {
    let mut outcomes = Outcomes::new();
    for line in text.lines() {
        let mut fields = line.split(" : ");
        let (Some(number), Some(name), Some(outcome)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let outcome = match outcome.trim() {
            "ok" => Outcome::Passed,
            "not ok" => Outcome::Failed,
            "skipped" => Outcome::Skipped,
            _ => continue,
        };
        if number.contains(" / ") {
            add(&mut outcomes, name, outcome);
        }
    }
    outcomes
}

/// Adds a case. Programs repeat names, in loops; the worst outcome is the case's.
pub fn add(outcomes: &mut Outcomes, name: &str, outcome: Outcome) {
    let rank = |outcome| match outcome {
        Outcome::Missing => 0,
        Outcome::Skipped => 1,
        Outcome::Passed => 2,
        Outcome::Failed => 3,
    };
    match outcomes.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) if rank(outcome) > rank(*known) => *known = outcome,
        Some(_) => {}
        None => outcomes.push((name.to_owned(), outcome)),
    }
}

/// The cases of both runs of a part.
pub fn paired(suite: &'static str, part: &str, runc: Outcomes, rvm: Outcomes) -> Vec<Case> {
    let mut names: Vec<_> = runc.iter().map(|(name, _)| name.clone()).collect();
    names.extend(rvm.iter().map(|(name, _)| name.clone()).filter(|name| !has(&runc, name)));
    let outcome = |outcomes: &Outcomes, name: &str| {
        outcomes.iter().find(|(known, _)| known == name).map_or(Outcome::Missing, |(_, outcome)| *outcome)
    };
    names
        .into_iter()
        .map(|name| {
            let (runc, rvm) = (outcome(&runc, &name), outcome(&rvm, &name));
            Case { suite, part: part.to_owned(), name, runc, rvm }
        })
        .collect()
}

/// Whether the program had to be ended.
pub fn has_timed_out(outcomes: &Outcomes) -> bool {
    outcomes.iter().any(|(name, outcome)| name == END && *outcome == Outcome::Missing)
}

/// Whether the case is among them.
pub fn has(outcomes: &Outcomes, name: &str) -> bool {
    outcomes.iter().any(|(known, _)| known == name)
}

/// Names of the cases among those `known` that `outcomes` tells nothing of. The end of a program is none.
pub fn missing(known: &Outcomes, outcomes: &Outcomes) -> Vec<String> {
    let names = known.iter().map(|(name, _)| name);
    names.filter(|name| *name != END && !has(outcomes, name)).cloned().collect()
}

/// What comes of it all.
pub struct Comparison {
    /// What makes the run fail, a line each.
    pub problems: Vec<String>,
    /// One line.
    pub summary: String,
}

impl Comparison {
    /// Judges `cases` by the list of impossible ones; `complete` says whether these are all cases of the suites.
    pub fn of(cases: &[Case], complete: bool) -> Self {
        Self::by(cases, complete, impossible::LIST)
    }

    fn by(cases: &[Case], complete: bool, list: &[impossible::Impossible]) -> Self {
        let listed = |case: &Case| list.iter().any(|entry| entry.names(case.suite, &case.part, &case.name));
        let mut problems = Vec::new();
        for case in cases {
            let name = format!("{} / {} / {}", case.suite, case.part, case.name);
            if case.is_behind() && !listed(case) {
                problems.push(format!("passed with runc, {} with rvm: {name}", case.rvm));
            } else if case.rvm == Outcome::Passed && listed(case) {
                problems
                    .push(format!("passed with rvm though it is in the list of impossible cases: {name}"));
            }
        }
        for entry in list.iter().filter(|_| complete) {
            let known = |name: &str| {
                cases.iter().any(|case| {
                    (case.suite, case.part.as_str(), case.name.as_str()) == (entry.suite, entry.part, name)
                })
            };
            for name in entry.cases.iter().filter(|name| !known(name)) {
                let name = format!("{} / {} / {name}", entry.suite, entry.part);
                problems.push(format!("in the list of impossible cases but in no suite: {name}"));
            }
        }
        let count = |counted: &dyn Fn(&&Case) -> bool| cases.iter().filter(counted).count();
        let summary = format!(
            "{} cases: runc passed {}, rvm passed {}; {} that runc passed and rvm did not, {} of them impossible",
            cases.len(),
            count(&|case| case.runc == Outcome::Passed),
            count(&|case| case.rvm == Outcome::Passed),
            count(&|case| case.is_behind()),
            count(&|case| case.is_behind() && listed(case)),
        );
        Self { problems, summary }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Outcome::{Failed, Missing, Passed, Skipped};

    fn named(outcomes: &[(&str, Outcome)]) -> Outcomes {
        outcomes.iter().map(|(name, outcome)| ((*name).to_owned(), *outcome)).collect()
    }

    #[test]
    fn tap_is_understood_with_its_diagnostics() {
        let text = "TAP version 13\nok 1 - a - b\n  ---\n  { \"not ok 7\": 1 }\n  ...\nnot ok 2 - c\nok 3 # SKIP d\nok 4 - c\n# x\n1..4\n";
        assert_eq!(of_tap(text), named(&[("a - b", Passed), ("c", Failed), ("d", Skipped)]));
    }

    #[test]
    fn what_contest_prints_is_understood() {
        let text = "# Start group g\n1 / 3 : one : ok\n2 / 3 : two : not ok\n\terror : a : ok\n3 / 3 : three : skipped\n\twhy\n# End group g\n";
        assert_eq!(of_contest(text), named(&[("one", Passed), ("two", Failed), ("three", Skipped)]));
    }

    #[test]
    fn a_case_that_only_one_runtime_came_to_is_missing_with_the_other() {
        let cases = paired("s", "p", named(&[("a", Passed)]), named(&[("b", Failed)]));
        let seen: Vec<_> = cases.iter().map(|case| (case.name.as_str(), case.runc, case.rvm)).collect();
        assert_eq!(seen, [("a", Passed, Missing), ("b", Missing, Failed)]);
        assert_eq!(cases.iter().map(Case::is_behind).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn that_a_program_hung_is_no_case_to_run_by_itself() {
        let known = named(&[("a", Passed), ("b", Failed), (END, Missing)]);
        assert_eq!(missing(&known, &named(&[("b", Passed)])), ["a"]);
    }

    #[test]
    fn the_list_excuses_failures_and_must_be_honest() {
        let cases = &["excused", "passes", "unknown"];
        let list = [impossible::Impossible { suite: "s", part: "p", cases, reason: "" }];
        let runc = named(&[("excused", Passed), ("passes", Passed), ("behind", Passed), ("both", Failed)]);
        let rvm = named(&[("excused", Failed), ("passes", Passed), ("behind", Skipped), ("both", Failed)]);
        let cases = paired("s", "p", runc, rvm);
        let problems = Comparison::by(&cases, true, &list).problems;
        let count = |text: &str| problems.iter().filter(|line| line.contains(text)).count();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert_eq!((count("s / p / passes"), count("s / p / behind"), count("s / p / unknown")), (1, 1, 1));
        assert_eq!(Comparison::by(&cases, false, &list).problems.len(), 2);
    }
}
