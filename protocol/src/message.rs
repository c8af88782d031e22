//! The messages of the control connection.
//!
//! The agent speaks first, with [`FromAgent::Ready`]. From then on the host sends [`ToAgent`] requests, each
//! with a number of its own, and the agent answers each with one [`FromAgent::Reply`], in any order, and
//! tells of events as they happen.

use serde::{Deserialize, Serialize};

use crate::{NetworkConfig, StreamToken};

/// Names a process that the host started in the guest. The container's first process is [`ProcessId::INIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId(pub u32);

impl ProcessId {
    /// The container's first process.
    pub const INIT: ProcessId = ProcessId(0);
}

/// A request of the host, with the number that its answer will carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Number of this request; the host never uses one twice in the life of a guest.
    pub request: u64,
    /// What is asked.
    pub body: Request,
}

/// What the host asks of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Configure the network, set up the container and start its first process ([`ProcessId::INIT`]).
    /// Answered with [`Reply::Started`] once the process has executed its program. Allowed once.
    Start(Box<StartContainer>),
    /// Start a further process in the running container. Answered with [`Reply::Started`].
    Exec(Box<ExecProcess>),
    /// Send a signal to one process, or with `all` to every process of the container.
    Signal {
        /// The process.
        process: ProcessId,
        /// Number of the signal.
        signal: i32,
        /// Whether every process of the container gets it.
        all: bool,
    },
    /// Set the size of a process's terminal.
    Resize {
        /// The process.
        process: ProcessId,
        /// Height in characters.
        rows: u16,
        /// Width in characters.
        columns: u16,
    },
    /// List the container's processes. Answered with [`Reply::Processes`].
    List,
    /// Write everything that the guest holds back to its devices.
    Sync,
    /// Change the container's limits; `resources` is JSON of the OCI spec's `linux.resources`.
    Update {
        /// The new limits; absent ones stay.
        resources: String,
    },
    /// Make the network look like this from now on. What the last configuration had and this one has not goes; what
    /// processes of the container have configured themselves stays.
    Network(NetworkConfig),
    /// Start a container from the guest's own files, whose program ends at once, and answer when it has; of it stays an
    /// empty cgroup. Listen for names afterwards, for the container to come, which has a network mostly. A guest that is to be
    /// captured has done then what its kernel does once, for all those that go on from there. Not after [`Request::Start`].
    Rehearse(Box<StartContainer>),
    /// Be a machine of your own: the guest goes on from a state that it shares with other guests. Always the first request
    /// to such a guest, and never sent to one that has booted.
    Awaken {
        /// Random bytes that no other guest gets.
        entropy: [[u8; 32]; 2],
        /// What time it is.
        clock: ClockReading,
    },
    /// Set the guest's clock; sent to a guest that has booted, and after a pause.
    SetClock(ClockReading),
}

/// What time it is, at an instant that the guest can tell how long ago it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockReading {
    /// The host's `CLOCK_REALTIME`, in nanoseconds since the epoch.
    pub realtime: u64,
    /// What the guest's time stamp counter said then.
    pub counter: u64,
    /// How often that counts in a millisecond; 0 where the host does not know, and it is to be now.
    pub khz: u32,
}

/// How the streams of a process reach the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StandardStreams {
    /// A pseudo-terminal in the container; one connection carries both directions.
    Terminal {
        /// The stream of the terminal.
        token: StreamToken,
        /// Height in characters.
        rows: u16,
        /// Width in characters.
        columns: u16,
    },
    /// Pipes. An absent one is `/dev/null`.
    Pipes {
        /// Standard input, host to guest. The guest passes the end of the stream on as a closed pipe.
        stdin: Option<StreamToken>,
        /// Standard output, guest to host.
        stdout: Option<StreamToken>,
        /// Standard error, guest to host.
        stderr: Option<StreamToken>,
    },
}

/// Everything the agent needs to make the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartContainer {
    /// The container's ID, for messages and for the guest's cgroup.
    pub id: String,
    /// The OCI spec as JSON, already checked by the host; seccomp is left out of it (see `seccomp`).
    pub spec: String,
    /// The streams of the first process.
    pub streams: StandardStreams,
    /// The network.
    pub network: NetworkConfig,
    /// The seccomp filter, where one is asked for.
    pub seccomp: Option<SeccompProgram>,
    /// The container's state as JSON (OCI runtime specification, "State"), for the hooks that run in it. The agent
    /// puts in the process id that the container sees.
    pub hook_state: String,
    /// Memory that the workload may use, in bytes, where limited.
    pub memory_limit: Option<u64>,
    /// Mounts of the host in the container's tree that the guest has to know of: those below volumes, which it mounts with
    /// the volume and not only when somebody comes by, and those that are restricted.
    pub host_mounts: Vec<HostMount>,
    /// The machine's disks.
    pub disks: Vec<Disk>,
}

/// A disk of the machine: a block device of the host, by whose numbers the spec calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The virtio-mmio slot that it is in.
    pub slot: u8,
    /// The host's numbers of the device.
    pub major: u32,
    /// The minor one.
    pub minor: u32,
}

/// A mount that the host has made in the container's tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMount {
    /// Where, from the root of the container.
    pub path: String,
    /// How it is restricted: `MOUNT_ATTR_*` of `mount_setattr(2)`. What programs may be executed, which devices opened
    /// and whose rights assumed is for the kernel to say that does it.
    pub attributes: u64,
}

/// A seccomp filter that the host compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompProgram {
    /// Instructions, as an array of the kernel's `struct sock_filter` (8 bytes each, little-endian).
    pub filter: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*` of `seccomp(2)`.
    pub flags: u32,
}

/// A further process of a running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecProcess {
    /// The name under which the host knows it.
    pub process: ProcessId,
    /// The OCI spec's `process` object as JSON.
    pub spec: String,
    /// Its streams.
    pub streams: StandardStreams,
    /// The seccomp filter, where one is asked for.
    pub seccomp: Option<SeccompProgram>,
}

/// What the agent tells the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The agent is up. Always its first message.
    Ready {
        /// [`VERSION`](crate::VERSION) of the agent.
        version: u32,
        /// The guest kernel's release, as of `uname -r`.
        kernel: String,
    },
    /// The answer to a request.
    Reply {
        /// The request's number.
        request: u64,
        /// What came of it.
        result: Result<Reply, AgentError>,
    },
    /// A process that the host started has ended, and what it had written has been sent. What its descendants write
    /// may follow for a moment.
    Exited {
        /// The process.
        process: ProcessId,
        /// How it ended.
        status: ExitStatus,
    },
    /// The guest kernel killed a process of the container for want of memory.
    OutOfMemory,
}

/// A request's result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// A process was started.
    Started {
        /// Its process id in the guest's own first pid namespace.
        guest_pid: i32,
    },
    /// The container's processes.
    Processes(Vec<GuestProcess>),
}

/// A line of the container's process list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProcess {
    /// Process id as the container sees it.
    pub pid: i32,
    /// Parent's process id as the container sees it.
    pub parent: i32,
    /// Effective user id as the container sees it.
    pub user: u32,
    /// The command line.
    pub command: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl ExitStatus {
    /// The status as a shell tells it: the code, or 128 and the signal's number.
    pub fn shell_code(self) -> i32 {
        match self {
            ExitStatus::Code(code) => i32::from(code),
            ExitStatus::Signal(signal) => 128 + i32::from(signal),
        }
    }
}

/// Why the agent could not do what was asked, in words for the container's user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// What an engine makes an exit code of.
    pub kind: AgentErrorKind,
    /// One line: what failed, with what.
    pub message: String,
}

/// The kinds of failure that engines tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentErrorKind {
    /// The program does not exist: exit code 127.
    NotFound,
    /// The program may not be executed: exit code 126.
    NotExecutable,
    /// No process of that name runs (any more).
    NoSuchProcess,
    /// Anything else.
    Other,
}
