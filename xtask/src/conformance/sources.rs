//! The suites' sources: one commit of each repository, fetched by the user's git.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::process;
use rvm_tests::support::progress::Progress;

/// What fetching and building takes.
pub const PACKAGES: &[&str] = &["git", "golang-go"];

/// Names a directory with clones of the repositories, used instead of fetching.
const LOCAL: &str = "RVM_CONFORMANCE_SOURCES";

/// One commit of a repository.
pub struct Source {
    /// The repository's name, and that of its clone in the directory that `RVM_CONFORMANCE_SOURCES` names.
    pub name: &'static str,
    /// Where it is published.
    pub address: &'static str,
    /// The commit.
    pub commit: &'static str,
    /// What of it the build needs.
    pub paths: &'static [&'static str],
}

impl Source {
    /// Takes what decides the content into a cache key.
    pub fn add_to(&self, key: Key) -> Key {
        key.with(self.name, self.commit).with("paths", self.paths.join("\n"))
    }

    /// Unpacks the sources in the directory `to`, which exists.
    pub fn unpack(&self, to: &Path) -> Result<()> {
        let repository = match std::env::var_os(LOCAL).filter(|value| !value.is_empty()) {
            Some(directory) => PathBuf::from(directory).join(self.name),
            None => self.fetched()?,
        };
        archive_from(self, &repository, to)
    }

    /// A repository in the cache that has the commit and nothing else.
    fn fetched(&self) -> Result<PathBuf> {
        let entry = cache::cache_dir().join("conformance").join(format!("{}-{}", self.name, self.commit));
        cache::build_once(&entry, |directory| {
            let progress = Progress::spinner(&format!("Fetching {}", self.address));
            process::run(git(directory).args(["init", "--quiet", "--bare"]))?;
            let fetch = process::run(git(directory).args(["fetch", "--depth=1", self.address, self.commit]));
            fetch.map_err(|error| {
                let cause = error.to_string();
                let cause = cause.lines().last().unwrap_or_default().to_owned();
                anyhow::anyhow!(
                    "the suite {} cannot be had from {} ({cause}); set {LOCAL} to a directory with a clone of it",
                    self.name,
                    self.address
                )
            })?;
            progress.finish();
            Ok(())
        })
    }
}

/// Unpacks what is wanted of `source` from `repository`, which may be a clone of any kind.
fn archive_from(source: &Source, repository: &Path, to: &Path) -> Result<()> {
    let mut archive = git(repository);
    archive.args(["archive", "--format=tar", source.commit, "--"]).args(source.paths);
    archive.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut archive = archive.spawn().context("cannot start git")?;
    let pipe = archive.stdout.take().context("git has no output")?;
    let mut tar = Command::new("tar");
    // What git wrote before it failed is no archive for tar to complain about.
    let tar =
        tar.arg("-xC").arg(to).stdin(pipe).stderr(Stdio::null()).status().context("cannot start tar")?;
    let archive = archive.wait_with_output()?;
    let said = String::from_utf8_lossy(&archive.stderr).into_owned();
    ensure!(
        archive.status.success() && tar.success(),
        "{} has not all of the commit {}: {}",
        repository.display(),
        source.commit,
        said.lines().last().unwrap_or("it cannot be unpacked")
    );
    Ok(())
}

/// git in `repository`, whoever owns it and wherever this runs, and never with a question.
fn git(repository: &Path) -> Command {
    let mut command = Command::new("git");
    command.args(["-c", "safe.directory=*", "-C"]).arg(repository);
    command.env_remove("GIT_DIR").env("GIT_TERMINAL_PROMPT", "0").stdin(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_paths_of_the_commit_are_unpacked() {
        let repository = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| process::text(git(repository.path()).args(arguments)).unwrap();
        run(&["init", "--quiet"]);
        for name in ["wanted", "other"] {
            std::fs::write(repository.path().join(name), name).unwrap();
        }
        run(&["add", "."]);
        run(&["-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "x"]);
        std::fs::write(repository.path().join("wanted"), "changed since").unwrap();
        let commit: &'static str = run(&["rev-parse", "HEAD"]).trim().to_owned().leak();
        let to = tempfile::tempdir().unwrap();
        let source = Source { name: "it", address: "", commit, paths: &["wanted"] };
        archive_from(&source, repository.path(), to.path()).unwrap();
        assert_eq!(std::fs::read(to.path().join("wanted")).unwrap(), b"wanted");
        assert!(!to.path().join("other").exists());

        let absent = Source { commit: "0123456789012345678901234567890123456789", ..source };
        let error = archive_from(&absent, repository.path(), to.path()).unwrap_err().to_string();
        assert!(error.contains("0123456789") && error.lines().count() == 1, "{error}");
    }
}
