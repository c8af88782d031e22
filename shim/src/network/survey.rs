//! What an engine plumbed in a network namespace: links, addresses, routes, neighbours.

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rvm_protocol::{Address, Interface, Neighbour, Route};

use super::NetworkError;
use super::netlink::Netlink;
use super::tap;

/// A device that shall become an interface of the guest.
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// What the guest's interface shall look like.
    pub interface: Interface,
}

/// What a network namespace holds for the guest.
#[derive(Default)]
pub struct Survey {
    /// Devices, in the order of their index.
    pub links: Vec<Link>,
    /// Routes that the addresses alone do not imply, those without a gateway first.
    pub routes: Vec<Route>,
    /// Neighbours that were entered by hand.
    pub neighbours: Vec<Neighbour>,
    /// What the guest cannot have, and why.
    pub obstacles: Vec<NetworkError>,
}

impl Survey {
    /// Reads the namespace of the socket.
    pub fn take(netlink: &mut Netlink) -> Result<Survey, NetworkError> {
        let mut survey = Survey::default();
        survey.read_links(netlink)?;
        survey.read_routes(netlink)?;
        survey.neighbours = neighbours(netlink, &survey.links)?;
        Ok(survey)
    }

    /// Reads the devices that carry the container's network, with their addresses.
    fn read_links(&mut self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        for object in netlink.list(RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(message) = object {
                match link(&message) {
                    Ok(link) => self.links.extend(link),
                    Err(obstacle) => self.obstacles.push(obstacle),
                }
            }
        }
        for object in netlink.list(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
            if let RouteNetlinkMessage::NewAddress(message) = object
                && let Some(link) = self.links.iter_mut().find(|link| link.index == message.header.index)
            {
                link.interface.addresses.extend(address(&message));
            }
        }
        Ok(())
    }

    /// Reads the routes of the main table that the addresses alone do not imply.
    fn read_routes(&mut self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            for object in netlink.list(RouteNetlinkMessage::GetRoute(request))? {
                // A kernel without one of the families answers with the routes of the other.
                if let RouteNetlinkMessage::NewRoute(message) = object
                    && message.header.address_family == family
                {
                    match route(&message, &self.links) {
                        Ok(route) => self.routes.extend(route),
                        Err(obstacle) => self.obstacles.push(obstacle),
                    }
                }
            }
        }
        // A gateway has to be reachable when a route names it, so routes without one come first.
        self.routes.sort_by_key(|route| route.gateway.is_some());
        Ok(())
    }
}

/// The device as the guest shall see it; nothing for one that is not in use.
fn link(message: &LinkMessage) -> Result<Option<Link>, NetworkError> {
    let (mut name, mut mac, mut mtu, mut kind) = (String::new(), None, 1500, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // The kernel puts tunnel devices that nobody uses into each new namespace; they are down.
    let unused = !message.header.flags.contains(LinkFlags::Up);
    if unused || message.header.flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    if kind == Some(InfoKind::Tun) && name.starts_with(tap::PREFIX) {
        return Ok(None);
    }
    let connectable =
        matches!(kind, None | Some(InfoKind::Veth | InfoKind::MacVlan | InfoKind::IpVlan | InfoKind::Netkit));
    match mac {
        Some(mac) if connectable && message.header.link_layer_type == LinkLayerType::Ether => {
            let interface = Interface { slot: 0, name, mac, mtu, addresses: Vec::new() };
            Ok(Some(Link { index: message.header.index, interface }))
        }
        _ => {
            let kind = kind.map_or_else(|| "device without Ethernet".to_owned(), |kind| kind.to_string());
            Err(NetworkError::UnknownKind { name, kind })
        }
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut peer, mut broadcast) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(IpAddr::V4(*ip)),
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    // The guest's kernel makes its link-local address itself, from the same hardware address.
    let made_by_kernel = ip.is_ipv6() && message.header.scope == AddressScope::Link;
    (!made_by_kernel).then_some(Address { ip, prefix: message.header.prefix_len, broadcast })
}

fn route(message: &RouteMessage, links: &[Link]) -> Result<Option<Route>, NetworkError> {
    let header = &message.header;
    let implied = header.protocol == RouteProtocol::Kernel;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast || implied {
        return Ok(None);
    }
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        _ => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut route = Route {
        destination: Address { ip: unspecified, prefix: header.destination_prefix_length, broadcast: None },
        gateway: None,
        interface: None,
        source: None,
        scope: header.scope.into(),
        metric: None,
        on_link: header.flags.contains(RouteFlags::Onlink),
    };
    let mut beyond = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => route.destination.ip = ip_of(ip).unwrap_or(unspecified),
            RouteAttribute::Gateway(ip) => route.gateway = ip_of(ip),
            RouteAttribute::PrefSource(ip) => route.source = ip_of(ip),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            RouteAttribute::MultiPath(_) => beyond = Some("several next hops"),
            RouteAttribute::Via(_) => beyond = Some("a next hop of the other address family"),
            // A route over a device that the guest does not get, such as `lo`, is not for the guest.
            RouteAttribute::Oif(index) => match links.iter().find(|link| link.index == *index) {
                Some(link) => route.interface = Some(link.interface.name.clone()),
                None => return Ok(None),
            },
            _ => {}
        }
    }
    match beyond {
        None => Ok(Some(route)),
        Some(what) => {
            let destination = format!("{}/{}", route.destination.ip, route.destination.prefix);
            Err(NetworkError::Route { destination, what })
        }
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// Reads the neighbours that were entered by hand.
fn neighbours(netlink: &mut Netlink, links: &[Link]) -> Result<Vec<Neighbour>, NetworkError> {
    let objects = netlink.list(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
    Ok(objects
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewNeighbour(message) => neighbour(&message, links),
            _ => None,
        })
        .collect())
}

fn neighbour(message: &NeighbourMessage, links: &[Link]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let link = links.iter().find(|link| link.index == message.header.ifindex)?;
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                ip = Some(IpAddr::V4(*address))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                ip = Some(IpAddr::V6(*address))
            }
            NeighbourAttribute::LinkLayerAddress(address) => {
                mac = <[u8; 6]>::try_from(address.as_slice()).ok()
            }
            _ => {}
        }
    }
    Some(Neighbour { interface: link.interface.name.clone(), ip: ip?, mac: mac? })
}
