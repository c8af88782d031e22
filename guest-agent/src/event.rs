//! The epoll instance of the agent, and the names of what it waits for.
//!
//! Everything is level-triggered: a handler does one bounded step and returns, and whatever is left brings
//! the next event, so that no stream can keep the loop from the others.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rvm_protocol::ProcessId;

use crate::stream::StreamId;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The control connection.
    Control,
    /// The signal descriptor: a child has ended.
    Signals,
    /// The event counters of the container's memory.
    Memory,
    /// The set-up channel of a process that is being launched.
    Setup(ProcessId),
    /// The pipe or terminal of a stream.
    Local(StreamId),
    /// The connection of a stream to the host.
    Connection(StreamId),
    /// The resolver's connection to the host.
    Resolver,
    /// Queries to the resolver as datagrams.
    ResolverDatagrams,
    /// A new connection to the resolver.
    ResolverListener,
    /// A connection to the resolver.
    ResolverClient(u32),
}

impl Target {
    fn to_data(self) -> u64 {
        let (kind, number) = match self {
            Target::Control => (0, 0),
            Target::Signals => (1, 0),
            Target::Memory => (2, 0),
            Target::Setup(ProcessId(id)) => (3, id),
            Target::Local(StreamId(id)) => (4, id),
            Target::Connection(StreamId(id)) => (5, id),
            Target::Resolver => (6, 0),
            Target::ResolverDatagrams => (7, 0),
            Target::ResolverListener => (8, 0),
            Target::ResolverClient(id) => (9, id),
        };
        (kind << 32) | u64::from(number)
    }

    fn from_data(data: u64) -> Option<Self> {
        let number = data as u32;
        Some(match data >> 32 {
            0 => Target::Control,
            1 => Target::Signals,
            2 => Target::Memory,
            3 => Target::Setup(ProcessId(number)),
            4 => Target::Local(StreamId(number)),
            5 => Target::Connection(StreamId(number)),
            6 => Target::Resolver,
            7 => Target::ResolverDatagrams,
            8 => Target::ResolverListener,
            9 => Target::ResolverClient(number),
            _ => return None,
        })
    }
}

/// An event: what it is about, and what is ready.
pub type Event = (Target, EpollFlags);

/// The epoll instance.
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// A poller that waits for nothing yet.
    pub fn new() -> nix::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Waits for `wanted` on a descriptor until it is closed or [changed](Self::change).
    pub fn add(&self, descriptor: impl AsFd, target: Target, wanted: EpollFlags) -> nix::Result<()> {
        self.epoll.add(descriptor, EpollEvent::new(wanted, target.to_data()))
    }

    /// Changes what is waited for from `current` to `wanted`. `None` takes the descriptor out altogether:
    /// even with no interest at all, epoll reports errors and hang-ups, for ever.
    pub fn change(
        &self,
        descriptor: impl AsFd,
        target: Target,
        current: &mut Option<EpollFlags>,
        wanted: Option<EpollFlags>,
    ) -> nix::Result<()> {
        if *current == wanted {
            return Ok(());
        }
        match (*current, wanted) {
            (None, Some(flags)) => self.add(descriptor, target, flags)?,
            (Some(_), Some(flags)) => {
                self.epoll.modify(descriptor, &mut EpollEvent::new(flags, target.to_data()))?;
            }
            (_, None) => self.epoll.delete(descriptor)?,
        }
        *current = wanted;
        Ok(())
    }

    /// Stops waiting on a descriptor that is about to be closed. Closing it is not enough: a child that was
    /// forked meanwhile may have a copy, and epoll would go on telling of it.
    pub fn remove(&self, descriptor: impl AsFd) {
        // One that is not waited for is none of epoll's.
        let _ = self.epoll.delete(descriptor);
    }

    /// Waits until something is ready, at most for so long.
    pub fn wait(&self, limit: Option<Duration>) -> nix::Result<Vec<Event>> {
        let mut events = [EpollEvent::empty(); 32];
        // In milliseconds, rounded up: whoever waits for a moment shall find it has come.
        let limit = limit.map(|limit| limit.as_nanos().div_ceil(1_000_000).min(60_000) as u16);
        match self.epoll.wait(&mut events, limit.map_or(EpollTimeout::NONE, EpollTimeout::from)) {
            Ok(count) => Ok(events
                .iter()
                .take(count)
                .filter_map(|event| Some((Target::from_data(event.data())?, event.events())))
                .collect()),
            Err(Errno::EINTR) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_the_way_through_the_kernel() {
        for target in [
            Target::Control,
            Target::Signals,
            Target::Memory,
            Target::Setup(ProcessId(u32::MAX)),
            Target::Local(StreamId(7)),
            Target::Connection(StreamId(u32::MAX)),
            Target::Resolver,
            Target::ResolverDatagrams,
            Target::ResolverListener,
            Target::ResolverClient(u32::MAX),
        ] {
            assert_eq!(Target::from_data(target.to_data()), Some(target));
        }
        assert_eq!(Target::from_data(u64::MAX), None);
    }
}
