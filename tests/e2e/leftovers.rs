//! The search for leftovers: after every story the host must hold what it held before.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Folders where engines and `rvm` itself let the runtime keep its state.
const STATE_FOLDERS: &[&str] = &[
    "/run/rvm",
    "/run/docker/runtime-rvm/moby",
    "/run/containerd/runc/default",
    "/run/containerd/io.containerd.runtime.v2.task/default",
    "/run/containerd/io.containerd.runtime.v2.task/moby",
    "/var/lib/rvm",
    "/tmp",
];

/// Control groups that engines name as the parent of their containers'. They stay, empty, with every runtime.
const PARENT_CGROUPS: &[&str] = &[
    "/sys/fs/cgroup/docker",
    "/sys/fs/cgroup/default",
    "/sys/fs/cgroup/libpod_parent",
    "/sys/fs/cgroup/libpod_parent/conmon",
];

/// How long engines get to clean up behind a container: they do so after they have answered.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything on the host that a container could leave behind.
#[derive(Debug, Default)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks at processes, mounts, control groups, network devices, namespaces, sockets and files.
    pub fn find() -> Result<Traces> {
        let mut traces = BTreeSet::new();
        add_processes(&mut traces)?;
        add_mounts(&mut traces)?;
        add_cgroups(Path::new("/sys/fs/cgroup"), &mut traces);
        add_entries("network device", "/sys/class/net", &mut traces);
        // Not Docker's /run/docker/netns: dockerd unmounts and removes its files there once a minute.
        add_entries("network namespace", "/run/netns", &mut traces);
        for folder in STATE_FOLDERS {
            add_entries("file", folder, &mut traces);
        }
        // Templates are there to stay.
        traces.retain(|trace| trace != "file /var/lib/rvm/templates");
        add_sockets(&mut traces)?;
        Ok(Traces(traces))
    }
}

/// Fails when the host holds something that it did not hold before, once the engines had time to clean up.
pub fn assert_none_since(before: &Traces) -> Result<()> {
    let start = Instant::now();
    loop {
        let now = Traces::find()?;
        let new: Vec<_> = now.0.difference(&before.0).cloned().collect();
        if new.is_empty() {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "left behind:\n  {}", new.join("\n  "));
        thread::sleep(Duration::from_millis(100));
    }
}

/// Processes of the runtime and of its engines' shims; the kernel's own threads have an empty command line.
fn add_processes(traces: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(command) = fs::read(path.join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let program = command.split(' ').next().unwrap_or_default();
        let of_runtime =
            program.rsplit('/').next().is_some_and(|name| name == "rvm" || name.starts_with("rvm:"));
        if of_runtime || program.contains("containerd-shim") || program.contains("conmon") {
            traces.insert(format!("process {}: {command}", path.display()));
        }
        // A process that has ended but was not collected shows no command line.
        let state = fs::read_to_string(path.join("stat")).unwrap_or_default();
        if state.contains("(rvm") && state.contains(") Z ") {
            traces.insert(format!("zombie {}: {state}", path.display()));
        }
    }
    Ok(())
}

fn add_mounts(traces: &mut BTreeSet<String>) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("the mount table can be read")?;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(3);
        let (root, place) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        // Whoever first makes a network namespace with a name (ip(8), podman) mounts the folder on itself, for good.
        if place == "/run/netns" || place.starts_with("/run/docker/netns/") {
            continue;
        }
        traces.insert(format!("mount {place} of {root}"));
    }
    Ok(())
}

fn add_cgroups(folder: &Path, traces: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if !PARENT_CGROUPS.iter().any(|parent| Path::new(parent) == entry.path()) {
                traces.insert(format!("cgroup {}", entry.path().display()));
            }
            add_cgroups(&entry.path(), traces);
        }
    }
}

fn add_entries(kind: &str, folder: &str, traces: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        traces.insert(format!("{kind} {}", entry.path().display()));
    }
}

fn add_sockets(traces: &mut BTreeSet<String>) -> Result<()> {
    for line in fs::read_to_string("/proc/net/unix")?.lines() {
        // The monitor binds its socket through a descriptor of its folder, so only the last part of the name is telling.
        let of_runtime = |path: &&str| path.contains("rvm") || path.ends_with("/control.sock");
        if let Some(path) = line.split_whitespace().nth(7).filter(of_runtime) {
            traces.insert(format!("socket {path}"));
        }
    }
    Ok(())
}
