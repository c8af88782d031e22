//! Virtio devices (virtio 1.2) and what they share with the transport.

pub mod balloon;
pub mod block;
pub(crate) mod buffers;
pub(crate) mod device;
pub mod fs;
#[cfg(any(test, feature = "fuzzing"))]
pub mod hostile;
pub(crate) mod mmio;
pub mod net;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub(crate) mod virtqueue;
pub mod vsock;
pub(crate) mod worker;

pub use device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
