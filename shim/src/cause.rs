//! Errors of the operating system in words that engines do not mistake for something else.
//!
//! Engines search a runtime's messages: "no such file or directory" makes exit code 127 of a failed start,
//! "permission denied" 126, and "does not exist" and "no such process" mean that the container is gone. A failure
//! of rvm's own must therefore not use these words.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// Why a system call failed; part of the message of another error.
#[derive(Debug)]
pub struct Cause(io::Error);

impl Cause {
    /// The cause that the last failed system call of this thread left.
    pub fn last() -> Self {
        Self(io::Error::last_os_error())
    }

    /// The number of the error, where the kernel gave one.
    pub fn errno(&self) -> Option<Errno> {
        self.0.raw_os_error().map(Errno::from_raw)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno() {
            Some(Errno::ENOENT) => formatter.write_str("nothing is there (ENOENT)"),
            Some(Errno::EACCES) => formatter.write_str("access was refused (EACCES)"),
            Some(Errno::ESRCH) => formatter.write_str("the process is gone (ESRCH)"),
            Some(errno) => write!(formatter, "{} ({errno:?})", errno.desc()),
            None => self.0.fmt(formatter),
        }
    }
}

impl std::error::Error for Cause {}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl From<Errno> for Cause {
    fn from(errno: Errno) -> Self {
        Self(errno.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_engines_search_for_are_avoided() {
        for errno in [Errno::ENOENT, Errno::EACCES, Errno::ESRCH] {
            let words = Cause::from(errno).to_string().to_lowercase();
            assert!(words.contains(&format!("{errno:?}").to_lowercase()), "{words}");
            for trigger in ["no such file", "permission denied", "no such process", "does not exist"] {
                assert!(!words.contains(trigger), "{words}");
            }
        }
    }

    #[test]
    fn other_errors_keep_the_kernels_words() {
        assert_eq!(Cause::from(Errno::EBUSY).to_string(), "Device or resource busy (EBUSY)");
    }
}
