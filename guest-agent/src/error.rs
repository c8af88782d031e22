//! Errors of the agent: always an [`AgentError`], since each ends as the answer to a request.
//!
//! A message names the step and the path that failed and closes with the system's words, in lower case, for
//! engines look for exactly those (`no such file or directory`, `permission denied`).

use std::io;

use nix::errno::Errno;
use rvm_protocol::{AgentError, AgentErrorKind};

/// The result of whatever may end as the answer to a request.
pub type Result<T> = std::result::Result<T, AgentError>;

/// An error of no special kind.
pub fn other(message: impl Into<String>) -> AgentError {
    AgentError { kind: AgentErrorKind::Other, message: message.into() }
}

/// What is asked of a container needs one that runs.
pub fn container_not_running() -> AgentError {
    AgentError { kind: AgentErrorKind::NoSuchProcess, message: "container not running".into() }
}

/// The system's words for an error number, as C programs and Go programs print them within a sentence.
pub fn errno_text(errno: Errno) -> String {
    let text = errno.desc();
    let mut letters = text.chars();
    match (letters.next(), letters.next()) {
        (Some(first), Some(second)) if second.is_lowercase() => {
            first.to_lowercase().chain(text.chars().skip(1)).collect()
        }
        _ => text.to_owned(),
    }
}

/// Adds to an error what was being done.
pub trait Context<T> {
    /// Turns a system error into one that says what failed.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|errno| other(format!("{}: {}", what().into(), errno_text(errno))))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| {
            let cause = match error.raw_os_error() {
                Some(number) => errno_text(Errno::from_raw(number)),
                None => error.to_string(),
            };
            other(format!("{}: {cause}", what().into()))
        })
    }
}

impl<T> Context<T> for serde_json::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| other(format!("{}: {error}", what().into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_speak_the_words_that_engines_look_for() {
        assert_eq!(errno_text(Errno::ENOENT), "no such file or directory");
        assert_eq!(errno_text(Errno::EACCES), "permission denied");
        assert_eq!(errno_text(Errno::ENOEXEC), "exec format error");
        assert_eq!(errno_text(Errno::EISDIR), "is a directory");
        assert_eq!(errno_text(Errno::EIO), "I/O error");
    }
}
