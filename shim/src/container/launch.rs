//! Starting the monitor process, and talking with it until the container is created.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitStatus;

use super::ContainerId;
use crate::cause::Cause;
use crate::control::{ControlError, Packet, Refusal, receive, send};
use crate::monitor::handshake::{FromMonitor, SUBCOMMAND, ToMonitor};
use crate::reexec::{Child, Start, Started};

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It could not be started.
    #[error("the monitor could not be started: {0}")]
    Spawn(Cause),
    /// It gave up, and says why. Words about the container's program are for engines, which derive exit statuses
    /// from them.
    #[error("{0}")]
    Failed(Refusal),
    /// It ended without a word.
    #[error("the monitor ended before the container was created ({0})")]
    Ended(ExitStatus),
    /// The conversation failed.
    #[error("the monitor cannot be talked to: {0}")]
    Control(#[from] ControlError),
}

/// What a monitor is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The container's ID, for the process's title.
    pub id: &'a ContainerId,
    /// The container's terminal. Without one the monitor inherits the caller's standard streams, which are then
    /// the container's.
    pub slave: Option<BorrowedFd<'a>>,
    /// The directory of the cgroup in which it begins, if it can.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A monitor that is a child of this process.
pub struct MonitorProcess {
    child: Child,
    socket: OwnedFd,
    is_in_cgroup: bool,
}

impl fmt::Debug for MonitorProcess {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "MonitorProcess({})", self.child.id())
    }
}

impl Launch<'_> {
    /// Starts the process.
    pub fn spawn(&self) -> Result<MonitorProcess, LaunchError> {
        let title = format!("rvm: {}", self.id);
        let start =
            Start { title: &title, subcommand: SUBCOMMAND, terminal: self.slave, cgroup: self.cgroup };
        let started = start.spawn().map_err(|error| LaunchError::Spawn(error.into()))?;
        let Started { child, socket, is_in_cgroup } = started;
        Ok(MonitorProcess { child, socket, is_in_cgroup })
    }
}

impl MonitorProcess {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Whether it has begun in its cgroup.
    pub fn is_in_cgroup(&self) -> bool {
        self.is_in_cgroup
    }

    /// Tells it something.
    pub fn send(&mut self, message: &ToMonitor, descriptors: &[BorrowedFd<'_>]) -> Result<(), LaunchError> {
        match send(&self.socket, message, descriptors) {
            // It has ended: what it said last is worth more than the broken pipe.
            Err(ControlError::Io(_)) => self.expect(|_| false),
            result => Ok(result?),
        }
    }

    /// Waits for the one answer that fits.
    pub fn expect(&mut self, fits: impl FnOnce(&FromMonitor) -> bool) -> Result<(), LaunchError> {
        match receive::<FromMonitor>(&self.socket) {
            Ok(Some(Packet { message, .. })) if fits(&message) => Ok(()),
            Ok(Some(Packet { message: FromMonitor::Failed(refusal), .. })) => {
                Err(LaunchError::Failed(refusal))
            }
            Ok(Some(_)) => Err(ControlError::Unexpected.into()),
            Ok(None) | Err(ControlError::Io(_)) => Err(self.ended()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends it and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    fn ended(&mut self) -> LaunchError {
        self.child.wait().map_or_else(|error| LaunchError::Spawn(error.into()), LaunchError::Ended)
    }
}
