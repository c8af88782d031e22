//! Why the monitor did not do what it was asked, in words and in a kind that programs can tell.

use std::fmt;

use rvm_protocol::{AgentError, AgentErrorKind};
use serde::{Deserialize, Serialize};

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What kind of failure it is.
    pub kind: RefusalKind,
    /// Why, in words for the user.
    pub words: String,
}

/// The kinds of failure that have an exit code of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The program is not there.
    NotFound,
    /// The program may not be executed.
    NotExecutable,
    /// Anything else.
    Other,
}

impl RefusalKind {
    /// What a shell would end with, where it has a code for this kind.
    pub fn shell_code(self) -> Option<u8> {
        match self {
            RefusalKind::NotFound => Some(127),
            RefusalKind::NotExecutable => Some(126),
            RefusalKind::Other => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.words)
    }
}

impl From<String> for Refusal {
    fn from(words: String) -> Self {
        Refusal { kind: RefusalKind::Other, words }
    }
}

impl From<&str> for Refusal {
    fn from(words: &str) -> Self {
        Refusal::from(words.to_owned())
    }
}

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Self {
        Refusal { kind: error.kind.into(), words: error.message }
    }
}

impl From<AgentErrorKind> for RefusalKind {
    fn from(kind: AgentErrorKind) -> Self {
        match kind {
            AgentErrorKind::NotFound => RefusalKind::NotFound,
            AgentErrorKind::NotExecutable => RefusalKind::NotExecutable,
            AgentErrorKind::NoSuchProcess | AgentErrorKind::Other => RefusalKind::Other,
        }
    }
}
