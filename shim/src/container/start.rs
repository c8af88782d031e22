//! `start`: connects the network as it is now, and has the guest execute the container's program.
//!
//! Engines plumb the network between `create` and `start`, or by hooks during `create`; so it is read here and
//! no earlier. Reading it needs rights that the monitor has given up, hence this command does it.

use std::fs::File;
use std::os::fd::AsFd;

use super::{Container, ContainerError, Status, folder};
use crate::cause::Cause;
use crate::control::{Command, Connection, ControlError, Refusal};
use crate::hooks::{self, HookError, HookKind};
use crate::logging::Log;
use crate::network::follow::{self, Assignment};
use crate::network::{self, Connected, NetworkError};
use crate::timeline;

/// Why a container could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The container cannot be reached.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// It runs already.
    #[error("cannot start an already running container")]
    Running,
    /// It has ended.
    #[error("cannot start a container that has stopped")]
    Stopped,
    /// It ended before it was started, because its machine failed.
    #[error("cannot start a container that has stopped: {0}")]
    Failed(String),
    /// Its namespace cannot be opened.
    #[error("cannot open the container's network namespace: {0}")]
    Namespace(Cause),
    /// That it is connected cannot be recorded.
    #[error("cannot write the container's state (is there space?): {0}")]
    Record(Cause),
    /// Its network cannot be connected.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The guest refused. Its words are the user's: engines derive exit statuses from them.
    #[error("{0}")]
    Refused(Refusal),
    /// A hook failed, and the container was killed.
    #[error(transparent)]
    Hook(#[from] HookError),
}

/// Starts a created container that this command has locked.
pub fn start(container: &Container, log: &Log) -> Result<(), StartError> {
    match container.status() {
        Status::Created => {}
        Status::Running | Status::Paused => return Err(StartError::Running),
        Status::Creating | Status::Stopped => {
            return Err(container.last_words().map_or(StartError::Stopped, StartError::Failed));
        }
    }
    let connection = container.connect()?;
    let namespace = open_network(container)?;
    let connected = network::connect(namespace.as_fd())?;
    let connected_at = timeline::now();
    for interface in &connected.wiring.config.interfaces {
        log.debug(format!("{}: connected {} ({:?})", container.id(), interface.name, interface.addresses));
    }
    let oom_reports = prepare_oom_reports(container, log);
    let command = Command::Start { wiring: connected.wiring.clone(), connected_at };
    ask(container, &connection, &command, &connected.taps, oom_reports)?;
    follow_network(container, connected, &namespace, log);
    warm_up(container, log);
    let state = container.record.report(Status::Running).to_json();
    hooks::run(HookKind::Poststart, &container.record.poststart, &state).inspect_err(|_| {
        // The specification (1.2, lifecycle) has the container stopped when one of these hooks fails.
        let _ = container.monitor().map(|monitor| monitor.signal(libc::SIGKILL));
    })?;
    Ok(())
}

fn open_network(container: &Container) -> Result<File, StartError> {
    let monitor = container.monitor()?;
    if container.record.network_namespace.is_some() {
        // Before anything is connected: tells `delete` that there may be something to take back.
        container.folder().write(folder::NETWORK, b"").map_err(|error| StartError::Record(error.into()))?;
    }
    File::open(format!("/proc/{}/ns/net", monitor.pid)).map_err(|error| StartError::Namespace(error.into()))
}

/// A container that is connected with nothing stays so: engines give such a namespace no network later.
fn follow_network(container: &Container, connected: Connected, namespace: &File, log: &Log) {
    if connected.wiring.devices.is_empty() {
        return;
    }
    let assignment =
        Assignment { id: container.id().to_owned(), wiring: connected.wiring, log_format: log.format() };
    let followed = container.connect().map_err(|error| error.to_string()).and_then(|connection| {
        let cgroup = container.record.cgroup.as_ref();
        follow::spawn(&assignment, cgroup, &connection, namespace.as_fd(), log)
            .map_err(|error| error.to_string())
    });
    if let Err(error) = followed {
        // It runs; that it cannot be connected with further networks is no reason to end it.
        log.warning(format!("later changes of the network will not reach the guest: {error}"));
    }
}

/// The next container like this one need not boot.
fn warm_up(container: &Container, log: &Log) {
    if let (Some(warm_up), Some(shape)) = (&container.record.warm_up, container.record.shape)
        && let Err(error) = warm_up.begin(shape, log)
    {
        log.warning(format!("no template is made, so containers of this shape boot: {error}"));
    }
}

/// By now the engine knows the cgroup whose counters it watches. A container without a limit has a whole machine to fill,
/// which is nobody's limit.
fn prepare_oom_reports(container: &Container, log: &Log) -> Option<File> {
    container.record.shape.and_then(|shape| shape.memory_limit)?;
    let prepared = container.record.cgroup.as_ref()?.prepare_oom_reports();
    prepared
        .inspect_err(|error| {
            log.warning(format!("kills for want of memory will not be told to the engine: {error}"));
        })
        .ok()
        .flatten()
}

fn ask(
    container: &Container,
    connection: &Connection,
    command: &Command,
    taps: &[impl AsFd],
    oom_reports: Option<File>,
) -> Result<(), StartError> {
    let descriptors: Vec<_> =
        taps.iter().map(AsFd::as_fd).chain(oom_reports.as_ref().map(AsFd::as_fd)).collect();
    connection.order(command, &descriptors).map_err(|error| match error {
        ControlError::Refused(refusal) => StartError::Refused(refusal),
        error => container.conversation_failed(error).into(),
    })
}
