//! The network device (virtio 1.2, section 5.1) over a tap of the host.
//!
//! Frames go between the tap and the guest's memory without a copy, each with the 12 bytes of `virtio_net_hdr_v1`
//! in front: the tap understands them, so checksums and segmentation are done as late as possible, by the host's
//! kernel or its hardware, or not at all where a frame stays on the host.

mod rate;
mod room;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::OwnedFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device::read_padded;
use super::worker::Post;
use super::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::event_loop::EventLoopHandle;
pub use rate::Rates;
use rate::Throttle;
use tap::Tap;
use worker::Worker;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Length of `virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;
/// The largest packet there is, which segmentation by the receiver makes possible.
const MAX_PACKET: usize = 65535;
/// Smallest MTU that the device may offer (section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// The network device.
#[derive(Debug)]
pub struct NetDevice {
    tap: Tap,
    mac: [u8; 6],
    mtu: u16,
    throttles: Throttles,
    post: Post,
}

/// What limits the ways to the guest and from it.
#[derive(Debug, Default)]
struct Throttles {
    receive: Option<Throttle>,
    transmit: Option<Throttle>,
}

impl Throttles {
    fn new(rates: Rates) -> io::Result<Throttles> {
        let throttle = |rate: Option<_>| rate.map(Throttle::new).transpose();
        Ok(Throttles { receive: throttle(rates.receive)?, transmit: throttle(rates.transmit)? })
    }

    fn another(&self) -> Throttles {
        let another = |throttle: &Option<Throttle>| throttle.as_ref().map(Throttle::another);
        Throttles { receive: another(&self.receive), transmit: another(&self.transmit) }
    }
}

impl NetDevice {
    /// A device at a tap, which must be open without blocking and attached to its interface with `IFF_TAP`,
    /// `IFF_NO_PI` and `IFF_VNET_HDR`. With an MTU of 0 the guest chooses.
    pub fn new(tap: impl Into<OwnedFd>, mac: [u8; 6], mtu: u16, events: EventLoopHandle) -> Self {
        let throttles = Throttles::default();
        Self { tap: Tap::new(tap.into()), mac, mtu, throttles, post: Post::new(events) }
    }

    /// Limits what goes through it.
    ///
    /// # Errors
    ///
    /// A timer cannot be made.
    pub fn limit(&mut self, rates: Rates) -> io::Result<()> {
        self.throttles = Throttles::new(rates)?;
        Ok(())
    }
}

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu >= MIN_MTU { 1 << VIRTIO_NET_F_MTU } else { 0 };
        mtu | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; HEADER];
        config[..6].copy_from_slice(&self.mac);
        // In between: the status and the number of queue pairs, both without their feature.
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        read_padded(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        self.tap.configure(features)?;
        let [mut receive, mut transmit] = [None, None];
        for queue in queues {
            match queue.index {
                RECEIVE_QUEUE => receive = Some(queue),
                TRANSMIT_QUEUE => transmit = Some(queue),
                _ => (),
            }
        }
        let needed = |queue: Option<ActiveQueue>, index| queue.ok_or(ActivateError::MissingQueue(index));
        let queues = [needed(receive, RECEIVE_QUEUE)?.into(), needed(transmit, TRANSMIT_QUEUE)?.into()];
        let tap = self.tap.try_clone()?;
        let mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let throttles = self.throttles.another();
        let largest = HEADER + LINK_HEADER + self.largest_packet(features);
        Ok(self.post.start(interrupt.clone(), |stop| {
            Worker::new(memory, interrupt, tap, queues, mergeable, largest, stop).throttled(throttles)
        })?)
    }

    fn reset(&mut self) {
        self.post.stop();
    }
}

impl NetDevice {
    /// How long a packet for the guest can be.
    fn largest_packet(&self, features: u64) -> usize {
        match features & (1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6) {
            0 => usize::from(self.mtu.max(1500)),
            _ => MAX_PACKET,
        }
    }
}
