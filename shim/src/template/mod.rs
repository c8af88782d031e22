//! Templates: machines that were captured when their agent was up, and from which containers begin.
//!
//! The first container of a [shape](Key) boots. What it leaves behind is a process that boots another machine of that
//! shape, [captures](builder) it, tries the capture, and puts it into the [store]. Containers that come later
//! [open](Store::find) it, and their machines go on from there. Machines that boot all the same share
//! [what they can](boot) with the boot of that other machine. A template is a cache: where there is none, or none that can be
//! used, a machine boots.

mod boot;
pub mod builder;
mod file;
mod key;
mod store;
mod trial;

use std::io;
use std::path::PathBuf;

pub use boot::KeptBoot;
pub use file::Record;
pub use key::Key;
pub use store::{Kept, Listed, Store, Template};

use crate::cause::Cause;
use crate::monitor::MonitorError;
use rvm_vmm::SharedBootError;
use rvm_vmm::machine::{CaptureError, RestoreError};

/// Where templates are kept.
pub const FOLDER: &str = "/var/lib/rvm/templates";
/// Names another folder; `off` has all machines boot.
pub const VARIABLE: &str = "RVM_TEMPLATES";

/// The folder that templates are kept in, or none if there are to be none.
pub fn folder() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE) {
        None => Some(PathBuf::from(FOLDER)),
        Some(value) if value.is_empty() || value == "off" => None,
        Some(value) => std::path::absolute(value).ok(),
    }
}

/// Why a template cannot be used, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file or folder of it is not as it must be.
    #[error("{path}: {problem}", path = .path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file of its state is damaged.
    #[error("its state is damaged: {0}")]
    Damaged(&'static str),
    /// Its machine cannot be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// What is kept of a boot cannot be shared.
    #[error(transparent)]
    Boot(#[from] SharedBootError),
    /// A machine cannot be captured.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A machine cannot be made or started.
    #[error(transparent)]
    Machine(#[from] Box<MonitorError>),
    /// The guest does not come up.
    #[error("the guest does not come up: {0}")]
    Guest(String),
    /// No container starts in the guest.
    #[error("no container starts in the guest: {0}")]
    Container(String),
    /// There is no such template.
    #[error("there is no template {0}; 'rvm template list' shows those there are")]
    Absent(String),
    /// Templates are switched off.
    #[error("templates are switched off ({VARIABLE}=off)")]
    Off,
    /// An operation of the system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the operating system reported.
        source: Cause,
    },
}

impl From<MonitorError> for TemplateError {
    fn from(error: MonitorError) -> Self {
        TemplateError::Machine(Box::new(error))
    }
}

impl TemplateError {
    fn guest(error: impl std::fmt::Display) -> TemplateError {
        TemplateError::Guest(error.to_string())
    }

    fn container(error: impl std::fmt::Display) -> TemplateError {
        TemplateError::Container(error.to_string())
    }

    /// What is wrong with a guest that is up, and was to start a container.
    fn with_container(self) -> TemplateError {
        match self {
            TemplateError::Guest(text) => TemplateError::Container(text),
            other => other,
        }
    }

    /// Makes the closure that `map_err` wants.
    fn system<E: Into<Cause>>(what: impl Into<String>) -> impl FnOnce(E) -> TemplateError {
        let what = what.into();
        move |error| TemplateError::System { what, source: error.into() }
    }

    fn unfit(path: impl Into<PathBuf>, problem: &'static str) -> TemplateError {
        TemplateError::Unfit { path: path.into(), problem }
    }
}

/// Whether an error says that there is nothing.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
