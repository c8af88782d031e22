//! The conversation between the `rvm` commands and a container's monitor, over the container's control socket.
//!
//! A command connects, sends one [`Command`] and gets one [`Answer`]. `Exec` keeps its connection: the monitor
//! then tells of the process's end, the command's stub passes signals and window sizes on, and when the stub's
//! end of the connection closes, the process is killed. Both ends are the same program, so there is no
//! version to agree on.

pub mod packet;
pub mod refusal;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use rvm_protocol::{ExitStatus, GuestProcess};
use serde::{Deserialize, Serialize};

pub use packet::{Packet, receive, send};
pub use refusal::{Refusal, RefusalKind};

use crate::cause::Cause;
use crate::network::Wiring;

/// What a command asks of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Start the container's process. A tap's descriptor goes along for each interface, in their order, and one more
    /// where kills for want of memory can be told to the engine.
    Start {
        /// How the network is connected.
        wiring: Wiring,
        /// Since when, for the timeline.
        connected_at: u64,
    },
    /// The network has changed. A tap's descriptor goes along for each interface whose device is new, in their order.
    Network(Wiring),
    /// Signal the container's process, or all its processes.
    Signal {
        /// Number of the signal.
        signal: i32,
        /// Whether every process gets it.
        all: bool,
    },
    /// Start a further process. Answered with [`Answer::Started`] and the process's streams as descriptors:
    /// with a terminal one, otherwise one for each of stdin, stdout and stderr that is wanted.
    Exec(Box<Exec>),
    /// Signal the process that this connection started.
    SignalExec {
        /// Number of the signal.
        signal: i32,
    },
    /// Set the terminal size of the process that this connection started.
    ResizeExec(WindowSize),
    /// List the container's processes.
    Processes,
    /// Halt the machine.
    Pause,
    /// Let a halted machine go on.
    Resume,
    /// Change limits in the guest.
    Update {
        /// The OCI spec's `linux.resources` as JSON.
        resources: String,
    },
}

impl Command {
    /// What it asks for, in a word or two for the log.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Start { .. } => "start",
            Command::Network(_) => "change the network",
            Command::Signal { .. } => "signal",
            Command::Exec(_) => "execute a process",
            Command::SignalExec { .. } => "signal an executed process",
            Command::ResizeExec(_) => "resize an executed process's terminal",
            Command::Processes => "list processes",
            Command::Pause => "pause",
            Command::Resume => "resume",
            Command::Update { .. } => "update limits",
        }
    }
}

/// A further process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The OCI spec's `process` as JSON.
    pub process: String,
    /// The terminal's size, where it has a terminal.
    pub terminal: Option<WindowSize>,
    /// Whether its standard input is the guest's `/dev/null`, and so no stream.
    pub null_stdin: bool,
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

impl From<&oci_spec::runtime::Box> for WindowSize {
    /// What a description asks for; no terminal is larger than the kernel's numbers can say.
    fn from(size: &oci_spec::runtime::Box) -> Self {
        let clamp = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        WindowSize { rows: clamp(size.height()), columns: clamp(size.width()) }
    }
}

/// What the monitor answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// Not done, and why.
    Refused(Refusal),
    /// The process of an [`Exec`] runs.
    Started,
    /// The process of an [`Exec`] has ended, and what it wrote is in its streams.
    Exited(ExitStatus),
    /// The container's processes.
    Processes(Vec<GuestProcess>),
}

/// Why a conversation failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The monitor refused, in its words.
    #[error("{0}")]
    Refused(Refusal),
    /// The other end closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The socket failed.
    #[error("{0}")]
    Io(Cause),
    /// A message or its descriptors are over the limit.
    #[error("a message is too large")]
    TooLarge,
    /// The bytes are no message.
    #[error("a message could not be understood: {0}")]
    Malformed(#[from] postcard::Error),
    /// The monitor answered something that does not fit the question.
    #[error("the answer does not fit the question")]
    Unexpected,
}

/// A command's end of a connection to a monitor.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> Self {
        ControlError::Io(error.into())
    }
}

impl Connection {
    /// Connects to the socket at `path`.
    pub fn open(path: &Path) -> Result<Connection, ControlError> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(io::Error::from)?;
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        connect(socket.as_raw_fd(), &address).map_err(io::Error::from)?;
        Ok(Connection { socket })
    }

    /// Sends a command with descriptors.
    pub fn send(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        send(&self.socket, command, descriptors)
    }

    /// Waits for an answer. A refusal becomes an error.
    pub fn receive(&self) -> Result<Packet<Answer>, ControlError> {
        match receive::<Answer>(&self.socket)? {
            None => Err(ControlError::Closed),
            Some(Packet { message: Answer::Refused(refusal), .. }) => Err(ControlError::Refused(refusal)),
            Some(packet) => Ok(packet),
        }
    }

    /// Sends a command and waits for its answer.
    pub fn ask(
        &self,
        command: &Command,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Packet<Answer>, ControlError> {
        self.send(command, descriptors)?;
        self.receive()
    }

    /// Asks for something whose answer is a mere "done".
    pub fn order(&self, command: &Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        match self.ask(command, descriptors)?.message {
            Answer::Done => Ok(()),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// Limits how long an answer is waited for.
    pub fn set_patience(&self, limit: std::time::Duration) -> Result<(), ControlError> {
        use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
        let limit = nix::sys::time::TimeVal::new(limit.as_secs() as i64, i64::from(limit.subsec_micros()));
        setsockopt(&self.socket, ReceiveTimeout, &limit).map_err(|errno| ControlError::Io(errno.into()))
    }
}

impl From<OwnedFd> for Connection {
    fn from(socket: OwnedFd) -> Self {
        Connection { socket }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
