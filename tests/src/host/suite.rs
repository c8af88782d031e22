//! One run of the suites at a time: they look for leftovers in the whole test host, and take those of others for theirs.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::Flock;

use super::Host;
use crate::support::cache;

/// A run of the suites. While it lasts, another waits, of whatever clone of the project.
pub struct Suite {
    /// It holds a line while the suites run, so that one that remains tells of a run that was interrupted.
    file: Flock<File>,
}

impl Suite {
    /// Begins a run: waits for the one that is under way, and clears away what an interrupted one has left.
    pub fn begin() -> Result<Self> {
        let suite = Self { file: take(&lock_file())? };
        suite.start(|| {
            eprintln!("The last run of the tests was interrupted: its test host is ended first.");
            Host::stop_all().map(drop)
        })
    }

    /// Takes the test host for something else than the suites, such as a new build of rvm in it; nothing while they run.
    pub fn begin_other() -> Result<Option<Flock<File>>> {
        cache::try_lock(&lock_file())
    }

    /// Ends a run that has come to its end, whether its tests passed or not.
    pub fn end(self) -> Result<()> {
        self.file.set_len(0).context("cannot note that the tests have ended")
    }

    fn start(mut self, clear: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mut mark = String::new();
        self.file.read_to_string(&mut mark).context("cannot read the lock of the tests")?;
        if !mark.is_empty() {
            clear()?;
        }
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "process {}", std::process::id()).context("cannot note that the tests run")?;
        Ok(self)
    }
}

fn lock_file() -> std::path::PathBuf {
    cache::cache_dir().join("suites.lock")
}

fn take(path: &Path) -> Result<Flock<File>> {
    if let Some(file) = cache::try_lock(path)? {
        return Ok(file);
    }
    eprintln!("Another run of the tests, or an update of the test host, is under way: waiting for its end.");
    cache::lock(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_after_an_interrupted_run_is_there_something_to_clear() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let cleared = || {
            let mut cleared = false;
            let suite = Suite { file: take(&path).unwrap() };
            let suite = suite.start(|| {
                cleared = true;
                Ok(())
            });
            (suite.unwrap(), cleared)
        };
        let (interrupted, first) = cleared();
        drop(interrupted);
        let (ended, second) = cleared();
        ended.end().unwrap();
        assert_eq!((first, second, cleared().1), (false, true, false));
    }

    #[test]
    fn a_run_keeps_others_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let suite = Suite { file: take(&path).unwrap() };
        assert!(cache::try_lock(&path).unwrap().is_none());
        suite.end().unwrap();
        assert!(cache::try_lock(&path).unwrap().is_some());
    }
}
