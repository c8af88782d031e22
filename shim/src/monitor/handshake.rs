//! What `create` and the new monitor tell each other before the container exists.
//!
//! The monitor inherits one end of a socket pair. `create` sends [`ToMonitor::Setup`]; the monitor makes
//! namespaces, mounts and the machine and says [`FromMonitor::Prepared`]; `create` runs the hooks of the runtime
//! and says [`ToMonitor::Continue`]; the monitor runs the hooks of the container, changes its root, starts the
//! machine and says [`FromMonitor::Ready`]. If either end closes before that, the other gives up.

use std::path::PathBuf;

use rvm_protocol::{HostMount, SeccompProgram};
use serde::{Deserialize, Serialize};

use crate::bundle::{HostDisk, NetworkRates};
use crate::container::shape::Shape;
use crate::control::{Refusal, WindowSize};
use crate::logging::LogFormat;
use crate::timeline::Timeline;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "monitor";

/// From `create` to the monitor.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToMonitor {
    /// Everything that the monitor needs. The descriptors that go along are, in this order: the container's
    /// folder, the listening control socket, the guest's kernel, the guest's agent, and the log if there is one.
    Setup(Box<Setup>),
    /// The hooks of the runtime have succeeded.
    Continue,
}

/// From the monitor to `create`.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromMonitor {
    /// Namespaces and mounts exist.
    Prepared,
    /// The container is created: its machine boots.
    Ready,
    /// It could not be created.
    Failed(Refusal),
}

/// Number of descriptors that always go with [`ToMonitor::Setup`].
pub const SETUP_DESCRIPTORS: usize = 4;

/// What a monitor is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Setup {
    /// The container's ID.
    pub id: String,
    /// The root filesystem.
    pub rootfs: PathBuf,
    /// The checked spec as JSON.
    pub spec: String,
    /// What the guest gets of it.
    pub guest_spec: String,
    /// The folder over which `rootfs` is to be a throw-away layer.
    pub lower: Option<PathBuf>,
    /// The size of the container's terminal, if it has one. It is then the monitor's standard input.
    pub terminal: Option<WindowSize>,
    /// The compiled seccomp profile.
    pub seccomp: Option<SeccompProgram>,
    /// The machine's size.
    pub shape: Shape,
    /// Where templates are, and what machines share that boot.
    pub templates: Option<PathBuf>,
    /// Whether the machine may go on from a template.
    pub may_go_on: bool,
    /// The host's block devices that become the guest's disks.
    pub disks: Vec<HostDisk>,
    /// What the container's network is limited to.
    pub network_rates: NetworkRates,
    /// The state as the container's hooks get it.
    pub hook_state: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Whether details are logged.
    pub debug: bool,
    /// Whether the container ends when `create`'s end of the conversation closes.
    pub tied: bool,
    /// What has passed so far.
    pub timeline: Timeline,
    /// Mounts that the guest has to know of, which the monitor finds out itself.
    #[serde(skip)]
    pub host_mounts: Vec<HostMount>,
}
