//! A process of the container: from its description to the program that runs.
//!
//! [`launch`] forks. The rest of the modules are the steps that the child takes, each a small function that
//! says what it was about when it fails; the failure goes back to the agent over the child's set-up channel,
//! which `execve` closes.

pub mod capabilities;
pub mod channel;
pub mod credentials;
pub mod environment;
pub mod launch;
pub mod lookup;
pub mod rlimits;
pub mod scheduling;
pub mod seccomp;
pub mod terminal;

use std::os::fd::OwnedFd;

use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;

use crate::error::{Context, Result};

pub use launch::{Launch, Place, launch};

/// A stream that takes everything and gives nothing.
pub fn open_null() -> Result<OwnedFd> {
    fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).context(|| "opening /dev/null")
}
