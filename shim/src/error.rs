//! How failures are worded, and with which exit status a command ends.

use crate::cause::Cause;
use crate::compare::CompareError;
use crate::container::create::CreateError;
use crate::container::launch::LaunchError;
use crate::container::start::StartError;
use crate::control::Refusal;
use crate::{bundle, cgroup, container, control, hooks, logging, network, seccomp, template};

/// Exit status of a failed command.
pub const FAILURE: u8 = 1;
/// Exit status of a failed `exec`, where 1 could be the command's own.
pub const EXEC_FAILURE: u8 = 255;

/// Any failure of a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The container's state on disk.
    #[error(transparent)]
    Container(#[from] container::ContainerError),
    /// Creating the container.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Starting the container.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// The host's cgroup.
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] hooks::HookError),
    /// The network.
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    /// A template.
    #[error(transparent)]
    Template(#[from] template::TemplateError),
    /// The seccomp profile.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
    /// The conversation with the container's monitor.
    #[error(transparent)]
    Control(#[from] control::ControlError),
    /// The comparison of runtimes.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// A process that `exec` started.
    #[error("{0}")]
    Exec(String),
    /// The log file.
    #[error(transparent)]
    Log(#[from] logging::LogError),
    /// An operation of the system that has no module of its own.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the operating system reported.
        source: Cause,
    },
}

impl Error {
    /// What the monitor had to say, if it is the one that refused to create or start a container.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Error::Create(CreateError::Launch(LaunchError::Failed(refusal)))
            | Error::Start(StartError::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }

    /// Makes the closure that `map_err` wants, for an operation described by `what`.
    pub fn system<E: Into<Cause>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        let what = what.into();
        move |source| Error::System { what, source: source.into() }
    }
}
