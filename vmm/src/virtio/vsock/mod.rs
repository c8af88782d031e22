//! The socket device (virtio 1.2, section 5.10): streams between ports of the guest and of the host.
//!
//! Every packet starts with a [header](packet) that names two context IDs and two ports. One of the queues
//! carries packets to the guest, one from it, and each of both carries all connections, so that one of them
//! must never hold up the others: per connection each side grants the other [credit], and sends no more
//! than it was granted. A connection starts with REQUEST and RESPONSE; either side can announce that it will
//! send or receive no more (SHUTDOWN); and RST refuses or ends it.
//!
//! In the host the end of a connection is a plain Unix stream socket, which the [connection] keeps in step with
//! the guest. The [muxer] finds the connection of a packet, and the next packet for the guest; the [worker]
//! drives it on an event loop; [`VsockHandle`] is how the rest of the host listens and connects.
//!
//! A driver that breaks the protocol of a connection loses that connection; one that breaks a queue loses the
//! device until it resets it. What waits is bounded on all sides: bytes for the host by the credit, packets for
//! the guest by the connections (each makes its next packet when there is a buffer for it), connections by
//! [`muxer::MAX_CONNECTIONS`].

mod backlog;
pub mod connection;
pub mod credit;
mod device;
mod handle;
pub mod muxer;
pub mod packet;
pub mod worker;

#[cfg(test)]
mod tests;

pub use device::VsockDevice;
pub use handle::{VsockError, VsockHandle, VsockListener};
