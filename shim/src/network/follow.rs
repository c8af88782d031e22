//! What the engine changes while the container runs (`docker network connect` and its kin) is followed: a process in the
//! container's network namespace listens, connects what is new, and tells the monitor.
//!
//! It takes the right to administer networks, which would let whoever has it reach into the host's. So it is not the monitor
//! that does it, which a guest talks to: this process hears the kernel alone. It begins where `start` has ended,
//! and ends with the monitor.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use caps::Capability;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::cable;
use super::netlink::{Netlink, News};
use super::survey::Survey;
use super::{Connected, NetworkError, Wiring, wiring};
use crate::cause::Cause;
use crate::cgroup::{CgroupError, HostCgroup};
use crate::control::{Command, Connection, ControlError, Packet, receive, send};
use crate::logging::{Log, LogFormat};
use crate::reexec::{self, Start};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "network";

/// Why nobody follows.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The process was not started by `start`.
    #[error("it is started by 'rvm start', not by hand")]
    NotStartedByStart,
    /// The process could not be started.
    #[error("the process that follows them could not be started: {0}")]
    Spawn(Cause),
    /// The conversation failed.
    #[error("the process that follows them cannot be talked to: {0}")]
    Control(#[from] ControlError),
    /// It could not be put where the container's other processes are.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It could not give up what it does not need.
    #[error("privileges could not be given up: {0}")]
    Confine(Cause),
    /// The namespace.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// From `start` to the process. Its descriptors are a connection to the monitor, the namespace, and the log if there is one.
#[derive(Debug, Serialize, Deserialize)]
pub struct Assignment {
    /// The container's ID.
    pub id: String,
    /// What the monitor knows.
    pub wiring: Wiring,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// Starts the process in the cgroup where it ends with the container, whatever happens. Nothing waits for it: it looks for
/// itself whether something has changed since.
pub fn spawn(
    assignment: &Assignment,
    cgroup: Option<&HostCgroup>,
    connection: &Connection,
    netns: BorrowedFd<'_>,
    log: &Log,
) -> Result<(), FollowError> {
    let spawn = || {
        // The standard streams are the engine's, which waits until they are closed.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let title = format!("rvm: {}", assignment.id);
        let place = cgroup.and_then(HostCgroup::open);
        let place = place.as_ref().map(AsFd::as_fd);
        let terminal = Some(null.as_fd());
        Start { title: &title, subcommand: SUBCOMMAND, terminal, cgroup: place }.spawn()
    };
    let started = spawn().map_err(|error| FollowError::Spawn(error.into()))?;
    // Without a word it ends when the socket is closed.
    started.enter(cgroup)?;
    let descriptors: Vec<_> =
        [connection.as_fd(), netns].into_iter().chain(log.file().map(AsFd::as_fd)).collect();
    Ok(send(&started.socket, assignment, &descriptors)?)
}

/// Runs as the process, until the monitor has ended.
pub fn run() -> Result<(), FollowError> {
    let socket = reexec::inherited_socket().map_err(|_| FollowError::NotStartedByStart)?;
    let Packet { message, descriptors } =
        receive::<Assignment>(&socket)?.ok_or(FollowError::NotStartedByStart)?;
    drop(socket);
    let Assignment { id, wiring, log_format } = message;
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().ok_or(ControlError::Unexpected);
    let (connection, netns) = (Connection::from(next()?), next()?);
    let log = Log::to_file(next().ok().map(File::from), log_format, false);
    let _ = nix::unistd::setsid();
    if let Err(error) = enter(netns).and_then(|()| Follower::new(&id, wiring, connection, &log).follow()) {
        log.warning_now(&format!("{id}: later changes of the network will not reach the guest: {error}"));
    }
    Ok(())
}

fn enter(netns: OwnedFd) -> Result<(), FollowError> {
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::Enter(error.into()))?;
    nix::sys::prctl::set_no_new_privs().map_err(|error| FollowError::Confine(error.into()))?;
    let kept = [Capability::CAP_NET_ADMIN].into();
    rvm_vmm::confine::keep_capabilities(&kept).map_err(|error| FollowError::Confine(error.into()))
}

/// The process's memory of the network.
struct Follower<'l> {
    id: &'l str,
    /// What the monitor knows.
    wiring: Wiring,
    connection: Connection,
    log: &'l Log,
    /// What was logged, so that it is logged once.
    told: BTreeSet<String>,
    /// Devices that could not be connected. To try again at each change would be a change.
    given_up: BTreeSet<u32>,
}

impl<'l> Follower<'l> {
    fn new(id: &'l str, wiring: Wiring, connection: Connection, log: &'l Log) -> Self {
        Follower { id, wiring, connection, log, told: BTreeSet::new(), given_up: BTreeSet::new() }
    }

    fn follow(mut self) -> Result<(), FollowError> {
        // Before it looks: what changes while it does comes after.
        let news = News::open()?;
        let mut netlink = Netlink::open()?;
        loop {
            news.clear();
            match self.look(&mut netlink).and_then(|connected| self.tell(&mut netlink, connected)) {
                Ok(()) => {}
                Err(FollowError::Control(ControlError::Closed | ControlError::Io(_))) => return Ok(()),
                Err(error) => self.complain(&error.to_string()),
            }
            if !wait(&news, &self.connection) {
                return Ok(());
            }
        }
    }

    /// What the network looks like, with what is new connected. What cannot be connected is left out.
    fn look(&mut self, netlink: &mut Netlink) -> Result<Connected, FollowError> {
        let mut survey = Survey::take(netlink)?;
        for obstacle in &survey.obstacles {
            self.complain(&obstacle.to_string());
        }
        let is_there = |device: &u32| survey.links.iter().any(|link| link.index == *device);
        if !self.wiring.devices.iter().all(is_there) {
            // There may be a place in the machine now.
            self.given_up.clear();
        }
        let (mut links, mut taps) = (Vec::new(), Vec::new());
        for link in std::mem::take(&mut survey.links) {
            if self.wiring.devices.contains(&link.index) {
                links.push(link);
            } else if !self.given_up.contains(&link.index) {
                match cable::lay(netlink, &link) {
                    Ok(tap) => {
                        taps.push(tap);
                        links.push(link);
                    }
                    Err(error) => {
                        self.given_up.insert(link.index);
                        self.complain(&error.to_string());
                    }
                }
            }
        }
        let is_known = |name: &str| links.iter().any(|link| link.interface.name == name);
        survey.routes.retain(|route| route.interface.as_deref().is_none_or(is_known));
        survey.neighbours.retain(|neighbour| is_known(&neighbour.interface));
        survey.links = links;
        Ok(Connected { wiring: wiring(survey), taps })
    }

    fn tell(&mut self, netlink: &mut Netlink, connected: Connected) -> Result<(), FollowError> {
        let Connected { wiring, taps } = connected;
        if wiring == self.wiring {
            return Ok(());
        }
        let descriptors: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
        let told = self.connection.order(&Command::Network(wiring.clone()), &descriptors);
        match told {
            Ok(()) => self.wiring = wiring,
            Err(error) => {
                let new = wiring.devices.into_iter().filter(|device| !self.wiring.devices.contains(device));
                for device in new {
                    cable::cut(netlink, device);
                    self.given_up.insert(device);
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn complain(&mut self, words: &str) {
        if self.told.insert(words.to_owned()) {
            self.log.warning_now(&format!(
                "{}: a change of the network does not reach the guest: {words}",
                self.id
            ));
        }
    }
}

/// Waits for a change; false once the monitor is gone.
fn wait(news: &News, connection: &Connection) -> bool {
    loop {
        // Of the connection nothing is waited for but its end, which poll tells unasked.
        let mut fds = [
            PollFd::new(news.as_fd(), PollFlags::POLLIN),
            PollFd::new(connection.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
            Ok(_) if fds[1].any().unwrap_or(true) => return false,
            Ok(_) => return true,
        }
    }
}
