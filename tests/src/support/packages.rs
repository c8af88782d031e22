//! Debian packages of the build machine: what a chore needs is installed when missing, and said so.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::process;

/// Makes sure that all of `packages` are installed: by apt-get as root, otherwise by telling the one command to run.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "Debian packages are missing. Install them, then try again:\n\n    sudo apt-get install --yes {list}\n"
        );
    }
    eprintln!("Installing Debian packages: {list}");
    // The package lists of a fresh machine are absent or stale; of a machine in use they are good, and a refresh slow.
    install(&missing).or_else(|_| {
        process::run(apt_get().arg("update"))?;
        install(&missing)
    })
}

fn install(packages: &[&str]) -> Result<()> {
    process::run(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(packages))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "DPkg::Lock::Timeout=600"]);
    command.stdin(Stdio::null());
    command
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n", "--"])
        .args(packages)
        .stderr(Stdio::null())
        .output()
        .context("cannot run dpkg-query: the test tools need Debian 12 or newer")?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(packages.iter().copied().filter(|package| !is_installed(&listing, package)).collect())
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
}
