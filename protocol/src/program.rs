//! What can be wrong with the program of a process.
//!
//! The words are those of Go's `exec.LookPath`, which runc uses: engines tell users apart "not found" from "may not
//! be executed" by these very sentences, and both ends may be the one to find out.

use crate::{AgentError, AgentErrorKind};

impl AgentError {
    /// No directory of the `PATH` holds a program of this name.
    pub fn not_in_path(name: &str) -> AgentError {
        Self::of_program(AgentErrorKind::NotFound, name, "executable file not found in $PATH")
    }

    /// Nothing can be learnt of the program's file.
    pub fn no_program(kind: AgentErrorKind, name: &str, cause: &str) -> AgentError {
        Self::of_program(kind, name, &format!("stat {name}: {cause}"))
    }

    /// The program may not be executed.
    pub fn not_executable(name: &str, cause: &str) -> AgentError {
        Self::of_program(AgentErrorKind::NotExecutable, name, cause)
    }

    fn of_program(kind: AgentErrorKind, name: &str, cause: &str) -> AgentError {
        AgentError { kind, message: format!("exec: {name:?}: {cause}") }
    }
}
