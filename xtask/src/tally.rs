//! How many tests passed, failed and were left out, read from what test runners print.

use std::fmt;
use std::ops::AddAssign;

/// Results of any number of runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// The names of the tests that were left out. Summaries have no names, so they add none.
    pub skipped: Vec<String>,
    /// What runners said of the tests that failed, line by line.
    pub said: Vec<String>,
}

impl Tally {
    /// What one line reports, if it is the summary of cargo test (and what prints like it) or of cargo-nextest.
    pub fn of_line(line: &str) -> Option<Self> {
        let line = plain(line);
        let line = line.trim();
        let summary = line.starts_with("test result: ") || line.starts_with("Summary [");
        summary.then(|| Self {
            passed: count(line, "passed"),
            // nextest counts apart what did not fail an assertion but ended otherwise.
            failed: ["failed", "exec failed", "timed out"].iter().map(|word| count(line, word)).sum(),
            ..Self::default()
        })
    }

    /// Tells an error that is no test's, and counts it as a failed one.
    pub fn fail(&mut self, part: &str, error: &anyhow::Error) {
        eprintln!("error: {part}: {error:#}");
        self.failed += 1;
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
        self.said.extend(other.said);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        match self.skipped.len() {
            0 => Ok(()),
            count => write!(f, ", {count} skipped"),
        }
    }
}

/// The number before `word`, of a list like `3 passed (1 slow), 1 failed; 2 skipped`.
fn count(line: &str, word: &str) -> u64 {
    line.split([',', ';', ':', '.'])
        .filter_map(|part| part.trim().split_once(' '))
        .filter(|(_, rest)| *rest == word || rest.starts_with(&format!("{word} (")))
        .filter_map(|(number, _)| number.parse::<u64>().ok())
        .sum()
}

/// `line` without the escape sequences of colours.
fn plain(line: &str) -> String {
    let mut pieces = line.split('\x1b');
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        text.push_str(piece.split_once('m').map_or("", |(_, rest)| rest));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_cargo_test_and_of_nextest_are_understood() {
        let tally = |line| Tally::of_line(line).map(|tally| (tally.passed, tally.failed));
        let cargo = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.10s";
        assert_eq!(tally(cargo), Some((12, 3)));
        let nextest =
            "     Summary [   0.204s] 14 tests run: 11 passed (2 slow), 2 failed, 1 timed out, 5 skipped";
        assert_eq!(tally(nextest), Some((11, 3)));
        let coloured = "\x1b[32;1m     Summary\x1b[0m [   0.1s] \x1b[1m2\x1b[0m tests run: \x1b[1m2\x1b[0m \x1b[32;1mpassed\x1b[0m, 0 skipped";
        assert_eq!(tally(coloured), Some((2, 0)));
        let execution = "Summary [   0.204s] 3/4 tests run: 1 passed, 1 failed, 1 exec failed, 0 skipped";
        assert_eq!(tally(execution), Some((1, 2)));
        assert_eq!(tally("test foo ... ok: 3 passed"), None);
    }

    #[test]
    fn tallies_add_up() {
        let mut sum = Tally { passed: 1, ..Tally::default() };
        sum += Tally { passed: 2, failed: 5, ..Tally::default() };
        assert_eq!(sum.to_string(), "3 passed, 5 failed");
        sum += Tally { skipped: vec!["x".into()], ..Tally::default() };
        assert_eq!(sum.to_string(), "3 passed, 5 failed, 1 skipped");
    }
}
