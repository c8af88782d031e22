//! Child processes whose failure must explain itself.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of a failed command's output that an error repeats.
const TAIL: usize = 20;

/// Runs `command`, quietly; if it fails, the error holds the last lines of what it printed.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs `command` and returns its standard output as text.
pub fn text(command: &mut Command) -> Result<String> {
    String::from_utf8(output(command)?.stdout)
        .with_context(|| format!("{} printed no UTF-8", describe(command)))
}

/// Runs `command` with its output going to the file `log` and line by line to `each_line`, for progress.
pub fn run_logged(command: &mut Command, log: &Path, mut each_line: impl FnMut(&str)) -> Result<()> {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    let mut written = Ok(());
    let run = run_watched(command, |line| {
        if written.is_ok() {
            written = writeln!(file, "{line}");
        }
        each_line(line);
    });
    written.with_context(|| format!("cannot write the log {}", log.display()))?;
    run.with_context(|| format!("the whole log is {}", log.display()))
}

/// Runs `command` with its output going line by line to `each_line`, for progress; if it fails, the error holds the last
/// lines.
pub fn run_watched(command: &mut Command, mut each_line: impl FnMut(&str)) -> Result<()> {
    let (reader, writer) = std::io::pipe().context("cannot create a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start {}", describe(command)))?;
    // The command holds copies of the pipe's writing end; while they live, the loop below would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut last = Vec::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        each_line(&line);
        last.push(line);
        if last.len() > TAIL {
            last.remove(0);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} failed ({status}):\n{}", describe(command), last.join("\n"));
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("cannot start {}", describe(command)))?;
    if !output.status.success() {
        let printed = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        let printed = String::from_utf8_lossy(&printed).into_owned();
        let lines: Vec<_> = printed.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
        bail!("{} failed ({}):\n{tail}", describe(command), output.status);
    }
    Ok(output)
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let mut line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(200) {
        line.truncate(end);
        line.push_str(" ...");
    }
    format!("`{line}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_repeats_what_was_printed() {
        let error =
            run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap_err().to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("out") && error.contains("err"),
            "{error}"
        );
    }

    #[test]
    fn a_logged_command_reports_every_line_of_both_streams() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 1"]);
        let error = run_logged(&mut command, log.path(), |line| lines.push(line.to_owned())).unwrap_err();
        assert_eq!(lines, ["one", "two"]);
        assert!(format!("{error:#}").contains("two"));
        assert_eq!(std::fs::read_to_string(log.path()).unwrap(), "one\ntwo\n");
    }
}
