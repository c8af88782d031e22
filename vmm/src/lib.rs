//! The microVM of rvm: KVM machine, memory, boot, and virtio devices over MMIO.
//!
//! This crate knows nothing of containers. A [`virtio::VirtioDevice`] is plugged into a numbered slot of the
//! machine, before the start or while the guest runs; everything that the guest writes is taken as hostile.

mod boot;
mod bus;
pub mod clock;
pub mod confine;
mod console;
mod cpuid;
pub mod event_loop;
pub mod host;
mod i8042;
mod image;
mod layout;
pub mod machine;
mod memory;
mod pagemap;
mod serial;
mod shared_boot;
mod touched;
mod vcpu;
pub mod virtio;

use std::sync::Arc;

pub use host::host_support;
pub use machine::{BootFiles, BootSource, ExitReason, Machine, MachineConfig, MachineError, Timeline};
pub use shared_boot::{BootRecord, RecordedBoot, SharedBoot, SharedBootError};

/// The guest's memory, shared by vCPUs, transport and devices.
pub type GuestMemory = Arc<vm_memory::GuestMemoryMmap>;
