//! The guest's network: a copy of what the engine plumbed on the host.
//!
//! The same configuration may come again, changed: everything is set so that setting it twice is setting it
//! once, and addresses that are gone are removed.

pub mod netlink;
pub mod socket;

use std::fs;
use std::net::IpAddr;

use rvm_protocol::{Interface, NetworkConfig};

use self::netlink::RouteSocket;
use crate::error::Result;
use crate::slots;

/// Brings the loopback interface up, which gives it its addresses.
pub fn bring_loopback_up() -> Result<()> {
    RouteSocket::open()?.bring_up("lo")
}

/// Configures interfaces, routes and neighbours.
pub fn configure(config: &NetworkConfig) -> Result<()> {
    if *config == NetworkConfig::default() {
        return Ok(());
    }
    let mut socket = RouteSocket::open()?;
    for interface in &config.interfaces {
        configure_interface(&mut socket, interface)?;
    }
    // A gateway must be reachable by a route that exists already.
    let (direct, indirect): (Vec<_>, Vec<_>) =
        config.routes.iter().partition(|route| route.gateway.is_none());
    for route in direct.into_iter().chain(indirect) {
        socket.add_route(route)?;
    }
    for neighbour in &config.neighbours {
        socket.add_neighbour(neighbour)?;
    }
    Ok(())
}

fn configure_interface(socket: &mut RouteSocket, interface: &Interface) -> Result<()> {
    let found = slots::interface_of(interface.slot)?;
    let index = socket.index(&found)?;
    let name = &interface.name;
    if found != *name {
        // The kernel renames no interface that is up.
        socket.rename(index, name)?;
    }
    if hardware_address(name) != Some(interface.mac) {
        socket.set_hardware_address(index, name, interface.mac)?;
    }
    socket.set_mtu(index, name, interface.mtu)?;
    configure_ipv6(interface);
    socket.remove_other_addresses(index, interface)?;
    // The addresses first: what comes in as soon as the interface is up shall find them.
    for address in &interface.addresses {
        socket.add_address(index, name, address)?;
    }
    socket.bring_up(name)
}

fn hardware_address(interface: &str) -> Option<[u8; 6]> {
    parse_hardware_address(&fs::read_to_string(format!("/sys/class/net/{interface}/address")).ok()?)
}

fn parse_hardware_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// As on the host: where the engine gave no IPv6 address the interface has none, not even of its own making.
fn configure_ipv6(interface: &Interface) {
    let has_ipv6 = interface.addresses.iter().any(|address| matches!(address.ip, IpAddr::V6(_)));
    let path = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", interface.name);
    // A kernel without IPv6 has no such file, and nothing to switch off.
    let _ = fs::write(path, if has_ipv6 { "0" } else { "1" });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_read() {
        assert_eq!(parse_hardware_address("02:42:ac:11:00:02\n"), Some([2, 0x42, 0xac, 0x11, 0, 2]));
        for text in ["", "02:42", "02:42:ac:11:00:02:03", "x:42:ac:11:00:02", "100:42:ac:11:00:02"] {
            assert_eq!(parse_hardware_address(text), None, "{text}");
        }
    }
}
