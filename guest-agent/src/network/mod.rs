//! The guest's network: a copy of what the engine plumbed on the host.
//!
//! The configuration comes again, changed, when the engine plumbs a running container's namespace: everything is set so
//! that setting it twice is setting it once, and what is gone is removed.

pub mod netlink;
pub mod socket;

use std::fs;
use std::net::IpAddr;

use rvm_protocol::{HOST_PORTS, Interface, NetworkConfig};

use self::netlink::RouteSocket;
use crate::error::Result;
use crate::slots;

/// Brings the loopback interface up, which gives it its addresses.
pub fn bring_loopback_up() -> Result<()> {
    RouteSocket::open()?.bring_up("lo")
}

/// The network as the host wants it.
#[derive(Default)]
pub struct Network {
    config: NetworkConfig,
}

impl Network {
    /// Makes interfaces, routes and neighbours what the host wants them to be now. What processes of the container have
    /// configured is theirs.
    pub fn configure(&mut self, config: &NetworkConfig) -> Result<()> {
        if *config == self.config {
            return Ok(());
        }
        let mut socket = RouteSocket::open()?;
        self.remove_what_is_gone(&mut socket, config)?;
        name_interfaces(&mut socket, &config.interfaces)?;
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
        reserve_ports();
        self.config = config.clone();
        Ok(())
    }

    fn remove_what_is_gone(&self, socket: &mut RouteSocket, config: &NetworkConfig) -> Result<()> {
        for neighbour in self.config.neighbours.iter().filter(|old| !config.neighbours.contains(old)) {
            socket.remove_neighbour(neighbour)?;
        }
        for route in self.config.routes.iter().filter(|old| !config.routes.contains(old)) {
            socket.remove_route(route)?;
        }
        for old in &self.config.interfaces {
            let Some(new) = config.interfaces.iter().find(|new| new.slot == old.slot) else {
                slots::vacate(old.slot)?;
                continue;
            };
            // One that the container has renamed is found by its slot.
            let name = slots::interface_of(old.slot)?;
            let index = socket.index(&name)?;
            for address in old.addresses.iter().filter(|address| !new.addresses.contains(address)) {
                socket.remove_address(index, &name, address)?;
            }
        }
        Ok(())
    }
}

fn name_interfaces(socket: &mut RouteSocket, interfaces: &[Interface]) -> Result<()> {
    let found = interfaces.iter().map(|interface| slots::interface_of(interface.slot));
    let found: Vec<String> = found.collect::<Result<_>>()?;
    let wanted = interfaces.iter().map(|interface| interface.name.as_str());
    give_names(socket, &found.iter().map(String::as_str).zip(wanted).collect::<Vec<_>>())
}

/// Gives interfaces, by the names that they have, those that they shall have. The kernel numbers them in the order of
/// their slots, the engine as it likes, so one may have the name that another shall get.
fn give_names(socket: &mut RouteSocket, names: &[(&str, &str)]) -> Result<()> {
    let indexes: Vec<u32> = names.iter().map(|(found, _)| socket.index(found)).collect::<Result<_>>()?;
    for (index, (_, name)) in indexes.iter().zip(names) {
        let holder = socket.index(name).ok();
        if holder == Some(*index) {
            continue;
        }
        if let Some(holder) = holder.filter(|holder| indexes.contains(holder)) {
            // The kernel puts a number that is free.
            socket.take_down(holder, name)?;
            socket.rename(holder, "moved%d")?;
        }
        // The kernel renames no interface that is up.
        socket.take_down(*index, name)?;
        socket.rename(*index, name)?;
    }
    Ok(())
}

fn configure_interface(socket: &mut RouteSocket, interface: &Interface) -> Result<()> {
    let name = &interface.name;
    let index = socket.index(name)?;
    if hardware_address(name) != Some(interface.mac) {
        socket.set_hardware_address(index, name, interface.mac)?;
    }
    socket.set_mtu(index, name, interface.mtu)?;
    configure_ipv6(interface);
    // The addresses first: what comes in as soon as the interface is up shall find them.
    for address in &interface.addresses {
        socket.add_address(index, name, address)?;
    }
    socket.bring_up(name)
}

/// Answers to these ports do not come here.
fn reserve_ports() {
    let (first, last) = (HOST_PORTS.start(), HOST_PORTS.end());
    // Every kernel of ours has the file; without it, a connection in some hundreds would be lost.
    let _ = fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", format!("{first}-{last}"));
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
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn ip(arguments: &str) -> bool {
        Command::new("ip").args(arguments.split(' ')).output().is_ok_and(|output| output.status.success())
    }

    #[test]
    fn names_are_given_in_any_order() {
        let made = unshare(CloneFlags::CLONE_NEWNET).is_ok()
            && ip("link add eth0 type veth peer name eth1")
            && ip("link add eth2 type dummy");
        if !made {
            eprintln!("not tested: this kernel makes no network namespaces, or no devices in them");
            return;
        }
        let mut socket = RouteSocket::open().unwrap();
        let before = ["eth0", "eth1", "eth2"].map(|name| socket.index(name).unwrap());
        // A swap; and one takes the very name that the other is put aside under.
        give_names(&mut socket, &[("eth0", "eth1"), ("eth1", "moved0"), ("eth2", "eth0")]).unwrap();
        assert_eq!(["eth1", "moved0", "eth0"].map(|name| socket.index(name).unwrap()), before);
        give_names(&mut socket, &[("eth1", "eth1"), ("moved0", "net")]).unwrap();
        assert_eq!(["eth1", "net", "eth0"].map(|name| socket.index(name).unwrap()), before);
        // What is not ours stays as it is.
        let error = give_names(&mut socket, &[("eth1", "eth0")]).unwrap_err();
        assert_eq!(error.message, "naming an interface eth0: file exists");
        assert_eq!(socket.index("eth0").unwrap(), before[2]);
    }

    #[test]
    fn a_hardware_address_is_read() {
        assert_eq!(parse_hardware_address("02:42:ac:11:00:02\n"), Some([2, 0x42, 0xac, 0x11, 0, 2]));
        for text in ["", "02:42", "02:42:ac:11:00:02:03", "x:42:ac:11:00:02", "100:42:ac:11:00:02"] {
            assert_eq!(parse_hardware_address(text), None, "{text}");
        }
    }
}
