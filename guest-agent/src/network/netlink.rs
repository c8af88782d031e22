//! rtnetlink(7), as far as the agent speaks it: links, addresses, routes and neighbours.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rvm_protocol::{Address, Neighbour, Route};

use super::socket::NetlinkSocket;
use crate::error::{Context, Result};

/// What is there is changed, what is not is made.
const SET: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// A socket that changes the network of the namespace it was opened in.
pub struct RouteSocket {
    socket: NetlinkSocket,
}

impl RouteSocket {
    /// A socket of the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let socket = NetlinkSocket::open().context(|| "opening a netlink socket")?;
        Ok(Self { socket })
    }

    /// The index of an interface.
    pub fn index(&self, name: &str) -> Result<u32> {
        if_nametoindex(name).context(|| format!("looking for the interface {name}"))
    }

    /// Brings an interface up.
    pub fn bring_up(&mut self, name: &str) -> Result<()> {
        let mut message = link(self.index(name)?);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.set_link(message, || format!("bringing the interface {name} up"))
    }

    /// Takes an interface down.
    pub fn take_down(&mut self, index: u32, name: &str) -> Result<()> {
        let mut message = link(index);
        message.header.change_mask = LinkFlags::Up;
        self.set_link(message, || format!("taking the interface {name} down"))
    }

    /// Renames an interface, which must be down.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<()> {
        let mut message = link(index);
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.set_link(message, || format!("naming an interface {name}"))
    }

    /// Sets the hardware address of an interface.
    pub fn set_hardware_address(&mut self, index: u32, name: &str, address: [u8; 6]) -> Result<()> {
        let mut message = link(index);
        message.attributes.push(LinkAttribute::Address(address.to_vec()));
        self.set_link(message, || format!("setting the hardware address of {name}"))
    }

    /// Sets the MTU of an interface.
    pub fn set_mtu(&mut self, index: u32, name: &str, mtu: u32) -> Result<()> {
        let mut message = link(index);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.set_link(message, || format!("setting the MTU of {name} to {mtu}"))
    }

    /// Adds an address, or changes it where it is there.
    pub fn add_address(&mut self, index: u32, name: &str, address: &Address) -> Result<()> {
        let message = address_message(index, address);
        self.socket
            .change(libc::RTM_NEWADDR, &message, SET)
            .context(|| format!("adding the address {}/{} to {name}", address.ip, address.prefix))
    }

    /// Removes an address; one that is gone already is no error.
    pub fn remove_address(&mut self, index: u32, name: &str, address: &Address) -> Result<()> {
        let removed = self.socket.change(libc::RTM_DELADDR, &address_message(index, address), 0);
        gone(removed)
            .context(|| format!("removing the address {}/{} from {name}", address.ip, address.prefix))
    }

    /// Adds a route to the main table, or changes it where it is there.
    pub fn add_route(&mut self, route: &Route) -> Result<()> {
        let index = route.interface.as_deref().map(|name| self.index(name)).transpose()?;
        let added = self.socket.change(libc::RTM_NEWROUTE, &route_message(route, index), SET);
        added.context(|| format!("adding the route to {}", way(route)))
    }

    /// Removes a route of the main table; one that is gone already, perhaps with its interface, is no error.
    pub fn remove_route(&mut self, route: &Route) -> Result<()> {
        let index = match route.interface.as_deref().map(if_nametoindex) {
            None => None,
            Some(Ok(index)) => Some(index),
            Some(Err(_)) => return Ok(()),
        };
        let removed = self.socket.change(libc::RTM_DELROUTE, &route_message(route, index), 0);
        gone(removed).context(|| format!("removing the route to {}", way(route)))
    }

    /// Adds a permanent neighbour, or changes it where it is there.
    pub fn add_neighbour(&mut self, neighbour: &Neighbour) -> Result<()> {
        let message = neighbour_message(neighbour, self.index(&neighbour.interface)?);
        self.socket
            .change(libc::RTM_NEWNEIGH, &message, SET)
            .context(|| format!("adding the neighbour {} of {}", neighbour.ip, neighbour.interface))
    }

    /// Removes a neighbour; one that is gone already is no error.
    pub fn remove_neighbour(&mut self, neighbour: &Neighbour) -> Result<()> {
        let Ok(index) = if_nametoindex(neighbour.interface.as_str()) else { return Ok(()) };
        let removed = self.socket.change(libc::RTM_DELNEIGH, &neighbour_message(neighbour, index), 0);
        gone(removed)
            .context(|| format!("removing the neighbour {} of {}", neighbour.ip, neighbour.interface))
    }

    fn set_link(&mut self, message: LinkMessage, what: impl FnOnce() -> String) -> Result<()> {
        self.socket.change(libc::RTM_SETLINK, &message, 0).context(what)
    }
}

/// What is to go and is not there any more needs no removing.
fn gone(removed: nix::Result<()>) -> nix::Result<()> {
    match removed {
        Err(Errno::ESRCH | Errno::ENOENT | Errno::ENODEV | Errno::EADDRNOTAVAIL) => Ok(()),
        removed => removed,
    }
}

/// Where a route leads, in words.
fn way(route: &Route) -> String {
    let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    format!("{}/{}{via}", route.destination.ip, route.destination.prefix)
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn address_message(index: u32, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address.ip), AddressAttribute::Address(address.ip)];
    match (address.ip, address.broadcast) {
        (IpAddr::V4(_), Some(IpAddr::V4(broadcast))) => {
            message.attributes.push(AddressAttribute::Broadcast(broadcast));
        }
        (IpAddr::V6(ip), _) => {
            // The host has found out already that nobody else uses it.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            if ip.is_unicast_link_local() {
                message.header.scope = AddressScope::Link;
            }
        }
        _ => {}
    }
    message
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.ip.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    message
}

fn route_message(route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination.ip);
    message.header.destination_prefix_length = route.destination.prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = route.scope.into();
    message.header.kind = RouteType::Unicast;
    if route.on_link {
        message.header.flags |= RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.destination.prefix > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.ip.into()));
    }
    let address = |ip: IpAddr| RouteAddress::from(ip);
    attributes.extend(route.gateway.map(address).map(RouteAttribute::Gateway));
    attributes.extend(route.source.map(address).map(RouteAttribute::PrefSource));
    attributes.extend(index.map(RouteAttribute::Oif));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    message
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn address(text: &str, prefix: u8) -> Address {
        Address { ip: text.parse().unwrap(), prefix, broadcast: None }
    }

    fn route(destination: &str, prefix: u8, gateway: Option<&str>) -> Route {
        Route {
            destination: address(destination, prefix),
            gateway: gateway.map(|text| text.parse().unwrap()),
            interface: Some("lo".into()),
            source: None,
            scope: if gateway.is_some() { 0 } else { libc::RT_SCOPE_LINK },
            metric: Some(7),
            on_link: false,
        }
    }

    /// A network namespace for this thread alone.
    fn own_network() -> Option<RouteSocket> {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("not tested: a network namespace cannot be made ({errno})");
            return None;
        }
        let mut socket = RouteSocket::open().unwrap();
        socket.bring_up("lo").unwrap();
        Some(socket)
    }

    /// The addresses of IPv4 in the namespace, as local routes show them.
    fn has_address(text: &str) -> bool {
        fs::read_to_string("/proc/thread-self/net/fib_trie").unwrap().contains(text)
    }

    #[test]
    fn addresses_are_set_twice_and_removed_twice() {
        let Some(mut socket) = own_network() else { return };
        let index = socket.index("lo").unwrap();
        let addresses = [address("10.1.2.3", 24), address("fd00::1", 64)];
        for _ in 0..2 {
            socket.set_mtu(index, "lo", 1400).unwrap();
            for address in &addresses {
                socket.add_address(index, "lo", address).unwrap();
            }
        }
        assert!(has_address("10.1.2.3") && has_address("127.0.0.1"));
        for _ in 0..2 {
            for address in &addresses {
                socket.remove_address(index, "lo", address).unwrap();
            }
        }
        assert!(!has_address("10.1.2.3") && has_address("127.0.0.1"));
        let link = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
        assert!(!link.contains("fd00"), "{link}");
    }

    #[test]
    fn what_is_gone_can_be_removed() {
        let Some(mut socket) = own_network() else { return };
        let index = socket.index("lo").unwrap();
        socket.add_address(index, "lo", &address("10.1.2.3", 24)).unwrap();
        let route = route("10.9.0.0", 16, None);
        let neighbour = Neighbour { interface: "lo".into(), ip: "10.1.2.9".parse().unwrap(), mac: [2; 6] };
        socket.add_route(&route).unwrap();
        for _ in 0..2 {
            socket.remove_route(&route).unwrap();
            socket.remove_neighbour(&neighbour).unwrap();
        }
        let elsewhere = Route { interface: Some("none".into()), ..route };
        socket.remove_route(&elsewhere).unwrap();
        assert_eq!(fs::read_to_string("/proc/thread-self/net/route").unwrap().lines().count(), 1);
    }

    #[test]
    fn routes_are_set_twice() {
        let Some(mut socket) = own_network() else { return };
        let index = socket.index("lo").unwrap();
        socket.add_address(index, "lo", &address("10.1.2.3", 24)).unwrap();
        for _ in 0..2 {
            socket.add_route(&route("10.9.0.0", 16, None)).unwrap();
            socket.add_route(&route("0.0.0.0", 0, Some("10.9.0.1"))).unwrap();
        }
        let table = fs::read_to_string("/proc/thread-self/net/route").unwrap();
        let lines: Vec<Vec<&str>> =
            table.lines().skip(1).map(|line| line.split_whitespace().take(3).collect()).collect();
        // Addresses are in network order, shown as little-endian numbers.
        assert!(lines.contains(&vec!["lo", "00000000", "0100090A"]), "{table}");
        assert!(lines.contains(&vec!["lo", "0000090A", "00000000"]), "{table}");
        assert_eq!(lines.len(), 2, "{table}");
    }

    #[test]
    fn a_refusal_names_what_was_asked() {
        let Some(mut socket) = own_network() else { return };
        let error = socket.add_route(&route("10.9.0.0", 16, Some("192.0.2.1"))).unwrap_err();
        assert_eq!(error.message, "adding the route to 10.9.0.0/16 via 192.0.2.1: network is unreachable");
        let error = socket.bring_up("none").unwrap_err();
        assert!(error.message.starts_with("looking for the interface none"), "{error}");
    }
}
