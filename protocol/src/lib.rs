//! Every message that crosses the vsock between the monitor on the host and the agent in the guest.
//!
//! One definition serves both ends. The guest always connects to the host ([`HOST_CID`]): once to
//! [`CONTROL_PORT`], which carries [`Frame`](frame)d [`ToAgent`] and [`FromAgent`] messages for the life of
//! the guest, and once to [`STREAM_PORT`] for each standard stream of each process, which carries a
//! [`StreamHeader`] and then plain bytes. A third port, [`RESOLVER_PORT`], takes [DNS messages](resolver) as they come up.
//!
//! Messages are encoded with postcard, whose enums are positional: any change of a message must raise
//! [`VERSION`], and both ends refuse a peer of another version.

pub mod frame;
pub mod message;
pub mod network;
mod program;
pub mod resolver;
pub mod stream;

pub use frame::{FrameError, FrameReader, MAX_FRAME, read_frame, write_available, write_frame};
pub use message::{
    AgentError, AgentErrorKind, ClockReading, Disk, ExecProcess, ExitStatus, FromAgent, GuestProcess,
    HostMount, ProcessId, Reply, Request, SeccompProgram, StandardStreams, StartContainer, ToAgent,
};
pub use network::{Address, HOST_PORTS, Interface, Neighbour, NetworkConfig, Route};
pub use resolver::{Lookup, LookupReader, MAX_DNS_MESSAGE, Transport};
pub use stream::{STREAM_HEADER_LEN, StreamHeader, StreamToken};

/// Version of every message of this crate; sent first by the agent in [`FromAgent::Ready`].
pub const VERSION: u32 = 7;

/// The host's context id on a vsock (virtio 1.2, section 5.10.4).
pub const HOST_CID: u32 = 2;

/// The guest's context id. Every container has a virtual machine, and so a vsock, of its own.
pub const GUEST_CID: u32 = 3;

/// Host port of the control connection.
pub const CONTROL_PORT: u32 = 1024;

/// Host port of the stream connections.
pub const STREAM_PORT: u32 = 1025;

/// Host port of the guest's resolver.
pub const RESOLVER_PORT: u32 = 1026;

/// Tag of the virtio-fs device that serves the container's root filesystem.
pub const ROOTFS_TAG: &str = "rootfs";

/// The ID of the container of a [`Request::Rehearse`], which can be that of no other, and the name of its cgroup.
pub const REHEARSAL_ID: &str = "~rehearsal";

/// Where the agent's program is in the guest's own root.
pub const AGENT_PATH: &str = "/init";

/// The argument with which that program, in the container of a [`Request::Rehearse`], ends at once.
pub const REHEARSAL_ARGUMENT: &str = "rehearsal";

/// Ceiling of the open files of a process (`fs.nr_open`) in the guest: far above whatever a host grants, as systemd has it.
pub const MOST_OPEN_FILES: u64 = 1_073_741_816;
