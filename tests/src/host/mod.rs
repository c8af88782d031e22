//! The test host: a Debian system with a genuine KVM, Docker, containerd and podman, on any machine.
//!
//! Where the machine has KVM with nested virtualisation it runs on that; elsewhere QEMU's software processor emulates
//! one with SVM and nested paging, in which the system's kvm_amd works as on hardware, only slower. The host boots when
//! it is first needed, serves any number of commands at once, and ends when idle. Its disk forgets everything then.

mod artefacts;
mod boot;
mod image;
mod initramfs;
mod qemu;
mod qmp;
mod recipe;
mod ssh;
mod store;
mod suite;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result};

use crate::support::{cache, packages};
use image::Image;
pub use image::TOOLS as PACKAGES;
use qemu::Machine;
use qmp::Qmp;
use ssh::Ssh;
pub use suite::Suite;

/// How the test host is booted, where it does not run yet.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Hosts of different numbers run side by side. Commands of users go to number 0.
    pub number: usize,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self { memory_mib: 6144, number: 0 }
    }
}

impl HostConfig {
    /// How many hosts of this size this machine carries side by side.
    pub fn side_by_side(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_mib(&text)).unwrap_or(0);
        fitting(processors, memory, self.memory_mib)
    }

    /// Names the running host, so that hosts of different images or configurations do not get in each other's way.
    fn name(&self) -> String {
        let (system, store) = (recipe::key().hex(), recipe::store_key().hex());
        format!("{system}-{store}-{}-{}", self.memory_mib, self.number)
    }
}

/// What QEMU takes for a host beside its memory: above all the buffer of translated code.
const OVERHEAD_MIB: u64 = 1536;

/// What stays for the build machine itself.
const RESERVE_MIB: u64 = 2048;

fn fitting(processors: usize, memory_mib: u64, each_mib: u32) -> usize {
    let by_memory = memory_mib.saturating_sub(RESERVE_MIB) / (u64::from(each_mib) + OVERHEAD_MIB);
    usize::try_from(by_memory).unwrap_or(usize::MAX).min(processors).max(1)
}

fn total_mib(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

/// A running test host.
#[derive(Clone, Debug)]
pub struct Host {
    ssh: Ssh,
}

impl Host {
    /// The running test host, booted (and before that, its image made) when there is none, with the newest artefacts.
    pub fn ensure() -> Result<Self> {
        Self::ensure_with(&HostConfig::default())
    }

    /// As [`Host::ensure`], with a configuration of one's own: hosts of different configurations run side by side.
    pub fn ensure_with(config: &HostConfig) -> Result<Self> {
        let image = image::ensure(|image| load_container_images(image, config))?;
        let run = runtime_dir().join(config.name());
        let _lock = cache::lock(&run.join("lock"))?;
        let port = match running_port(&run) {
            Some(port) => port,
            None => boot::boot(&image, &run, config, false)?,
        };
        let host = Self { ssh: Ssh::new(&image.system, &run, port) };
        host.ssh.connect()?;
        host.install_artefacts(&run)?;
        Ok(host)
    }

    /// The running test host as it is, with whatever artefacts it has.
    pub fn as_it_runs() -> Result<Self> {
        let config = HostConfig::default();
        let image = image::ensure(|image| load_container_images(image, &config))?;
        let run = runtime_dir().join(config.name());
        let port = running_port(&run).context("the test host is not up yet: try again in a minute")?;
        Ok(Self { ssh: Ssh::new(&image.system, &run, port) })
    }

    /// A command that runs `words` in the test host as root, in /root. Its stdin, stdout, stderr and exit status are
    /// the far command's (128+N for one that a signal N ended; 255 if the connection is lost).
    pub fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        self.ssh.command(words, false)
    }

    /// As [`Host::command`], on a terminal that follows the caller's in size and type.
    pub fn terminal<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        self.ssh.command(words, true)
    }

    /// Runs `words` in the test host to their end, with nothing on stdin.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut command = self.command(words);
        command.stdin(std::process::Stdio::null()).output().context("cannot start ssh")
    }

    /// Ends every test host of this cache; returns how many there were.
    pub fn stop_all() -> Result<usize> {
        let mut stopped = 0;
        let Ok(entries) = fs::read_dir(runtime_dir()) else {
            return Ok(0);
        };
        for entry in entries {
            let run = entry?.path();
            stopped += usize::from(boot::stop(&run)?);
        }
        Ok(stopped)
    }

    fn install_artefacts(&self, run: &Path) -> Result<()> {
        let stamp = artefacts::stamp(&cache::artefacts_dir())?;
        if artefacts::is_installed(run, &stamp) {
            return Ok(());
        }
        self.ssh.run(["/usr/lib/rvm-host/install-artefacts"])?;
        artefacts::note_installed(run, &stamp)
    }
}

/// Fails, and says what to run instead, where the test host's image is yet to be made and the caller is not root: known
/// at once instead of after half an hour.
pub fn may_make_image() -> Result<()> {
    if !nix::unistd::geteuid().is_root() && image::needs_root() {
        anyhow::bail!(
            "the test host's image is made by debootstrap, which needs root. Run all of it as root:\n\n    {}\n\n\
             `cargo xtask check` runs what needs no root.",
            packages::again_as_root()
        );
    }
    Ok(())
}

/// Boots an image whose engines' disk is empty, and has every engine load the container images.
fn load_container_images(image: &Image, config: &HostConfig) -> Result<()> {
    let run = runtime_dir().join("load");
    let _lock = cache::lock(&run.join("lock"))?;
    let port = boot::boot(image, &run, config, true)?;
    let ssh = Ssh::new(&image.system, &run, port);
    let loaded =
        ssh.connect().and_then(|()| boot::load_images(&ssh)).and_then(|()| boot::keep_store(&ssh, &run));
    // After a failure the host still runs; the error that matters is the first.
    let stopped = boot::stop(&run);
    loaded.and(stopped.map(drop))
}

/// The port of the host that runs in `run`, if one does and had come up in full.
fn running_port(run: &Path) -> Option<u16> {
    let port = fs::read_to_string(run.join("port")).ok()?.trim().parse().ok()?;
    Qmp::is_alive(&Machine::control_socket(run)).then_some(port)
}

/// Where sockets lie: a short path, because a socket's is limited to 107 bytes, and gone with the machine's boot.
fn runtime_dir() -> PathBuf {
    let base = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/run")
    } else {
        std::env::var_os("XDG_RUNTIME_DIR").map_or_else(cache::cache_dir, PathBuf::from)
    };
    base.join("rvm-test-host").join(image::cache_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_hosts_run_as_have_a_processor_and_memory() {
        assert_eq!(total_mib("MemFree: 1 kB\nMemTotal:       24576000 kB\n"), Some(24_000));
        assert_eq!(fitting(2, 24_000, 6144), 2);
        assert_eq!(fitting(16, 24_000, 6144), 2);
        assert_eq!(fitting(1, 24_000, 6144), 1);
        assert_eq!(fitting(2, 8_000, 6144), 1);
    }
}
