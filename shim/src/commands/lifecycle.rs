//! `create`, `start`, `kill`, `delete`, `pause`, `resume`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::{Context, refuse_descriptors};
use crate::bundle::Bundle;
use crate::container::create::{self, CreateRequest, Created, TerminalUse};
use crate::container::{
    Container, ContainerError, ProcessIdentity, Status, delete as deletion, start as starting,
};
use crate::control;
use crate::error::Error;
use crate::signals;

/// How long the monitor may take to answer before SIGKILL is done without it.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub(super) struct IdArgument {
    /// The container's ID
    #[arg(value_name = "ID")]
    pub id: String,
}

/// What `create` and `run` share.
#[derive(Debug, Args)]
pub(super) struct CreateArguments {
    /// The bundle: a directory with a config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// A unix socket to which the host's end of the container's terminal is sent
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Where to write the process id of the container's monitor
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// A unix socket to which a pidfd of the container's monitor is sent
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Accepted for compatibility, without effect
    #[arg(long, hide = true)]
    pub no_pivot: bool,
    /// Accepted for compatibility, without effect
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    /// Accepted for compatibility; only 0 is possible
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub preserve_fds: u32,
    /// A new ID for the container
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub(super) struct KillArguments {
    /// Signal all processes of the container
    #[arg(short, long)]
    all: bool,
    /// The container's ID
    #[arg(value_name = "ID")]
    id: String,
    /// The signal: its name, with or without SIG, or its number
    #[arg(value_name = "SIGNAL", default_value = "TERM")]
    signal: String,
}

#[derive(Debug, Args)]
pub(super) struct DeleteArguments {
    /// Kill the container first if it runs; one that is not there is no error
    #[arg(short, long)]
    force: bool,
    /// The container's ID
    #[arg(value_name = "ID")]
    id: String,
}

pub(super) fn create(context: &Context, arguments: CreateArguments) -> Result<(), Error> {
    let terminal = arguments.console_socket.clone().map_or(TerminalUse::Nowhere, TerminalUse::Socket);
    let bundle = Bundle::load(&arguments.bundle)?;
    create_from(context, &arguments, bundle, terminal, None).map(drop)
}

/// Creates from a loaded bundle; `lower` is the directory over which its rootfs is a throw-away layer.
pub(super) fn create_from(
    context: &Context,
    arguments: &CreateArguments,
    bundle: Bundle,
    terminal: TerminalUse,
    lower: Option<PathBuf>,
) -> Result<Created, Error> {
    refuse_descriptors(arguments.preserve_fds)?;
    let this = ProcessIdentity::of(std::process::id().cast_signed())
        .map_err(Error::system("cannot read about this process in /proc"))?;
    let id = arguments.id.parse().map_err(ContainerError::from)?;
    for warning in &bundle.warnings {
        context.log.warning(warning);
    }
    let kernel = context.kernel.clone().or_else(|| bundle.kernel().map(Path::to_owned));
    Ok(create::create(CreateRequest {
        root: &absolute(&context.root)?,
        id: &id,
        bundle,
        terminal,
        pid_file: arguments.pid_file.as_deref(),
        pidfd_socket: arguments.pidfd_socket.as_deref(),
        systemd_cgroup: context.systemd_cgroup,
        kernel: kernel.as_deref(),
        throw_away: lower.is_some().then_some(this),
        lower,
        log: &context.log,
        timeline: context.timeline.clone(),
    })?)
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::system(format!("cannot use {} as root", path.display())))
}

pub(super) fn start(context: &Context, arguments: &IdArgument) -> Result<(), Error> {
    let (container, _lock) = Container::open_locked(&context.root, &arguments.id)?;
    Ok(starting::start(&container, &context.log)?)
}

pub(super) fn kill(context: &Context, arguments: &KillArguments) -> Result<(), Error> {
    let signal = signals::parse(&arguments.signal).map_err(|error| Error::Usage(error.to_string()))?;
    let container = Container::open(&context.root, &arguments.id)?;
    match container.status() {
        // With --all there is nothing left to be done, which is no failure.
        Status::Stopped if arguments.all => Ok(()),
        Status::Stopped => Err(ContainerError::NotRunning.into()),
        _ => signal_container(&container, signal, arguments.all),
    }
}

/// Signals through the monitor, which knows whether the container has a process yet. SIGKILL takes effect even
/// when the monitor does not answer.
pub(super) fn signal_container(container: &Container, signal: i32, all: bool) -> Result<(), Error> {
    let result = container.connect().and_then(|connection| {
        connection
            .set_patience(PATIENCE)
            .and_then(|()| connection.order(&control::Command::Signal { signal, all }, &[]))
            .map_err(|error| container.conversation_failed(error))
    });
    match result {
        Err(ContainerError::Monitor { .. }) if signal == libc::SIGKILL => Ok(deletion::kill(container)?),
        result => Ok(result?),
    }
}

pub(super) fn delete(context: &Context, arguments: &DeleteArguments) -> Result<(), Error> {
    Ok(deletion::delete(&context.root, &arguments.id, arguments.force, &context.log)?)
}

pub(super) fn pause(context: &Context, arguments: &IdArgument) -> Result<(), Error> {
    let (container, _lock) = Container::open_locked(&context.root, &arguments.id)?;
    match container.status() {
        Status::Running => order(&container, &control::Command::Pause),
        Status::Paused => Err(ContainerError::Paused.into()),
        _ => Err(ContainerError::NotRunning.into()),
    }
}

pub(super) fn resume(context: &Context, arguments: &IdArgument) -> Result<(), Error> {
    let (container, _lock) = Container::open_locked(&context.root, &arguments.id)?;
    match container.status() {
        Status::Paused => order(&container, &control::Command::Resume),
        _ => Err(ContainerError::NotPaused.into()),
    }
}

pub(super) fn order(container: &Container, command: &control::Command) -> Result<(), Error> {
    let connection = container.connect()?;
    connection.order(command, &[]).map_err(|error| match error {
        refused @ control::ControlError::Refused(_) => refused.into(),
        error => container.conversation_failed(error).into(),
    })
}
