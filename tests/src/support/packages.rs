//! Debian packages of the build machine: what a chore needs is installed when missing, and said so.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::process;
use super::progress::Progress;

/// Makes sure that all of `packages` are installed: by apt-get as root, otherwise by telling the one command to run.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "Debian packages are missing. Install them, then try again:\n\n    {}\n",
            as_root(&format!("apt-get update && apt-get install --yes --no-install-recommends {list}"))
        );
    }
    eprintln!("Installing Debian packages: {list}");
    // The package lists of a fresh machine are absent or stale; of a machine in use they are good, and a refresh slow.
    install(&missing).or_else(|_| {
        update()?;
        install(&missing)
    })
}

/// Refreshes apt's package lists, which are absent on a fresh machine.
pub fn update() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "apt's package lists are absent or out of date. Refresh them, then try again:\n\n    {}\n",
            as_root("apt-get update")
        );
    }
    let progress = Progress::spinner("Refreshing apt's package lists");
    process::run_watched(apt_get().arg("update"), |line| progress.note(line))?;
    progress.finish();
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut progress = Progress::bar("Debian packages", 100);
    let mut steps = Steps::default();
    let mut command = apt_get();
    command.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    process::run_watched(&mut command, |line| {
        progress.note(line);
        progress.set(steps.percent_after(line));
    })?;
    progress.finish();
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command.args(["-q", "-o", "DPkg::Lock::Timeout=600"]);
    command.stdin(Stdio::null());
    command
}

/// One command line, to be typed by a user, that has root run `script`, which holds no single quotes.
fn as_root(script: &str) -> String {
    format!("{} '{script}'", if has_sudo() { "sudo sh -c" } else { "su - -c" })
}

/// The command line that has root run this program as it was called, with the caller's toolchain but all else root's own.
pub fn again_as_root() -> String {
    let words: Vec<_> = std::env::args().skip(1).collect();
    format!(
        "{} \"PATH='$PATH' RUSTUP_HOME='${{RUSTUP_HOME:-$HOME/.rustup}}' CARGO_TARGET_DIR=/var/cache/rvm-target \
         cargo xtask {}\"",
        if has_sudo() { "sudo sh -c" } else { "su -c" },
        words.join(" ")
    )
}

/// Debian's installer sets sudo up only where root gets no password.
fn has_sudo() -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join("sudo").exists()))
}

/// How far apt has come with an installation, from what it prints: it gets, unpacks and sets up each package.
#[derive(Default)]
pub struct Steps {
    packages: u64,
    done: u64,
}

impl Steps {
    /// The percentage that is done after `line`.
    pub fn percent_after(&mut self, line: &str) -> u64 {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [_, "upgraded,", new, "newly", ..] => self.packages = new.parse().unwrap_or(0),
            ["Unpacking", ..] | ["Setting", "up", ..] => self.done += 1,
            [get, ..] if get.starts_with("Get:") => self.done += 1,
            _ => {}
        }
        (100 * self.done).checked_div(3 * self.packages).unwrap_or(0)
    }
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    if !Path::new("/etc/debian_version").exists() {
        bail!("this machine is no Debian: the chores of this project need Debian 12 or newer");
    }
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n", "--"])
        .args(packages)
        .stderr(Stdio::null())
        .output()
        .context("cannot run dpkg-query")?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(absent(packages, &listing))
}

/// Those of `packages` that are not installed, each once and in order.
fn absent<'a>(packages: &[&'a str], listing: &str) -> Vec<&'a str> {
    let mut absent: Vec<_> =
        packages.iter().copied().filter(|package| !is_installed(listing, package)).collect();
    absent.sort_unstable();
    absent.dedup();
    absent
}

fn is_installed(listing: &str, package: &str) -> bool {
    listing.lines().any(|line| line.split_once(' ') == Some((package, "installed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fully_installed_package_counts() {
        let listing = "bash installed\nflex config-files\n";
        assert!(is_installed(listing, "bash"));
        assert!(!is_installed(listing, "flex"));
        assert!(!is_installed(listing, "bas"));
    }

    #[test]
    fn what_several_chores_need_is_named_once() {
        assert_eq!(absent(&["gcc", "bash", "bc", "gcc"], "bash installed\n"), ["bc", "gcc"]);
    }

    #[test]
    fn the_command_for_root_is_one_line_that_a_shell_takes_as_one() {
        let line = as_root("apt-get update && apt-get install x");
        assert!(line.ends_with(" 'apt-get update && apt-get install x'"), "{line}");
        assert!(line.starts_with("sudo sh -c ") || line.starts_with("su - -c "), "{line}");
    }

    #[test]
    fn apt_is_at_the_end_when_every_package_is_set_up() {
        let mut steps = Steps::default();
        assert_eq!(steps.percent_after("Reading package lists..."), 0);
        assert_eq!(steps.percent_after("0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded."), 0);
        for line in ["Get:1 http://x a", "Get:2 http://x b", "Unpacking a (1) ...", "Unpacking b (1) ..."] {
            steps.percent_after(line);
        }
        assert_eq!(steps.percent_after("Setting up a (1) ..."), 83);
        assert_eq!(steps.percent_after("Setting up b (1) ..."), 100);
    }
}
