//! The small host: a Linux host with a genuine `/dev/kvm`, in a software machine, for machines that have none.
//!
//! It is one kernel and one initramfs, is up in seconds, runs one command, and is gone. QEMU emulates an AMD processor with
//! SVM and nested paging, so a microVM inside is a real one. Tests with Docker need the larger `cargo xtask host`.

mod image;
mod machine;

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rvm_tests::support::archive::Archive;
use rvm_tests::support::kvm::Accelerator;
use rvm_tests::support::shell;

use image::Image;
pub use image::PACKAGES;
use machine::Machine;

/// Where the artefacts appear in the small host: where `rvm` looks for its kernel and agent.
const PREFIX: &str = "usr/local";

/// What to run, and what to take along.
pub struct Job<'a> {
    /// The command and its arguments.
    pub command: &'a [String],
    /// Files and directories of this machine, each to appear as `/add/NAME`.
    pub add: &'a [PathBuf],
    /// Installed rvm, as [`crate::build::artefacts`] leaves it.
    pub artefacts: &'a Path,
    /// Memory of the small host.
    pub memory_mib: u32,
    /// Whether its console is shown, for trouble before the command starts.
    pub show_console: bool,
    /// When to give up.
    pub timeout: Duration,
}

/// Boots the small host, runs the job with its output on ours, and returns the command's exit status.
pub fn run(job: &Job) -> Result<u8> {
    let image = image::image()?;
    let initramfs = assemble(&image, job)?;
    let accelerator = Accelerator::detect();
    Machine { accelerator, kernel: &image.kernel, initramfs, memory_mib: job.memory_mib }
        .run(job.timeout, job.show_console)
}

/// The kernel accepts archives one after the other: first the cached one, then what belongs to this run.
fn assemble(image: &Image, job: &Job) -> Result<File> {
    let memory = memfd_create("initramfs", MFdFlags::MFD_CLOEXEC).context("cannot make a file in memory")?;
    let mut output = BufWriter::new(File::from(memory));
    io::copy(&mut File::open(&image.initramfs)?, &mut output)?;
    let mut archive = Archive::new(output);
    archive.file("command", 0o755, &script(job.command))?;
    archive.directory("usr")?;
    archive.tree(PREFIX, job.artefacts)?;
    archive.directory("add")?;
    for path in job.add {
        let path = fs::canonicalize(path).with_context(|| format!("cannot find {}", path.display()))?;
        archive.tree(added(&path)?.trim_start_matches('/'), &path)?;
    }
    archive.finish()?.into_inner().context("cannot write the initramfs")
}

/// Where a file or directory of this machine appears in the small host.
pub fn added(path: &Path) -> Result<String> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    Ok(format!("/add/{}", name.to_string_lossy()))
}

/// A shell script that runs exactly `words`.
fn script(words: &[String]) -> Vec<u8> {
    let quoted: Vec<_> = words.iter().map(|word| shell::quote(word.as_bytes())).collect();
    [b"#!/bin/busybox sh\nexec ".as_slice(), &quoted.join(&b' '), b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        let words = ["printf", "%s|", "a b", "it's", "$HOME", ""].map(String::from);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("command");
        fs::write(&path, script(&words)).unwrap();
        let output = std::process::Command::new("sh").arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|it's|$HOME||");
    }
}
