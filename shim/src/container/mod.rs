//! Containers as the commands see them: a folder with a record, and a monitor that lives or not.

pub mod create;
pub mod delete;
pub mod folder;
pub mod id;
pub mod launch;
pub mod liveness;
pub mod shape;
pub mod start;
pub mod state;

use std::io;
use std::path::{Path, PathBuf};

pub use folder::{Folder, Lock};
pub use id::{ContainerId, IdError};
pub use liveness::{ProcessHandle, ProcessIdentity, pidfd_open};
pub use state::{Record, StateReport, Status, Step};

use crate::cause::Cause;
use crate::control::{Connection, ControlError};

/// Why a container cannot be found or is in the wrong state. Engines know several of these by their words.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The ID breaks a rule.
    #[error(transparent)]
    Id(#[from] IdError),
    /// There is no container of this ID.
    #[error("container {0:?} does not exist")]
    NotFound(String),
    /// There is one already.
    #[error("container with given ID already exists: {0:?}")]
    Exists(String),
    /// It does not run.
    #[error("container not running")]
    NotRunning,
    /// It is not paused.
    #[error("container not paused")]
    NotPaused,
    /// It is paused.
    #[error("container is paused")]
    Paused,
    /// It must be stopped first.
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped {
        /// The container's ID.
        id: String,
        /// Its status.
        status: Status,
    },
    /// `exec` into one that has no process.
    #[error("cannot exec in a {0} container")]
    NoExec(Status),
    /// A file of its folder cannot be used.
    #[error("the state of container {id:?} in {} cannot be used: {source}", .path.display())]
    State {
        /// The container's ID.
        id: String,
        /// The folder.
        path: PathBuf,
        /// What the operating system reported.
        source: Cause,
    },
    /// Its monitor does not answer.
    #[error("the monitor of container {id:?} cannot be reached: {source}")]
    Monitor {
        /// The container's ID.
        id: String,
        /// What failed.
        source: ControlError,
    },
    /// Its machine failed.
    #[error("{0}")]
    Failed(String),
    /// It does not end although it was killed.
    #[error("process {pid} of container {id:?} does not end although it was killed")]
    Unkillable {
        /// The container's ID.
        id: String,
        /// The monitor.
        pid: i32,
    },
    /// A hook failed after the container's end.
    #[error(transparent)]
    Hook(#[from] crate::hooks::HookError),
    /// The host's cgroup cannot be removed.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
}

/// A container that `create` recorded.
#[derive(Debug)]
pub struct Container {
    folder: Folder,
    /// What `create` recorded.
    pub record: Record,
    /// Whether this command has locked it.
    locked: bool,
}

impl Container {
    /// Finds a container.
    pub fn open(root: &Path, id: &str) -> Result<Container, ContainerError> {
        let id: ContainerId = id.parse()?;
        let folder = Folder::open(root, id.as_str()).map_err(|error| not_found(root, &id, error))?;
        Container::load(folder, &id, false)
    }

    /// Finds a container and locks it; none when another command is changing it.
    pub fn try_open_locked(root: &Path, id: &str) -> Result<Option<(Container, Lock)>, ContainerError> {
        let id: ContainerId = id.parse()?;
        let folder = Folder::open(root, id.as_str()).map_err(|error| not_found(root, &id, error))?;
        let Some(lock) = folder.try_lock().map_err(|error| not_found(root, &id, error))? else {
            return Ok(None);
        };
        Ok(Some((Container::load(folder, &id, true)?, lock)))
    }

    /// Finds a container and waits until no other command is changing it.
    pub fn open_locked(root: &Path, id: &str) -> Result<(Container, Lock), ContainerError> {
        let id: ContainerId = id.parse()?;
        let folder = Folder::open(root, id.as_str()).map_err(|error| not_found(root, &id, error))?;
        let lock = folder.lock().map_err(|error| not_found(root, &id, error))?;
        Ok((Container::load(folder, &id, true)?, lock))
    }

    /// Like [`open`](Self::open), but a record that cannot be understood is no error: what can be read of it counts.
    pub fn open_damaged(root: &Path, id: &str) -> Result<Container, ContainerError> {
        let id: ContainerId = id.parse()?;
        let folder = Folder::open(root, id.as_str()).map_err(|error| not_found(root, &id, error))?;
        Container::salvage(folder, &id, false)
    }

    /// The same, locked.
    pub fn open_damaged_locked(root: &Path, id: &str) -> Result<(Container, Lock), ContainerError> {
        let id: ContainerId = id.parse()?;
        let folder = Folder::open(root, id.as_str()).map_err(|error| not_found(root, &id, error))?;
        let lock = folder.lock().map_err(|error| not_found(root, &id, error))?;
        Ok((Container::salvage(folder, &id, true)?, lock))
    }

    /// All containers below a root, by their ID, those with a damaged record too. Folders that are no containers
    /// (any more) are passed over.
    pub fn list(root: &Path) -> io::Result<Vec<Container>> {
        let entries = match std::fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names: Vec<_> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names.iter().filter_map(|name| Container::open_damaged(root, name).ok()).collect())
    }

    fn salvage(folder: Folder, id: &ContainerId, locked: bool) -> Result<Container, ContainerError> {
        match folder.read(folder::RECORD) {
            Ok(Some(bytes)) => {
                let whole = serde_json::from_slice(&bytes);
                let record = whole.unwrap_or_else(|_| Record::salvage(id, &bytes));
                Ok(Container { folder, record, locked })
            }
            _ => Container::load(folder, id, locked),
        }
    }

    fn load(folder: Folder, id: &ContainerId, locked: bool) -> Result<Container, ContainerError> {
        let damaged = |error: io::Error| ContainerError::State {
            id: id.to_string(),
            path: folder.path().to_owned(),
            source: error.into(),
        };
        let record: Record = folder
            .read_json(folder::RECORD)
            .map_err(damaged)?
            .ok_or_else(|| ContainerError::NotFound(id.to_string()))?;
        Ok(Container { folder, record, locked })
    }

    /// One that this command has made and locked.
    fn locked(folder: Folder, record: Record) -> Container {
        Container { folder, record, locked: true }
    }

    /// The container's ID.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// The container's folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The status at this moment.
    pub fn status(&self) -> Status {
        // The step is read first: a monitor that ends in between is then seen as ended.
        let step = self.folder.read(folder::STEP).ok().flatten();
        let step = step.and_then(|bytes| Step::from_byte(*bytes.first()?));
        match self.record.monitor {
            Some(monitor) => Status::derive(monitor.is_alive(), step),
            // Either `create` has not come to the monitor yet, and holds the lock, or it was killed.
            None if !self.locked && matches!(self.folder.try_lock(), Ok(None)) => Status::Creating,
            None => Status::Stopped,
        }
    }

    /// The state as engines are shown it.
    pub fn report(&self) -> StateReport {
        self.record.report(self.status())
    }

    /// The monitor, or an error that says in the engines' words that the container has ended.
    pub fn monitor(&self) -> Result<ProcessIdentity, ContainerError> {
        self.record.monitor.filter(|monitor| monitor.is_alive()).ok_or(ContainerError::NotRunning)
    }

    /// Connects to the monitor.
    pub fn connect(&self) -> Result<Connection, ContainerError> {
        let monitor = self.monitor()?;
        Connection::open(&self.folder.socket_path()).map_err(|source| {
            if monitor.is_alive() { self.unreachable(source) } else { ContainerError::NotRunning }
        })
    }

    /// What to report when the conversation with the monitor failed: its last words, where it left some.
    pub fn conversation_failed(&self, error: ControlError) -> ContainerError {
        match self.last_words() {
            Some(words) => ContainerError::Failed(words),
            None if matches!(error, ControlError::Closed) => ContainerError::NotRunning,
            None => self.unreachable(error),
        }
    }

    /// Why the monitor failed, if it did.
    pub fn last_words(&self) -> Option<String> {
        let words = self.folder.read(folder::FAILURE).ok()??;
        Some(String::from_utf8_lossy(&words).trim().to_owned())
    }

    fn unreachable(&self, source: ControlError) -> ContainerError {
        ContainerError::Monitor { id: self.id().to_owned(), source }
    }
}

fn not_found(root: &Path, id: &ContainerId, source: io::Error) -> ContainerError {
    match source.kind() {
        io::ErrorKind::NotFound => ContainerError::NotFound(id.to_string()),
        _ => {
            ContainerError::State { id: id.to_string(), path: root.join(id.as_str()), source: source.into() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_without_a_monitor_is_being_created_while_its_lock_is_held() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        let record = Record { monitor: None, ..state::tests::record() };
        folder.write_json(folder::RECORD, &record).unwrap();
        let lock = folder.lock().unwrap();
        assert_eq!(Container::open(root.path(), "c").unwrap().status(), Status::Creating);
        assert!(Container::try_open_locked(root.path(), "c").unwrap().is_none());
        drop(lock);
        assert_eq!(Container::open(root.path(), "c").unwrap().status(), Status::Stopped);
        let (container, _lock) = Container::open_locked(root.path(), "c").unwrap();
        assert_eq!(container.status(), Status::Stopped, "who holds the lock is not waiting for itself");
    }
}
