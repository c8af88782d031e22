//! The engine's log (`--log`, `--log-format`) and the line on standard error.
//!
//! Engines read the *last* error of the log, and some want the log to hold one object only when a command fails.
//! Warnings are therefore held back until the command has succeeded. Without a log they go to standard error.
//! With `--debug`, which those engines do not give together with a log, details are written as they come.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use jiff::{Timestamp, Unit, tz::TimeZone};
use serde::{Deserialize, Serialize};

use crate::cause::Cause;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum LogFormat {
    /// `time=... level=... msg=...`
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log file cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log {}: {source}", .path.display())]
pub struct LogError {
    path: PathBuf,
    source: Cause,
}

/// How grave a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Debug,
    Warning,
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }
}

/// Where messages go.
#[derive(Debug, Default)]
pub struct Log {
    file: Option<File>,
    format: LogFormat,
    debug: bool,
    held_back: RefCell<Vec<(Level, String)>>,
}

impl Log {
    /// Opens the log file, if one is wanted.
    pub fn open(path: Option<&Path>, format: LogFormat, debug: bool) -> Result<Log, LogError> {
        let open = |path: &Path| {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|source| LogError { path: path.to_owned(), source: source.into() })
        };
        let file = path.filter(|path| !path.as_os_str().is_empty()).map(open).transpose()?;
        Ok(Log::to_file(file, format, debug))
    }

    /// A log that writes to an open file.
    pub fn to_file(file: Option<File>, format: LogFormat, debug: bool) -> Log {
        Log { file, format, debug, held_back: RefCell::default() }
    }

    /// The log file, if there is one.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// How its lines look.
    pub fn format(&self) -> LogFormat {
        self.format
    }

    /// Something that the user should know, although it works.
    pub fn warning(&self, message: impl Into<String>) {
        self.held_back.borrow_mut().push((Level::Warning, message.into()));
    }

    /// The same where no end of a command is waited for.
    pub fn warning_now(&self, message: &str) {
        self.write(Level::Warning, message);
    }

    /// Something for those who look for a fault, with `--debug` only. It is not held back: it is wanted most when
    /// the command fails.
    pub fn debug(&self, message: impl AsRef<str>) {
        if self.debug {
            self.tell(Level::Debug, message.as_ref());
        }
    }

    /// Whether details are logged.
    pub fn is_debug(&self) -> bool {
        self.debug
    }

    /// Writes the messages that were held back: the command has succeeded.
    pub fn flush(&self) {
        for (level, message) in self.held_back.take() {
            self.tell(level, &message);
        }
    }

    fn tell(&self, level: Level, message: &str) {
        if self.file.is_some() {
            self.write(level, message);
        } else {
            let _ = writeln!(io::stderr(), "{}: {}", level.name(), one_line(message));
        }
    }

    /// Writes the error that ends the command to the log, and as one line to standard error.
    pub fn error(&self, message: &str) {
        self.error_to_log(message);
        let _ = writeln!(io::stderr(), "error: {}", one_line(message));
    }

    /// Writes an error to the log alone.
    pub fn error_to_log(&self, message: &str) {
        self.held_back.take();
        self.write(Level::Error, message);
    }

    fn write(&self, level: Level, message: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        // One write a line: several processes append to the same file. A log that cannot be written to is not
        // worth a container.
        let _ = file.write_all(line(self.format, level, message, Timestamp::now()).as_bytes());
    }
}

fn line(format: LogFormat, level: Level, message: &str, time: Timestamp) -> String {
    let time = time.round(Unit::Microsecond).unwrap_or(time).to_zoned(TimeZone::UTC);
    let time = time.strftime("%Y-%m-%dT%H:%M:%S%.fZ").to_string();
    match format {
        LogFormat::Json => {
            let object = serde_json::json!({ "level": level.name(), "msg": message, "time": time });
            format!("{object}\n")
        }
        LogFormat::Text => format!("time={time:?} level={} msg={:?}\n", level.name(), one_line(message)),
    }
}

fn one_line(message: &str) -> String {
    message.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time() -> Timestamp {
        "2026-01-02T03:04:05.123456789Z".parse().unwrap()
    }

    #[test]
    fn a_json_line_is_what_engines_parse() {
        let line = line(LogFormat::Json, Level::Error, "a \"quoted\"\nword", time());
        assert_eq!(line.matches('\n').count(), 1);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["level"], "error");
        assert_eq!(object["msg"], "a \"quoted\"\nword");
        assert_eq!(object["time"], "2026-01-02T03:04:05.123457Z");
        assert!(object["time"].as_str().unwrap().parse::<Timestamp>().is_ok());
    }

    #[test]
    fn a_text_line_stays_one_line() {
        let line = line(LogFormat::Text, Level::Warning, "first\r\nsecond", time());
        assert_eq!(line, "time=\"2026-01-02T03:04:05.123457Z\" level=warning msg=\"first; second\"\n");
    }

    #[test]
    fn a_failed_command_leaves_one_object() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.json");
        let log = Log::open(Some(&path), LogFormat::Json, false).unwrap();
        log.warning("a warning");
        log.debug("a detail");
        log.error_to_log("the error");
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(object["msg"], "the error");
    }

    #[test]
    fn details_stay_in_the_log_of_a_command_that_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.json");
        let log = Log::open(Some(&path), LogFormat::Json, true).unwrap();
        log.debug("a detail");
        log.warning("a warning");
        log.error_to_log("the error");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let told: Vec<_> = lines.iter().map(|line| (line["level"].as_str(), line["msg"].as_str())).collect();
        assert_eq!(told, [(Some("debug"), Some("a detail")), (Some("error"), Some("the error"))]);
    }

    #[test]
    fn a_successful_command_leaves_its_warnings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.json");
        let log = Log::open(Some(&path), LogFormat::Json, false).unwrap();
        log.warning("a warning");
        log.debug("a detail");
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("\"a warning\""), "{text}");
    }
}
