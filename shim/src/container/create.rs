//! `create`: from a bundle to a booting machine whose container process waits to be started.
//!
//! Whatever fails on the way, nothing stays: each thing made is entered in [`Undo`], which takes it back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use oci_spec::runtime::{Hook, Hooks, Spec};

use super::folder;
use super::launch::{Launch, LaunchError, MonitorProcess};
use super::liveness::pidfd_open;
use super::shape::{HostSize, Shape};
use super::{Container, ContainerError, ContainerId, Folder, Lock, ProcessIdentity, Record, Status};
use crate::bundle::{Bundle, NetworkNamespace};
use crate::cause::Cause;
use crate::cgroup::{CgroupError, HostCgroup};
use crate::console::{Console, send_descriptor};
use crate::control::WindowSize;
use crate::error::Error;
use crate::hooks::{self, HookError, HookKind};
use crate::install::{InstallError, Installation};
use crate::logging::Log;
use crate::monitor::handshake::{FromMonitor, Setup, ToMonitor};
use crate::seccomp::{self, SeccompError};
use crate::template;
use crate::template::builder::WarmUp;
use crate::timeline::Timeline;

/// Why a container could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The ID or the folder.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Kernel or agent.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The seccomp profile.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The host's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The monitor could not be started or gave up.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A file or a terminal.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the operating system reported.
        source: Cause,
    },
    /// Terminal and console socket do not fit.
    #[error("{0}")]
    Terminal(&'static str),
}

/// Where the container's terminal goes, if its process has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TerminalUse {
    /// To an engine's socket (`--console-socket`).
    Socket(PathBuf),
    /// To the caller, who pumps it.
    Caller(WindowSize),
    /// Nowhere: the command does not stay, and no socket was given.
    Nowhere,
}

/// What to create.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// The root of all containers' folders.
    pub root: &'a Path,
    /// The ID.
    pub id: &'a ContainerId,
    /// The checked bundle.
    pub bundle: Bundle,
    /// What to do with a terminal.
    pub terminal: TerminalUse,
    /// Where to write the monitor's process id.
    pub pid_file: Option<&'a Path>,
    /// Where to send a pidfd of the monitor.
    pub pidfd_socket: Option<&'a Path>,
    /// Whether systemd makes the cgroup.
    pub systemd_cgroup: bool,
    /// A kernel of the user's own.
    pub kernel: Option<&'a Path>,
    /// The folder over which the bundle's root filesystem is to be a throw-away layer.
    pub lower: Option<PathBuf>,
    /// This process, where the container ends with it.
    pub throw_away: Option<ProcessIdentity>,
    /// The log.
    pub log: &'a Log,
    /// What has passed so far.
    pub timeline: Timeline,
}

/// A created container, locked by this command.
#[derive(Debug)]
pub struct Created {
    /// The container.
    pub container: Container,
    /// Its lock.
    pub lock: Lock,
    /// Its monitor, a child of this process.
    pub monitor: MonitorProcess,
    /// The terminal's host end, if the caller asked for it.
    pub master: Option<OwnedFd>,
}

/// Creates a container.
pub fn create(request: CreateRequest<'_>) -> Result<Created, CreateError> {
    let spec = &request.bundle.spec;
    let size = terminal_size(spec, &request.terminal)?;
    // What can fail without a trace comes first.
    let installation = Installation::open(request.kernel)?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let filter = seccomp.map(seccomp::compile).transpose()?.flatten();
    let shape = Shape::of(spec, HostSize::read());

    request.log.debug(format!(
        "{}: {} vCPUs and {} MiB of memory over {}",
        request.id,
        shape.vcpus,
        shape.memory >> 20,
        request.bundle.rootfs.display()
    ));

    let folder = new_folder(request.root, request.id)?;
    let mut undo = Undo::default();
    undo.folder = Some(folder);
    undo.lock = Some(undo.folder()?.lock().map_err(system("cannot lock the container's folder"))?);
    let listener = undo.folder()?.listen().map_err(system("cannot make the control socket"))?;
    let mut record = new_record(&request);
    record.shape = Some(shape);
    record.warm_up = warm_up(&request.bundle, &installation);
    let cgroup = HostCgroup::locate(spec, request.id.as_str(), request.systemd_cgroup)?;
    record.cgroup = Some(cgroup.clone());
    // Before there is anything: `delete --force` finds what a killed `create` has left.
    save(&undo, &record)?;
    cgroup.make(spec)?;
    undo.cgroup = Some(cgroup.clone());
    request.log.debug(format!("{}: the host's cgroup is {:?}", request.id, cgroup.paths()));

    let console = size.map(Console::open).transpose().map_err(system("cannot make a terminal"))?;
    let place = cgroup.open();
    let launch = Launch {
        id: request.id,
        slave: console.as_ref().map(|console| console.slave.as_fd()),
        cgroup: place.as_ref().map(AsFd::as_fd),
    };
    let monitor = undo.monitor.insert(launch.spawn()?);
    cgroup.add_first(monitor.pid().cast_unsigned(), monitor.is_in_cgroup(), spec)?;
    request.log.debug(format!("{}: the monitor is process {}", request.id, monitor.pid()));
    let identity = ProcessIdentity::of(monitor.pid()).map_err(system("the monitor has ended"))?;
    record.monitor = Some(identity);
    let hook_state = record.report(Status::Creating).to_json();

    let setup = Setup {
        id: request.id.to_string(),
        rootfs: request.bundle.rootfs.clone(),
        spec: serde_json::to_string(spec)
            .map_err(|error| system("cannot encode the spec")(io::Error::from(error)))?,
        guest_spec: request.bundle.guest_spec_json(),
        lower: request.lower.clone(),
        terminal: size,
        seccomp: filter,
        shape,
        templates: template::folder(),
        may_go_on: record.warm_up.is_some(),
        disks: request.bundle.disks.clone(),
        network_rates: request.bundle.network_rates,
        hook_state: hook_state.clone(),
        log_format: request.log.format(),
        debug: request.log.is_debug(),
        tied: request.throw_away.is_some(),
        timeline: request.timeline.clone(),
        host_mounts: Vec::new(),
    };
    let handle = Folder::open(request.root, request.id.as_str()).map_err(system("cannot open the folder"))?;
    let mut descriptors =
        vec![handle.as_fd(), listener.as_fd(), installation.kernel.as_fd(), installation.agent.as_fd()];
    descriptors.extend(request.log.file().map(AsFd::as_fd));
    monitor.send(&ToMonitor::Setup(Box::new(setup)), &descriptors)?;
    save(&undo, &record)?;
    proceed(&mut undo, spec, &hook_state)?;
    request.log.debug(format!("{}: created; its machine boots", request.id));

    finish(&request, console.as_ref(), identity)?;
    let Some((folder, lock, monitor)) = undo.disarm() else {
        return Err(system("the container's folder is gone")(nix::errno::Errno::ENOENT));
    };
    let master = console.map(|console| console.master).filter(|_| request.wants_master());
    Ok(Created { container: Container::locked(folder, record), lock, monitor, master })
}

impl CreateRequest<'_> {
    fn wants_master(&self) -> bool {
        matches!(self.terminal, TerminalUse::Caller(_))
    }
}

/// The part that the hooks take part in.
fn proceed(undo: &mut Undo, spec: &Spec, hook_state: &str) -> Result<(), CreateError> {
    let Some(monitor) = undo.monitor.as_mut() else { return Ok(()) };
    monitor.expect(|answer| matches!(answer, FromMonitor::Prepared))?;
    if let Some(hooks) = spec.hooks() {
        undo.poststop = hooks.poststop().clone().unwrap_or_default();
        undo.hook_state = hook_state.to_owned();
        hooks::run(HookKind::Prestart, prestart(hooks), hook_state)?;
        hooks::run(HookKind::CreateRuntime, of(hooks.create_runtime()), hook_state)?;
    }
    monitor.send(&ToMonitor::Continue, &[])?;
    monitor.expect(|answer| matches!(answer, FromMonitor::Ready))?;
    Ok(())
}

/// What the engine gets once all has succeeded.
fn finish(
    request: &CreateRequest<'_>,
    console: Option<&Console>,
    monitor: ProcessIdentity,
) -> Result<(), CreateError> {
    if let (Some(console), TerminalUse::Socket(socket)) = (console, &request.terminal) {
        console.send_master(socket).map_err(|error| match error {
            Error::System { what, source } => CreateError::System { what, source },
            other => CreateError::System {
                what: other.to_string(),
                source: io::Error::from(io::ErrorKind::Other).into(),
            },
        })?;
    }
    if let Some(socket) = request.pidfd_socket {
        send_pidfd(socket, monitor.pid)
            .map_err(system(format!("cannot send a pidfd to {}", socket.display())))?;
    }
    if let Some(path) = request.pid_file {
        write_pid_file(path, monitor.pid)
            .map_err(system(format!("cannot write the pid file {}", path.display())))?;
    }
    Ok(())
}

/// Docker still uses hooks of this deprecated kind.
#[allow(deprecated)]
fn prestart(hooks: &Hooks) -> &[Hook] {
    of(hooks.prestart())
}

fn of(hooks: &Option<Vec<Hook>>) -> &[Hook] {
    hooks.as_deref().unwrap_or_default()
}

fn system<E: Into<Cause>>(what: impl Into<String>) -> impl FnOnce(E) -> CreateError {
    let what = what.into();
    move |error| CreateError::System { what, source: error.into() }
}

/// The size of the terminal that is to be made, if one is.
fn terminal_size(spec: &Spec, wanted: &TerminalUse) -> Result<Option<WindowSize>, CreateError> {
    let process = spec.process().as_ref();
    if !process.and_then(|process| process.terminal()).unwrap_or(false) {
        return match wanted {
            TerminalUse::Socket(_) => Err(CreateError::Terminal(
                "a console socket was given, but the container's process has no terminal (process.terminal)",
            )),
            _ => Ok(None),
        };
    }
    let asked = process.and_then(|process| process.console_size()).map(|size| WindowSize::from(&size));
    match wanted {
        TerminalUse::Nowhere => {
            Err(CreateError::Terminal("the container's process has a terminal: give a --console-socket"))
        }
        TerminalUse::Socket(_) => Ok(Some(asked.unwrap_or_default())),
        TerminalUse::Caller(size) => Ok(Some(asked.unwrap_or(*size))),
    }
}

fn new_folder(root: &Path, id: &ContainerId) -> Result<Folder, CreateError> {
    Folder::create(root, id.as_str()).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => ContainerError::Exists(id.to_string()).into(),
        _ => {
            let path = root.join(id.as_str());
            system(format!("cannot make the folder {}", path.display()))(source)
        }
    })
}

fn new_record(request: &CreateRequest<'_>) -> Record {
    let spec = &request.bundle.spec;
    let hooks = spec.hooks().as_ref();
    Record {
        id: request.id.to_string(),
        bundle: request.bundle.path.clone(),
        rootfs: request.bundle.rootfs.clone(),
        monitor: None,
        created: Timestamp::now(),
        annotations: spec.annotations().clone().unwrap_or_default().into_iter().collect(),
        owner: nix::unistd::geteuid().as_raw(),
        cgroup: None,
        poststart: hooks.and_then(|hooks| hooks.poststart().clone()).unwrap_or_default(),
        poststop: hooks.and_then(|hooks| hooks.poststop().clone()).unwrap_or_default(),
        network_namespace: match request.bundle.network_namespace() {
            NetworkNamespace::Existing(path) => Some(path),
            NetworkNamespace::New => None,
        },
        process: spec.process().clone(),
        shape: None,
        warm_up: None,
        throw_away: request.throw_away,
    }
}

/// A machine with disks is of a shape that hardly another one has.
fn warm_up(bundle: &Bundle, installation: &Installation) -> Option<WarmUp> {
    let folder = template::folder().filter(|_| bundle.may_use_template && bundle.disks.is_empty())?;
    WarmUp::new(folder, installation).ok()
}

fn save(undo: &Undo, record: &Record) -> Result<(), CreateError> {
    let folder = undo.folder()?;
    let what = format!("cannot save the container's state in {} (is there space?)", folder.path().display());
    folder.write_json(folder::RECORD, record).map_err(system(what))
}

/// Sends a descriptor of a process to whoever listens on the socket.
pub fn send_pidfd(socket: &Path, pid: i32) -> io::Result<()> {
    send_descriptor(socket, b"pidfd", pidfd_open(pid)?.as_fd())
}

/// Writes a process id so that a reader finds the whole number or no file. Engines want no newline.
pub fn write_pid_file(path: &Path, pid: i32) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let temporary = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let result = std::fs::write(&temporary, pid.to_string()).and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// What a failed `create` takes back, last made first.
#[derive(Default)]
struct Undo {
    folder: Option<Folder>,
    /// Given back when all else is undone, so that no other command sees a half.
    lock: Option<Lock>,
    cgroup: Option<HostCgroup>,
    monitor: Option<MonitorProcess>,
    poststop: Vec<Hook>,
    hook_state: String,
}

impl Undo {
    fn folder(&self) -> Result<&Folder, CreateError> {
        self.folder
            .as_ref()
            .ok_or_else(|| system("the container's folder is gone")(nix::errno::Errno::ENOENT))
    }

    fn disarm(mut self) -> Option<(Folder, Lock, MonitorProcess)> {
        self.cgroup = None;
        self.poststop.clear();
        Some((self.folder.take()?, self.lock.take()?, self.monitor.take()?))
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // The error that led here is what the user gets to see; what goes wrong now can only be passed over.
        if let Some(mut monitor) = self.monitor.take() {
            monitor.kill();
        }
        if let Some(cgroup) = self.cgroup.take() {
            // A hook may have put a process there.
            let _ = cgroup.kill_all();
            let _ = cgroup.remove();
        }
        if !self.poststop.is_empty() {
            let _ = hooks::run(HookKind::Poststop, &self.poststop, &self.hook_state);
        }
        if let Some(folder) = self.folder.take() {
            let _ = folder.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(process: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","process":{process}}}"#)).unwrap()
    }

    #[test]
    fn the_pid_file_holds_the_number_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        write_pid_file(&path, 4711).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4711");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_pid_file(&folder.path().join("absent/pid"), 1).is_err());
    }

    #[test]
    fn terminal_and_console_socket_have_to_fit() {
        let with = spec(
            r#"{"terminal":true,"cwd":"/","user":{"uid":0,"gid":0},"consoleSize":{"height":5,"width":9}}"#,
        );
        let without = spec(r#"{"cwd":"/","user":{"uid":0,"gid":0}}"#);
        let socket = TerminalUse::Socket("/c.sock".into());
        let size = Some(WindowSize { rows: 5, columns: 9 });
        assert_eq!(terminal_size(&with, &socket).unwrap(), size);
        assert_eq!(terminal_size(&without, &TerminalUse::Nowhere).unwrap(), None);
        assert!(terminal_size(&with, &TerminalUse::Nowhere).is_err());
        assert!(terminal_size(&without, &socket).is_err());
    }
}
