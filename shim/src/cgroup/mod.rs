//! The container's cgroup on the host: what its virtual machine and monitor may use, and what engines measure.
//!
//! The workload's limits are set in the guest, where it feels them. Those here hold a guest that broke out of its
//! kernel's limits; so memory is that of the whole machine, and the number of processes is not limited: only the
//! monitor's own threads would be counted.

mod layout;
pub mod limits;
mod oom;
mod systemd;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::cause::Cause;
use crate::container::shape::ProcessorTime;
use layout::Layout;
use limits::{ControlFile, Setting};
use systemd::Scope;

const PROCESSES: &str = "cgroup.procs";

/// Why a cgroup could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has none.
    #[error("the host has no cgroups mounted under /sys/fs/cgroup")]
    None,
    /// What is mounted could not be found out.
    #[error("cannot find out the host's cgroups: {0}")]
    Unknown(Cause),
    /// systemd does not do what it was asked for.
    #[error("--systemd-cgroup: systemd: {0}")]
    Systemd(String),
    /// The path is not of the form that names a scope.
    #[error("linux.cgroupsPath: `{0}` is not of the form SLICE:PREFIX:NAME, which --systemd-cgroup needs")]
    SystemdPath(String),
    /// Version 1 knows no delegation.
    #[error("--systemd-cgroup needs cgroup version 2; on this host, use the engine's cgroupfs driver")]
    SystemdVersion,
    /// The path is that of a whole hierarchy.
    #[error("linux.cgroupsPath: {0} is the root of all cgroups; name one below it")]
    Root(PathBuf),
    /// Somebody is in there already.
    #[error("the cgroup {path} is in use: {count} processes are in it", path = path.display())]
    Busy {
        /// The cgroup.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// A limit's controller is not there.
    #[error("linux.resources: {file} cannot be set, since {path} has no such control", path = path.display())]
    Unavailable {
        /// Name of the control.
        file: &'static str,
        /// The cgroup.
        path: PathBuf,
    },
    /// The kernel refused a limit.
    #[error("linux.resources: cannot set {file} to `{value}`: {cause}")]
    Refused {
        /// Name of the control.
        file: &'static str,
        /// The value.
        value: String,
        /// Why.
        cause: Cause,
    },
    /// Anything else.
    #[error("cannot {what} the cgroup {path}: {cause}", path = path.display())]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
}

/// A cgroup: one directory in each hierarchy. It is kept in the container's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCgroup {
    version: Version,
    directories: Vec<Directory>,
    /// The unit, if systemd is to make it.
    #[serde(default)]
    scope: Option<Scope>,
}

/// Controls with their contents.
#[derive(Clone, Debug)]
pub struct Snapshot(Vec<(PathBuf, String)>);

/// The kernel's two interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Version {
    V1,
    V2,
}

/// A cgroup's directory in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Directory {
    /// The controllers of the hierarchy; of version 2 there is only one, which has all.
    controllers: BTreeSet<String>,
    path: PathBuf,
}

impl HostCgroup {
    /// Where the cgroup that a description asks for will be; so far nothing is made. One that is in use already is
    /// refused: whoever records this cgroup may kill what is in it.
    pub fn locate(spec: &Spec, id: &str, systemd: bool) -> Result<HostCgroup, CgroupError> {
        let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
        let scope = systemd.then(|| Scope::of(path, id)).transpose()?;
        let inner = scope.as_ref().map(Scope::path);
        let mut cgroup = Layout::read()?.locate(inner.as_deref().or(path), id)?;
        if scope.is_some() && cgroup.version == Version::V1 {
            return Err(CgroupError::SystemdVersion);
        }
        cgroup.scope = scope;
        cgroup.require_unused()?;
        Ok(cgroup)
    }

    /// Makes the located cgroup with the limits of its description, unless systemd is to do that. On failure nothing
    /// of it remains.
    pub fn make(&self, spec: &Spec) -> Result<(), CgroupError> {
        match self.scope {
            Some(_) => Ok(()),
            None => self.make_in(&Layout::read()?, resources_of(spec)),
        }
    }

    /// Moves the first process into the cgroup, unless it is there already. systemd makes a scope for it, which has the
    /// limits from then on.
    pub fn add_first(&self, pid: u32, is_there: bool, spec: &Spec) -> Result<(), CgroupError> {
        let Some(scope) = &self.scope else { return if is_there { Ok(()) } else { self.add(pid) } };
        let limits = resources_of(spec).map(|resources| self.settings(resources)).unwrap_or_default();
        scope.start(pid, &limits)?;
        systemd::wait_until(|| self.pids().is_ok_and(|pids| pids.contains(&pid)))?;
        // Exactly, and also those that systemd does not know.
        self.set_all(&limits)
    }

    fn make_in(&self, layout: &Layout, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        let mut made = Vec::new();
        let result = self
            .make_directories(layout, &mut made)
            .and_then(|()| resources.map_or(Ok(()), |resources| self.update(resources)));
        match result {
            Ok(()) => Ok(()),
            Err(error) => {
                // The first error counts; a directory that somebody else uses by now stays.
                made.iter().rev().for_each(|path| drop(fs::remove_dir(path)));
                Err(error)
            }
        }
    }

    fn require_unused(&self) -> Result<(), CgroupError> {
        for Directory { path, .. } in &self.directories {
            let count = processes_below(path).map_or(0, |processes| processes.len());
            if count > 0 {
                return Err(CgroupError::Busy { path: path.clone(), count });
            }
        }
        Ok(())
    }

    fn make_directories(&self, layout: &Layout, made: &mut Vec<PathBuf>) -> Result<(), CgroupError> {
        self.require_unused()?;
        for Directory { path, .. } in &self.directories {
            layout.make_directory(path, made).map_err(|error| failed("make", path, error))?;
        }
        Ok(())
    }

    /// The directory that a process can be forked into: there is one with version 2.
    pub fn open(&self) -> Option<File> {
        let directory = self.directories.first().filter(|_| self.version == Version::V2)?;
        File::open(self.members(&directory.path)).ok()
    }

    /// Moves a process, with all its threads, into the cgroup.
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        for Directory { path, .. } in &self.directories {
            write(&self.members(path).join(PROCESSES), &pid.to_string())
                .map_err(|error| failed("put a process into", path, error))?;
        }
        Ok(())
    }

    /// Sets limits; those that are not given stay as they are.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let limits = self.settings(resources);
        if let Some(scope) = &self.scope {
            scope.update(&limits)?;
        }
        self.set_all(&limits)
    }

    /// Some limits bound each other (memory with swap, quota with burst), so that the order in which they can be set
    /// depends on where they stand: what fails is tried again after the others.
    fn set_all(&self, limits: &[Setting]) -> Result<(), CgroupError> {
        let again: Vec<_> = limits.iter().filter(|setting| self.set(setting).is_err()).collect();
        again.into_iter().try_for_each(|setting| self.set(setting))
    }

    fn settings(&self, resources: &LinuxResources) -> Vec<Setting> {
        match self.version {
            Version::V1 => limits::version1(resources),
            Version::V2 => {
                let current = self.directories.first().map(|directory| directory.path.join("cpu.max"));
                limits::version2(resources, current.and_then(|path| fs::read_to_string(path).ok()).as_deref())
            }
        }
    }

    /// The processor time that is allowed.
    pub fn processor_time(&self) -> Option<ProcessorTime> {
        let folder = &self.with_controller("cpu")?.path;
        let read = |name| fs::read_to_string(folder.join(name)).ok();
        limits::processor_time(&match self.version {
            Version::V1 => format!("{} {}", read("cpu.cfs_quota_us")?.trim(), read("cpu.cfs_period_us")?),
            Version::V2 => read("cpu.max")?,
        })
    }

    /// The controls that an update with these limits would change, as they stand.
    pub fn snapshot(&self, resources: &LinuxResources) -> Snapshot {
        let settings = self.settings(resources);
        let controls = settings.iter().filter_map(|setting| self.control(setting)).map(|(path, _)| path);
        Snapshot(
            controls.filter_map(|path| fs::read_to_string(&path).ok().map(|text| (path, text))).collect(),
        )
    }

    /// Sets controls back, as far as that is possible: it follows another error, which is the one to be told.
    pub fn restore(&self, snapshot: &Snapshot) {
        // Twice, for the reason that `update` has.
        for (path, text) in snapshot.0.iter().rev().chain(&snapshot.0) {
            for line in text.lines() {
                let _ = write(path, line);
            }
        }
    }

    fn set(&self, setting: &Setting) -> Result<(), CgroupError> {
        let Some((path, file)) = self.control(setting) else { return self.unavailable(setting) };
        write(&path, &file.value).map_err(|error| CgroupError::Refused {
            file: file.name,
            value: file.value.clone(),
            cause: error.into(),
        })
    }

    /// The form of a control that this kernel has.
    fn control<'a>(&self, setting: &'a Setting) -> Option<(PathBuf, &'a ControlFile)> {
        let directory = self.with_controller(setting.controller)?;
        let mut forms = setting.files.iter().map(|file| (directory.path.join(file.name), file));
        forms.find(|(path, _)| path.exists())
    }

    fn unavailable(&self, setting: &Setting) -> Result<(), CgroupError> {
        match setting.files.first().filter(|_| setting.required) {
            None => Ok(()),
            Some(file) => {
                let path = self.paths().into_iter().next().unwrap_or_default();
                Err(CgroupError::Unavailable { file: file.name, path })
            }
        }
    }

    fn with_controller(&self, controller: &str) -> Option<&Directory> {
        match self.version {
            Version::V1 => {
                self.directories.iter().find(|directory| directory.controllers.contains(controller))
            }
            Version::V2 => self.directories.first(),
        }
    }

    /// The processes in the cgroup and below it.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut all = BTreeSet::new();
        for Directory { path, .. } in &self.directories {
            match processes_below(path) {
                Ok(processes) => all.extend(processes),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(failed("list the processes of", path, error)),
            }
        }
        Ok(all.into_iter().collect())
    }

    /// The directories, where usage can be read; with version 2 there is one.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|directory| directory.path.clone()).collect()
    }

    /// Kills every process in the cgroup. They may still be ending when this returns; [`Self::remove`] waits.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        for Directory { path, .. } in &self.directories {
            match write(&path.join("cgroup.kill"), "1") {
                Ok(()) => return Ok(()),
                // Version 1 and kernels before 5.14 have no such control, and a removed cgroup has none either.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(failed("kill the processes of", path, error)),
            }
        }
        // A process may fork between the list and its end: each round finds fewer.
        for _ in 0..KILL_ROUNDS {
            let processes = self.pids()?;
            if processes.is_empty() {
                break;
            }
            for pid in processes {
                match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => {
                        let path = self.paths().into_iter().next().unwrap_or_default();
                        return Err(failed("kill the processes of", &path, errno.into()));
                    }
                }
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Removes the cgroup, once its processes have ended; that it is gone already is fine.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for Directory { path, .. } in &self.directories {
            remove_patiently(path).map_err(|error| failed("remove", path, error))?;
        }
        Ok(())
    }
}

fn resources_of(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
}

const PAUSE: Duration = Duration::from_millis(10);
const KILL_ROUNDS: usize = 100;
/// Killed processes leave their cgroup only when the kernel has freed their memory.
const REMOVE_ATTEMPTS: usize = 300;

fn remove_patiently(path: &Path) -> io::Result<()> {
    for _ in 1..REMOVE_ATTEMPTS {
        match remove_tree(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(PAUSE),
            result => return result,
        }
    }
    remove_tree(path)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path).unwrap_or_default() {
        remove_tree(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if is_gone(&error) => Ok(()),
        result => result,
    }
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn processes_below(path: &Path) -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(path.join(PROCESSES))?;
    // Processes of another pid namespace are 0: nobody here can have put them there.
    let mut processes: Vec<u32> =
        text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect();
    for child in children(path)? {
        match processes_below(&child) {
            Ok(more) => processes.extend(more),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(processes)
}

/// A control is written in one call, and never made: a missing one has to be noticed.
fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn failed(what: &'static str, path: &Path, error: io::Error) -> CgroupError {
    CgroupError::Failed { what, path: path.into(), cause: error.into() }
}
