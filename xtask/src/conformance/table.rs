//! The results for people and for programs.

use serde_json::json;

use super::impossible;
use super::results::{Case, Outcome};

/// The table: a row for each part where all is well, and one for each case elsewhere.
pub fn of(cases: &[Case]) -> String {
    let mut text = row("suite", "runc", "rvm", "case");
    for part in cases.chunk_by(|a, b| (a.suite, &a.part) == (b.suite, &b.part)) {
        let alike = part.iter().all(|case| case.runc == case.rvm && case.runc != Outcome::Failed);
        match part {
            [first, ..] if alike => {
                let count = |outcome| part.iter().filter(|case| case.rvm == outcome).count();
                let outcome = if count(Outcome::Passed) == 1 && part.len() > 1 {
                    // All but that it came to its end.
                    Outcome::Skipped
                } else {
                    Outcome::Passed
                };
                let name = format!("{} ({})", first.part, part.len());
                text += &row(first.suite, &outcome.to_string(), &outcome.to_string(), &name);
            }
            _ => part.iter().for_each(|case| {
                let name = format!("{}: {}", case.part, case.name);
                text += &row(case.suite, &case.runc.to_string(), &case.rvm.to_string(), &name);
            }),
        }
    }
    text
}

fn row(suite: &str, runc: &str, rvm: &str, case: &str) -> String {
    format!("{suite:<11} {runc:<8} {rvm:<8} {case}\n")
}

/// All of it as JSON.
pub fn json(cases: &[Case]) -> String {
    let cases: Vec<_> = cases
        .iter()
        .map(|case| {
            let entry = impossible::entry(case.suite, &case.part, &case.name);
            json!({
                "suite": case.suite,
                "part": case.part,
                "case": case.name,
                "runc": case.runc.to_string().to_lowercase(),
                "rvm": case.rvm.to_string().to_lowercase(),
                "impossible": entry.map(|entry| entry.reason),
            })
        })
        .collect();
    format!("{:#}\n", json!({ "cases": cases }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::results::paired;

    fn cases() -> Vec<Case> {
        let outcomes = |last| vec![("a".to_owned(), Outcome::Passed), ("b".to_owned(), last)];
        let mut cases = paired("s", "well", outcomes(Outcome::Passed), outcomes(Outcome::Passed));
        cases.extend(paired("s", "ill", outcomes(Outcome::Passed), outcomes(Outcome::Failed)));
        cases
    }

    #[test]
    fn parts_without_a_difference_take_one_row() {
        let table = of(&cases());
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(
            table.contains("passed   passed   well (2)") && table.contains("passed   FAILED   ill: b"),
            "{table}"
        );
    }

    #[test]
    fn programs_get_every_case() {
        let value: serde_json::Value = serde_json::from_str(&json(&cases())).unwrap();
        assert_eq!(value["cases"][3]["case"], "b");
        assert_eq!(value["cases"][3]["rvm"], "failed");
        assert_eq!(value["cases"].as_array().unwrap().len(), 4);
    }
}
