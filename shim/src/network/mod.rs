//! The container's network: what the engine plumbed in its namespace, led into the virtual machine.
//!
//! Each device of the namespace gets a tap beside it, and traffic control makes the two one cable
//! ([`redirect`]). The guest's interface gets the same name, hardware address, MTU, addresses and routes.

mod netlink;
mod redirect;
mod survey;
mod tap;
#[cfg(test)]
mod tests;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::sched::{CloneFlags, setns, unshare};
use rvm_protocol::{Interface, Neighbour, Route};

use crate::cause::Cause;
use netlink::Netlink;
use survey::Link;
use tap::Tap;

/// Why a network namespace could not be read or connected.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace could not be entered.
    #[error("the container's network namespace could not be entered: {0}")]
    Enter(Cause),
    /// The netlink socket failed.
    #[error("the kernel's network configuration could not be reached: {0}")]
    Socket(Cause),
    /// The kernel's answer could not be read.
    #[error("the container's network configuration could not be read: {0}")]
    Read(Cause),
    /// A device that is neither veth, macvlan, ipvlan nor plain Ethernet.
    #[error("network interface {name} is a {kind}, which cannot be connected with a microVM")]
    UnknownKind {
        /// Its name in the namespace.
        name: String,
        /// The kernel's name of its kind.
        kind: String,
    },
    /// The tun driver is absent.
    #[error("/dev/net/tun could not be opened: {0}; load the module tun")]
    TunDevice(Cause),
    /// A tap could not be made.
    #[error("a tap device could not be made: {0}")]
    Tap(Cause),
    /// A tap could not be set up.
    #[error("the tap device {name} could not be set up: {cause}")]
    TapSetup {
        /// The tap's name.
        name: String,
        /// What the kernel answered.
        cause: Cause,
    },
    /// Traffic control refused.
    #[error(
        "traffic between the container's interface and its tap could not be redirected: {0}; load the modules \
         sch_ingress, act_mirred and cls_u32"
    )]
    Redirect(Cause),
    /// Something takes the traffic of the interface already: another container in the same namespace, or a policy.
    #[error(
        "network interface {name} has traffic control rules already: another container uses this namespace, or a \
         policy is set; give each container a network namespace of its own"
    )]
    Taken {
        /// Its name in the namespace.
        name: String,
    },
    /// A route with several next hops, or one of the other address family.
    #[error("the route to {destination} cannot be given to a microVM: it has {what}")]
    Route {
        /// The destination network.
        destination: String,
        /// What is not known to the guest.
        what: &'static str,
    },
    /// The thread that works in the namespace could not be started, or failed.
    #[error("the thread for the container's network namespace failed")]
    Thread,
}

/// A connected network: what the guest shall configure, and the taps that lead there.
#[derive(Debug, Default)]
pub struct Connected {
    /// The interfaces with their taps. `slot` is 0: the monitor fills it in when it plugs the device.
    pub interfaces: Vec<(Interface, OwnedFd)>,
    /// Routes that the addresses alone do not imply.
    pub routes: Vec<Route>,
    /// Neighbours that were entered by hand.
    pub neighbours: Vec<Neighbour>,
}

/// Reads the namespace and makes a tap for each of its devices. On an error no redirection stays behind.
pub fn connect(netns: BorrowedFd<'_>) -> Result<Connected, NetworkError> {
    within(netns, || {
        let mut netlink = Netlink::open()?;
        let links = survey::links(&mut netlink)?;
        let routes = survey::routes(&mut netlink, &links)?;
        let neighbours = survey::neighbours(&mut netlink, &links)?;
        let taps = cables(&mut netlink, &links)?;
        let interfaces = links.into_iter().map(|link| link.interface).zip(taps).collect();
        Ok(Connected { interfaces, routes, neighbours })
    })
}

/// Gives the devices of a namespace that outlives the container back to the host's stack. The taps went with
/// the monitor; what leads to a tap that exists is the work of a later container, and stays.
pub fn disconnect(netns: BorrowedFd<'_>) -> Result<(), NetworkError> {
    within(netns, || {
        let mut netlink = Netlink::open()?;
        let links = survey::links(&mut netlink)?;
        for link in &links {
            if redirect::is_left_behind(&mut netlink, link.index)? {
                part_all(&mut netlink, std::slice::from_ref(link));
            }
        }
        Ok(())
    })
}

/// Tries in a namespace of its own whether this host can connect a container's network. It takes root.
pub fn probe() -> Result<(), NetworkError> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::Enter(error.into()))?;
        let mut netlink = Netlink::open()?;
        let (one, other) = (tap::create()?, tap::create()?);
        redirect::join(&mut netlink, index_of(&one)?, index_of(&other)?)
    })
}

/// Runs something on a thread of its own inside a network namespace.
fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    on_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::Enter(error.into()))?;
        work()
    })
}

/// A thread can change its network namespace without the rest of the process.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T, NetworkError> + Send) -> Result<T, NetworkError> {
    thread::scope(|scope| scope.spawn(work).join().map_err(|_| NetworkError::Thread)?)
}

fn cables(netlink: &mut Netlink, links: &[Link]) -> Result<Vec<OwnedFd>, NetworkError> {
    let mut taps = Vec::new();
    for (done, link) in links.iter().enumerate() {
        match cable(netlink, link) {
            Ok(tap) => taps.push(tap),
            Err(error) => {
                // Of the others only: this one may be in somebody else's use.
                part_all(netlink, &links[..done]);
                return Err(error);
            }
        }
    }
    Ok(taps)
}

fn cable(netlink: &mut Netlink, link: &Link) -> Result<OwnedFd, NetworkError> {
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
        .inspect_err(|_| part_all(netlink, std::slice::from_ref(link)))?;
    Ok(fd)
}

fn index_of(tap: &Tap) -> Result<u32, NetworkError> {
    nix::net::if_::if_nametoindex(tap.name.as_str()).map_err(|error| NetworkError::Tap(error.into()))
}

fn part_all(netlink: &mut Netlink, links: &[Link]) {
    for link in links {
        // The device may have been taken away meanwhile, with its redirection.
        let _ = redirect::part(netlink, link.index);
    }
}
