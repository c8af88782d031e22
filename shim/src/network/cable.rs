//! The cable between a device of the namespace and a virtual machine: a tap, and the rules that make the two one.

use std::os::fd::OwnedFd;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::netlink::Netlink;
use super::survey::Link;
use super::tap::{self, Tap};
use super::{NetworkError, redirect, share};

/// A tap for each device; on an error, none.
pub fn lay_all(netlink: &mut Netlink, links: &[Link]) -> Result<Vec<OwnedFd>, NetworkError> {
    let mut taps = Vec::new();
    for (done, link) in links.iter().enumerate() {
        match lay(netlink, link) {
            Ok(tap) => taps.push(tap),
            Err(error) => {
                // Of the others only: this one may be in somebody else's use.
                links[..done].iter().for_each(|link| cut(netlink, link.index));
                return Err(error);
            }
        }
    }
    Ok(taps)
}

/// A tap for a device.
pub fn lay(netlink: &mut Netlink, link: &Link) -> Result<OwnedFd, NetworkError> {
    if redirect::is_taken(netlink, link.index)? {
        return Err(NetworkError::Taken { name: link.interface.name.clone() });
    }
    let tap = tap::create()?;
    let index = index_of(&tap)?;
    let Tap { fd, name } = tap;
    let mut change = LinkMessage::default();
    change.header.index = index;
    change.header.flags = LinkFlags::Up;
    change.header.change_mask = LinkFlags::Up;
    change.attributes.push(LinkAttribute::Mtu(link.interface.mtu));
    netlink
        .change(RouteNetlinkMessage::SetLink(change), 0)
        .map_err(|error| NetworkError::TapSetup { name, cause: error.into() })?;
    redirect::join(netlink, link.index, index)
        .and_then(|()| share::leave_to_host(netlink, link.index, index))
        .inspect_err(|_| cut(netlink, link.index))?;
    Ok(fd)
}

/// Gives a device back to the host's stack.
pub fn cut(netlink: &mut Netlink, device: u32) {
    // The device may have been taken away meanwhile, with its redirection.
    let _ = redirect::part(netlink, device);
}

/// The number of a tap in its namespace.
pub fn index_of(tap: &Tap) -> Result<u32, NetworkError> {
    nix::net::if_::if_nametoindex(tap.name.as_str()).map_err(|error| NetworkError::Tap(error.into()))
}
