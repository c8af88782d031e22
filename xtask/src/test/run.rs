//! Running the parts of a test one after the other, and adding up what each reports.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::skips;
use crate::tally::Tally;

/// What the parts have come to so far.
#[derive(Default)]
pub struct Report {
    tally: Tally,
    failed: Vec<String>,
}

impl Report {
    /// Runs one part, which adds its tests to the tally; returns whether nothing in it failed. An error of the part itself
    /// is told, and counts as one failed test.
    pub fn run(&mut self, part: &str, work: impl FnOnce(&mut Tally) -> Result<()>) -> bool {
        let before = self.tally.failed;
        if let Err(error) = work(&mut self.tally) {
            self.tally.fail(part, &error);
        }
        let passed = self.tally.failed == before;
        if !passed {
            self.failed.push(part.to_owned());
        }
        passed
    }

    /// Repeats what failed, says which tests were left out without a reason, and prints the tally as the last line.
    pub fn close(self) -> ExitCode {
        let unexpected = skips::unexpected(&self.tally.skipped);
        let _ = io::stdout().flush();
        eprintln!();
        // Hours of output may lie between a failed test and the end, and some see the end only.
        for line in &self.tally.said {
            eprintln!("{line}");
        }
        for part in &self.failed {
            eprintln!("failed: {part}");
        }
        for name in &unexpected {
            eprintln!("left out for no reason that xtask/src/test/skips.rs knows: {name}");
        }
        println!("{}", self.tally);
        if self.tally.failed == 0 && unexpected.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Runs tests with their output on the terminal, and counts. A run that fails without a failed test (it did not even
/// compile, or died) is an error; what it had counted stays in `tally`.
pub fn tallied(command: &mut Command, what: &str, tally: &mut Tally) -> Result<()> {
    tallied_to(io::stdout(), command, what, tally)
}

/// As [`tallied`], with the output elsewhere.
pub fn tallied_to(to: impl Write, command: &mut Command, what: &str, tally: &mut Tally) -> Result<()> {
    let (reader, writer) = io::pipe()?;
    // One pipe for both streams keeps their order: nextest reports on stderr, libtest on stdout.
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
    // While the command holds its copies of the writing end, the loop below would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let failed = tally.failed;
    let summaries = count(BufReader::new(reader), to, tally)?;
    let status = child.wait()?;
    if !status.success() && tally.failed == failed {
        bail!("{what} ended with {status}, though no test failed");
    }
    ensure!(summaries > 0 || !status.success(), "{what} printed no summary");
    Ok(())
}

/// The most lines of what a runner says of its failed tests that are repeated.
const MAX_SAID: usize = 80;

/// Copies lines, and adds the summaries, left out tests and words about failed ones among them to `tally`; returns how many
/// summaries there were.
fn count(mut from: impl BufRead, mut to: impl Write, tally: &mut Tally) -> Result<usize> {
    let mut summaries = 0;
    let mut line = Vec::new();
    let mut tells_why = false;
    let enough = tally.said.len() + MAX_SAID;
    while from.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        if let Some(found) = Tally::of_line(&text) {
            *tally += found;
            summaries += 1;
            tells_why = false;
        }
        // From these words on cargo test, and what prints like it, tells why tests failed, until the summary.
        tells_why |= text.trim_end() == "failures:";
        if tells_why && tally.said.len() < enough {
            tally.said.push(text.trim_end().to_owned());
        }
        tally.skipped.extend(skips::reported(&text));
        line.clear();
    }
    Ok(summaries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Result<Tally> {
        let mut tally = Tally::default();
        // On the standard output they would be taken for summaries of this very run.
        tallied_to(io::sink(), Command::new("sh").args(["-c", text]), "the script", &mut tally)?;
        Ok(tally)
    }

    #[test]
    fn every_summary_counts() {
        let tally = script(
            "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'
             echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored' >&2; exit 101",
        );
        assert_eq!(tally.unwrap().to_string(), "3 passed, 1 failed");
    }

    #[test]
    fn a_run_that_breaks_is_never_taken_for_a_success() {
        assert!(script("echo 'error: could not compile'; exit 101").is_err());
        assert!(script("echo 'test result: ok. 2 passed; 0 failed'; exit 1").is_err());
        assert!(script("true").is_err());
    }

    #[test]
    fn a_part_that_breaks_neither_stops_the_others_nor_loses_their_results() {
        let mut report = Report::default();
        let first = report.run("first", |tally| {
            tally.passed += 2;
            bail!("broken")
        });
        let second = report.run("second", |tally| {
            tally.passed += 3;
            Ok(())
        });
        assert_eq!((first, second), (false, true));
        assert_eq!(report.tally.to_string(), "5 passed, 1 failed");
        assert_eq!(report.failed, ["first"]);
    }

    #[test]
    fn a_failure_of_an_earlier_part_does_not_excuse_a_later_one() {
        let mut tally = Tally { failed: 1, ..Tally::default() };
        assert!(tallied(&mut Command::new("false"), "it", &mut tally).is_err());
    }

    #[test]
    fn a_test_left_out_without_a_known_reason_fails_the_run() {
        let close = |skipped: &str| {
            let mut report = Report::default();
            report.run("it", |tally| {
                tally.skipped.push(skipped.to_owned());
                Ok(())
            });
            format!("{:?}", report.close())
        };
        assert_eq!(close("no::such_test"), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(close(skips::EXPECTED[0].0), format!("{:?}", ExitCode::SUCCESS));
    }

    #[test]
    fn what_is_said_of_failed_tests_is_kept_for_the_end() {
        let output = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b ----\nit broke\n\n\
                      failures:\n    b\n\ntest result: FAILED. 1 passed; 1 failed\nThe longest: b\n";
        let mut tally = Tally::default();
        count(output.as_bytes(), io::sink(), &mut tally).unwrap();
        assert_eq!(tally.said, ["failures:", "", "---- b ----", "it broke", "", "failures:", "    b", ""]);

        let endless =
            format!("failures:\n{}test result: FAILED. 0 passed; 1 failed\n", "line\n".repeat(1000));
        let mut tally = Tally::default();
        count(endless.as_bytes(), io::sink(), &mut tally).unwrap();
        assert_eq!((tally.said.len(), tally.failed), (MAX_SAID, 1));
    }

    #[test]
    fn output_is_repeated_as_it_is() {
        let mut output = Vec::new();
        count(&b"a\n\xff\nno newline"[..], &mut output, &mut Tally::default()).unwrap();
        assert_eq!(output, b"a\n\xff\nno newline");
    }
}
