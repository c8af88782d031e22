//! Booting the test host and ending it.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::HostConfig;
use super::artefacts;
use super::image::Image;
use super::qemu::{Machine, Store};
use super::qmp::Qmp;
use super::recipe::LOADED_IMAGES;
use super::ssh::Ssh;
use crate::support::kvm::Accelerator;
use crate::support::progress::Progress;
use crate::support::{cache, process};

/// A boot that takes longer than this hangs, on the slowest machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// An end that takes longer than this does not come.
const END_LIMIT: Duration = Duration::from_secs(60);

/// What the test host prints on its console once every service answers.
const READY: &str = "rvm-host: ready";

/// Boots `image` and waits until its services answer. Returns the port of its ssh, which is also left in `run`.
pub fn boot(image: &Image, run: &Path, config: &HostConfig, persistent: bool) -> Result<u16> {
    // One that was interrupted while it booted may still run.
    stop(run)?;
    let accelerator = Accelerator::detect();
    let how = if accelerator == Accelerator::Kvm { "on KVM" } else { "on a software processor" };
    let progress = Progress::spinner(&format!("Booting the test host {how}"));
    let share = cache::cache_dir();
    let installed = artefacts::stamp(&cache::artefacts_dir())?;
    let ssh_port = free_port()?;
    let machine = Machine {
        accelerator,
        system: &image.system,
        store: Store { file: &image.store, persistent },
        archives: &image.archives,
        run,
        share: &share,
        ssh_port,
        memory_mib: config.memory_mib,
    };
    process::run(&mut machine.command())?;
    wait_until_ready(run, &progress)?;
    // The host has installed them while it booted; if they changed meanwhile, the stamp is of the older ones.
    artefacts::note_installed(run, &installed)?;
    fs::write(run.join("port"), ssh_port.to_string()).context("cannot note the test host's port")?;
    progress.finish();
    Ok(ssh_port)
}

/// Ends the host in `run` at once; whatever it was doing is lost. Returns whether one ran.
pub fn stop(run: &Path) -> Result<bool> {
    let ran = match Qmp::connect(&Machine::control_socket(run)) {
        Ok(mut control) => {
            // QEMU may be gone before its answer is.
            let _ = control.execute("quit");
            wait_for_end(control, run)?;
            true
        }
        Err(_) => false,
    };
    end_remains(run)?;
    Ok(ran)
}

/// Has the engines of the host in `run` finish with their disk, so that it can be kept, and ends the host.
pub fn keep_store(ssh: &Ssh, run: &Path) -> Result<()> {
    ssh.run(["/usr/lib/rvm-host/close-store"])?;
    stop(run).map(drop)
}

/// Has every engine of the test host load the container images.
pub fn load_images(ssh: &Ssh) -> Result<()> {
    let progress = Progress::spinner("Loading the container images");
    for (name, engines) in LOADED_IMAGES {
        progress.note(name);
        ssh.run(["load-image", name].iter().chain(*engines))?;
    }
    progress.finish();
    Ok(())
}

/// Waits until QEMU has closed its disks: it removes its pid file after that, as the last thing it does.
fn wait_for_end(control: Qmp, run: &Path) -> Result<()> {
    control.wait_for_end();
    let started = Instant::now();
    while Machine::pid_file(run).exists() {
        if started.elapsed() > END_LIMIT {
            bail!("the test host was told to end and did not in {} s", END_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Removes what an ended host left in its directory, all but the lock, which the caller may hold.
fn end_remains(run: &Path) -> Result<()> {
    for entry in fs::read_dir(run).with_context(|| format!("cannot list {}", run.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != "lock") {
            // An ssh that notices the end removes its socket itself, perhaps right now.
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

fn wait_until_ready(run: &Path, progress: &Progress) -> Result<()> {
    let console = Machine::console_log(run);
    let started = Instant::now();
    loop {
        let log = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
        if log.contains(READY) {
            return Ok(());
        }
        let last: Vec<_> = log.lines().collect();
        let last = last[last.len().saturating_sub(20)..].join("\n");
        if !Qmp::is_alive(&Machine::control_socket(run)) {
            bail!("the test host ended while it booted. Its console's last lines:\n{last}");
        }
        if started.elapsed() > BOOT_LIMIT {
            stop(run)?;
            bail!(
                "the test host did not come up in {} s. Its console's last lines:\n{last}",
                BOOT_LIMIT.as_secs()
            );
        }
        progress.note(last.lines().last().unwrap_or_default());
        std::thread::sleep(Duration::from_millis(100));
    }
}
