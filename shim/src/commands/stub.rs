//! The process that stands on the host for one that `exec` started in the guest.
//!
//! It copies the standard streams, passes signals and window sizes on, and ends as the guest's process did. When
//! it dies, its connection to the monitor closes, and the guest's process is killed. In the foreground `exec`
//! itself is the stub; with `--detach` it is a process of its own, whose id engines get.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rvm_protocol::ExitStatus;
use serde::{Deserialize, Serialize};

use crate::cause::Cause;
use crate::cgroup::HostCgroup;
use crate::console;
use crate::control::{Answer, Command, Connection, ControlError, Exec, Packet, receive, send};
use crate::reexec::{self, Child, Start, Started};
use crate::signals::{self, Signals};
use crate::stdio;

/// The hidden subcommand.
pub(super) const SUBCOMMAND: &str = "exec-stub";
const FAILED: i32 = 255;

/// Why there is no process, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StubError {
    /// The process was not started by `exec`.
    #[error("the stub is started by 'rvm exec', not by hand")]
    NotStartedByExec,
    /// The monitor.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The system.
    #[error("cannot stand in for the process: {0}")]
    System(Cause),
    /// The detached stub said why.
    #[error("{0}")]
    Failed(String),
}

impl From<StubError> for crate::error::Error {
    fn from(error: StubError) -> Self {
        crate::error::Error::Exec(error.to_string())
    }
}

impl From<io::Error> for StubError {
    fn from(error: io::Error) -> Self {
        StubError::System(error.into())
    }
}

impl From<nix::errno::Errno> for StubError {
    fn from(error: nix::errno::Errno) -> Self {
        StubError::System(error.into())
    }
}

/// From `exec` to its detached stub; the connection to the monitor goes along.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    exec: Exec,
}

/// From the stub to `exec`.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Started,
    Failed(String),
}

/// Starts a detached stub in its container's cgroup, and lets `prepare` act before it is told what to do. Returns once
/// the guest's process runs.
pub(super) fn detach(
    title: &str,
    slave: Option<BorrowedFd<'_>>,
    cgroup: Option<&HostCgroup>,
    connection: &Connection,
    exec: Exec,
    prepare: impl FnOnce() -> Result<(), crate::error::Error>,
) -> Result<Child, crate::error::Error> {
    let place = cgroup.and_then(HostCgroup::open);
    let place = place.as_ref().map(AsFd::as_fd);
    let start = Start { title, subcommand: SUBCOMMAND, terminal: slave, cgroup: place };
    let started = start.spawn().map_err(StubError::from)?;
    let result = started.enter(cgroup).map_err(crate::error::Error::from);
    let Started { mut child, socket, .. } = started;
    let result = result.and_then(|()| prepare()).and_then(|()| Ok(instruct(&socket, connection, exec)?));
    match result {
        Ok(()) => Ok(child),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

fn instruct(socket: &OwnedFd, connection: &Connection, exec: Exec) -> Result<(), StubError> {
    send(socket, &Assignment { exec }, &[connection.as_fd()])?;
    match receive::<Report>(socket)?.ok_or(ControlError::Closed)?.message {
        Report::Started => Ok(()),
        Report::Failed(words) => Err(StubError::Failed(words)),
    }
}

/// Runs as a detached stub. Returns only if it was not started by `exec`.
pub(super) fn run() -> Result<(), StubError> {
    let socket = reexec::inherited_socket().map_err(|_| StubError::NotStartedByExec)?;
    let Packet { message: Assignment { exec }, mut descriptors } =
        receive::<Assignment>(&socket)?.ok_or(StubError::NotStartedByExec)?;
    let connection = Connection::from(descriptors.pop().ok_or(StubError::NotStartedByExec)?);
    let result = lead_session(exec.terminal.is_some()).and_then(|()| {
        let mut stub = Stub::start(connection, exec)?;
        send(&socket, &Report::Started, &[])?;
        Ok(stub.attend())
    });
    match result {
        Ok(status) => signals::exit_as(status),
        Err(error) => {
            let _ = send(&socket, &Report::Failed(error.to_string()), &[]);
            signals::end(FAILED)
        }
    }
}

fn lead_session(terminal: bool) -> Result<(), StubError> {
    // The command's parent may have asked for its death with its own; this process outlives both.
    nix::sys::prctl::set_pdeathsig(None)?;
    nix::unistd::setsid()?;
    if terminal {
        console::control_terminal(io::stdin())?;
    }
    Ok(())
}

/// A stub whose process runs.
pub(super) struct Stub {
    connection: Connection,
    signals: Signals,
    terminal: bool,
    open_outputs: u64,
    drained: Arc<EventFd>,
}

impl Stub {
    /// Has the monitor start the process, and copies its streams to and from this process's own.
    pub fn start(connection: Connection, mut exec: Exec) -> Result<Stub, StubError> {
        // Blocked before the size is read: a change from now on is told by a signal.
        let signals = Signals::block()?;
        if let (Some(size), Ok(now)) = (exec.terminal.as_mut(), console::window_size(io::stdin())) {
            *size = now;
        }
        let terminal = exec.terminal.is_some();
        let Packet { message, descriptors } = connection.ask(&Command::Exec(Box::new(exec)), &[])?;
        if message != Answer::Started {
            return Err(ControlError::Unexpected.into());
        }
        let drained = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let mut stub = Stub { connection, signals, terminal, open_outputs: 0, drained };
        stub.connect(descriptors.into_iter().map(UnixStream::from).collect())?;
        Ok(stub)
    }

    fn connect(&mut self, streams: Vec<UnixStream>) -> Result<(), StubError> {
        let mut streams = streams;
        if streams.len() == 3 {
            stdio::spawn_in(take(io::stdin())?, streams.remove(0))?;
        }
        match <[UnixStream; 2]>::try_from(streams) {
            Ok([stdout, stderr]) => {
                self.copy_output(stdout, take(io::stdout())?)?;
                self.copy_output(stderr, take(io::stderr())?)
            }
            Err(mut streams) => {
                let terminal = streams.pop().ok_or(ControlError::Unexpected)?;
                stdio::spawn_in(io::stdin().as_fd().try_clone_to_owned()?, terminal.try_clone()?)?;
                self.copy_output(terminal, io::stdout().as_fd().try_clone_to_owned()?)
            }
        }
    }

    fn copy_output(&mut self, from: UnixStream, to: OwnedFd) -> Result<(), StubError> {
        let drained = self.drained.clone();
        // Its counter would have to be full for the write to fail.
        stdio::spawn_out("output", from, to, move || {
            let _ = drained.write(1);
        })?;
        self.open_outputs += 1;
        Ok(())
    }

    /// Passes signals on until the process has ended and all that it wrote is copied.
    pub fn attend(&mut self) -> ExitStatus {
        let mut status = None;
        loop {
            if let Some(status) = status.filter(|_| self.open_outputs == 0) {
                return status;
            }
            let mut fds = vec![
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.drained.as_fd(), PollFlags::POLLIN),
            ];
            if status.is_none() {
                fds.push(PollFd::new(self.connection.as_fd(), PollFlags::POLLIN));
            }
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            let told = fds.get(2).is_some_and(|fd| fd.any().unwrap_or(true));
            self.open_outputs -= self.drained.read().unwrap_or(0).min(self.open_outputs);
            self.pass_signals_on();
            if told {
                status = self.listen();
            }
        }
    }

    fn pass_signals_on(&mut self) {
        while let Some(signal) = self.signals.take() {
            let command = match signal {
                libc::SIGWINCH if self.terminal => match console::window_size(io::stdin()) {
                    Ok(size) => Command::ResizeExec(size),
                    Err(_) => continue,
                },
                libc::SIGWINCH => continue,
                signal => Command::SignalExec { signal },
            };
            // If the monitor is gone, its connection says so.
            let _ = self.connection.send(&command, &[]);
        }
    }

    /// How the process ended, if that is what the monitor says. Without a monitor there is no process: it has
    /// been killed with its machine.
    fn listen(&self) -> Option<ExitStatus> {
        match self.connection.receive() {
            Ok(Packet { message: Answer::Exited(status), .. }) => Some(status),
            // A refused signal or size: the process has ended, and that is told next.
            Ok(_) | Err(ControlError::Refused(_)) => None,
            Err(_) => Some(ExitStatus::Signal(libc::SIGKILL as u8)),
        }
    }
}

/// Takes one of this process's standard streams and leaves `/dev/null`, so that it closes when the process in the
/// guest closes it.
fn take(stream: impl AsFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let taken = stream.as_fd().try_clone_to_owned()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    match stream.as_fd().as_raw_fd() {
        0 => nix::unistd::dup2_stdin(&null)?,
        1 => nix::unistd::dup2_stdout(&null)?,
        _ => nix::unistd::dup2_stderr(&null)?,
    }
    Ok(taken)
}
