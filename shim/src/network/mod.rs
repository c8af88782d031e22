//! The container's network: what the engine plumbed in its namespace, led into the virtual machine.
//!
//! Each device of the namespace gets a tap beside it, and traffic control makes the two one cable
//! ([`redirect`]), but for what the host's own stack there is to receive ([`share`]). The guest's interface gets the same
//! name, hardware address, MTU, addresses and routes. What the engine changes later is [followed](follow).

pub mod follow;

mod cable;
mod netlink;
mod redirect;
mod share;
mod survey;
mod tap;
#[cfg(test)]
mod tests;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rvm_protocol::NetworkConfig;
use serde::{Deserialize, Serialize};

use crate::cause::Cause;
use netlink::Netlink;
use survey::Survey;

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

/// A container's network, as the namespace has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wiring {
    /// What the guest shall configure. The slots are 0: the monitor fills them in when it plugs the devices.
    pub config: NetworkConfig,
    /// The namespace's number of each interface's device, in the order of the interfaces.
    pub devices: Vec<u32>,
}

/// A network that is connected.
#[derive(Debug, Default)]
pub struct Connected {
    /// All of it.
    pub wiring: Wiring,
    /// A tap for each of the devices that were not connected before, in their order.
    pub taps: Vec<OwnedFd>,
}

/// Reads the namespace and makes a tap for each of its devices. On an error no redirection stays behind.
pub fn connect(netns: BorrowedFd<'_>) -> Result<Connected, NetworkError> {
    within(netns, || {
        let mut netlink = Netlink::open()?;
        let mut survey = Survey::take(&mut netlink)?;
        if !survey.obstacles.is_empty() {
            return Err(survey.obstacles.swap_remove(0));
        }
        if !survey.links.is_empty() {
            share::keep_ports();
        }
        let taps = cable::lay_all(&mut netlink, &survey.links)?;
        Ok(Connected { wiring: wiring(survey), taps })
    })
}

fn wiring(survey: Survey) -> Wiring {
    let (devices, interfaces) = survey.links.into_iter().map(|link| (link.index, link.interface)).unzip();
    let config = NetworkConfig { interfaces, routes: survey.routes, neighbours: survey.neighbours };
    Wiring { config, devices }
}

/// Gives the devices of a namespace that outlives the container back to the host's stack. The taps went with
/// the monitor; what leads to a tap that exists is the work of a later container, and stays.
pub fn disconnect(netns: BorrowedFd<'_>) -> Result<(), NetworkError> {
    within(netns, || {
        let mut netlink = Netlink::open()?;
        for link in Survey::take(&mut netlink)?.links {
            if redirect::is_left_behind(&mut netlink, link.index)? {
                cable::cut(&mut netlink, link.index);
                share::release_ports();
            }
        }
        Ok(())
    })
}

/// Tries in a namespace of its own whether this host can connect a container's network. It takes root.
pub fn probe() -> Result<(), NetworkError> {
    apart(|| {
        let mut netlink = Netlink::open()?;
        let (one, other) = (tap::create()?, tap::create()?);
        redirect::join(&mut netlink, cable::index_of(&one)?, cable::index_of(&other)?)
    })
}

/// A tap in a namespace of its own, which ends with it.
pub fn tap_apart() -> Result<OwnedFd, NetworkError> {
    apart(|| Ok(tap::create()?.fd))
}

/// Runs something in a network namespace that nobody else is in.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, NetworkError> + Send) -> Result<T, NetworkError> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::Enter(error.into()))?;
        work()
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
