//! What the guest's network shall look like: a copy of what the engine plumbed in the container's namespace.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Ports of the container's addresses at which the host's own stack receives, in the container's network namespace:
/// engines ask name servers of the outside from there. The guest draws none of them for its connections.
pub const HOST_PORTS: RangeInclusive<u16> = 65_024..=65_535;

/// Everything the agent configures, in the order of its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The interfaces besides `lo`, which is always up.
    pub interfaces: Vec<Interface>,
    /// Routes that the addresses alone do not imply.
    pub routes: Vec<Route>,
    /// Neighbours that the engine entered by hand.
    pub neighbours: Vec<Neighbour>,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The virtio-mmio slot into which the device was plugged.
    pub slot: u8,
    /// Its name in the container, such as `eth0`.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address with the length of its network prefix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Length of the network prefix, in bits.
    pub prefix: u8,
    /// The broadcast address, where one was set.
    pub broadcast: Option<IpAddr>,
}

/// One route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The destination network; its `prefix` is 0 for the default route.
    pub destination: Address,
    /// The next hop; none for a network that is directly reached.
    pub gateway: Option<IpAddr>,
    /// Name of the interface, where the route names one.
    pub interface: Option<String>,
    /// The address that packets leave with, where set.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*` of rtnetlink(7).
    pub scope: u8,
    /// The route's priority; lower wins.
    pub metric: Option<u32>,
    /// Whether the gateway is reached although no address's network holds it (`RTNH_F_ONLINK`).
    pub on_link: bool,
}

/// A permanent entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Name of the interface.
    pub interface: String,
    /// The neighbour's address.
    pub ip: IpAddr,
    /// The neighbour's hardware address.
    pub mac: [u8; 6],
}
