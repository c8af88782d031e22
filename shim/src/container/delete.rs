//! `delete`: takes back everything that `create` and `start` have made.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use super::{Container, ContainerError, ContainerId, Folder, ProcessHandle, ProcessIdentity, Status, folder};
use crate::control::{Command, Connection};
use crate::hooks::{self, HookKind};
use crate::logging::Log;
use crate::network;

/// How long a killed monitor may take to end. It has the guest's memory to give back.
const PATIENCE: Duration = Duration::from_secs(30);

/// Deletes a container. With `force`, one that runs is killed, and one that is not there is no error.
pub fn delete(root: &Path, id: &str, force: bool, log: &Log) -> Result<(), ContainerError> {
    let checked: ContainerId = id.parse()?;
    if force {
        // Before the lock is waited for: the command that holds it may be waiting for this very monitor.
        if let Ok(container) = Container::open_damaged(root, id) {
            kill(&container)?;
        }
    }
    let opened =
        if force { Container::open_damaged_locked(root, id) } else { Container::open_locked(root, id) };
    let (container, _lock) = match opened {
        Err(ContainerError::NotFound(_)) if force => return remove_remains(root, &checked),
        result => result?,
    };
    delete_locked(&container, force, log)
}

/// Deletes a container that this command has locked.
pub fn delete_locked(container: &Container, force: bool, log: &Log) -> Result<(), ContainerError> {
    match container.status() {
        Status::Stopped => {}
        // One that was never started has nothing to lose.
        Status::Created => kill(container)?,
        _ if force => kill(container)?,
        status => return Err(ContainerError::NotStopped { id: container.id().to_owned(), status }),
    }
    remove(container, log)
}

/// Removes what is left of a container whose monitor has ended, or is about to.
pub fn remove(container: &Container, log: &Log) -> Result<(), ContainerError> {
    log.debug(format!("{}: removing what it had", container.id()));
    if let Some(monitor) = container.record.monitor.and_then(ProcessIdentity::open) {
        // As long as one of its threads has its taps, what leads to them looks like a later container's.
        await_end(container, &monitor)?;
    }
    disconnect_network(container, log);
    if let Some(cgroup) = &container.record.cgroup {
        // Stubs of `exec` are still in there.
        cgroup.kill_all()?;
        cgroup.remove()?;
    }
    let state = container.record.report(Status::Stopped).to_json();
    if let Err(error) = hooks::run(HookKind::Poststop, &container.record.poststop, &state) {
        // The specification (1.2, lifecycle) has this logged, and the deletion go on.
        log.warning(error.to_string());
    }
    container.folder().remove().map_err(|source| ContainerError::State {
        id: container.id().to_owned(),
        path: container.folder().path().to_owned(),
        source: source.into(),
    })
}

/// Kills the monitor, and with it the machine, and waits for its end.
pub fn kill(container: &Container) -> Result<(), ContainerError> {
    if container.record.monitor.is_none() {
        kill_unknown(container);
    }
    let Some(handle) = container.record.monitor.and_then(ProcessIdentity::open) else { return Ok(()) };
    match handle.signal(libc::SIGKILL) {
        Ok(_) => await_end(container, &handle),
        Err(_) => Err(unkillable(container)),
    }
}

fn await_end(container: &Container, monitor: &ProcessHandle) -> Result<(), ContainerError> {
    monitor.wait(PATIENCE).then_some(()).ok_or_else(|| unkillable(container))
}

fn unkillable(container: &Container) -> ContainerError {
    let pid = container.record.monitor.map_or(0, |monitor| monitor.pid);
    ContainerError::Unkillable { id: container.id().to_owned(), pid }
}

/// Where the record of the monitor is damaged, whoever listens on the socket can still be told. Mostly nobody does.
fn kill_unknown(container: &Container) {
    let _ = Connection::open(&container.folder().socket_path()).and_then(|connection| {
        connection.set_patience(PATIENCE)?;
        connection.order(&Command::Signal { signal: libc::SIGKILL, all: false }, &[])
    });
}

/// A namespace that the monitor made has ended with it; one of the engine's own lives on.
fn disconnect_network(container: &Container, log: &Log) {
    let connected = matches!(container.folder().read(folder::NETWORK), Ok(Some(_)));
    let namespace = container.record.network_namespace.as_ref().filter(|_| connected);
    let Some(namespace) = namespace.and_then(|path| File::open(path).ok()) else { return };
    if let Err(error) = network::disconnect(namespace.as_fd()) {
        log.warning(error.to_string());
    }
}

/// A folder without a record: `create` was killed before it had made anything else.
fn remove_remains(root: &Path, id: &ContainerId) -> Result<(), ContainerError> {
    let path = root.join(id.as_str());
    let result = Folder::open(root, id.as_str()).and_then(|folder| folder.remove());
    match result {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(ContainerError::State { id: id.to_string(), path, source: source.into() })
        }
        _ => Ok(()),
    }
}
