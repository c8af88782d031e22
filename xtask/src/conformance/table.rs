//! The results for people and for programs.

use serde_json::json;

use super::impossible;
use super::results::{Case, Outcome};

/// The table: a row for each part, with how many of its cases passed, and below it one for each case that rvm did not pass.
pub fn of(cases: &[Case]) -> String {
    let mut text = row("suite", "runc", "rvm", "case");
    for part in cases.chunk_by(|a, b| (a.suite, &a.part) == (b.suite, &b.part)) {
        let Some(first) = part.first() else { continue };
        let passed = |outcome: fn(&Case) -> Outcome| {
            let count = part.iter().filter(|case| outcome(case) == Outcome::Passed).count();
            format!("{count}/{}", part.len())
        };
        text += &row(first.suite, &passed(|case| case.runc), &passed(|case| case.rvm), &first.part);
        for case in part.iter().filter(|case| matches!(case.rvm, Outcome::Failed | Outcome::Missing)) {
            text += &row("", &case.runc.to_string(), &case.rvm.to_string(), &format!("  {}", case.name));
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
    fn a_part_takes_one_row_and_each_of_its_failures_another() {
        let table = of(&cases());
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(table.contains("s           2/2      2/2      well\n"), "{table}");
        assert!(
            table.contains("s           2/2      1/2      ill\n            passed   FAILED     b\n"),
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
