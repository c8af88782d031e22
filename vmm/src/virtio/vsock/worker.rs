//! What moves packets between the queues and the [muxer](super::muxer), on the event loop's thread.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::handle::{Command, Shared};
use super::muxer::{Change, Muxer, Token};
use super::packet::HEADER_LEN;
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::virtqueue::{QueueError, Virtqueue};

/// What woke the worker; greater numbers are connections.
const RECEIVE: Token = 0;
const TRANSMIT: Token = 1;
const EVENT: Token = 2;
const WAKE: Token = 3;

/// How many packets of each direction are moved before other devices of the loop get their turn.
const BATCH: usize = 128;

/// The event that tells the driver of lost connections: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How far the driver knows that its connections are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportReset {
    /// There is nothing to know.
    None,
    /// The event waits for a buffer.
    Due,
    /// The driver has it, but has not given the buffer back: so far it had offered this many.
    Unacknowledged(u16),
}

/// The device while the driver runs.
pub struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    /// Where packets for the guest go.
    receive: Virtqueue,
    /// Where packets of the guest come from.
    transmit: Virtqueue,
    event: Virtqueue,
    muxer: Muxer,
    shared: Arc<Shared>,
    transport_reset: TransportReset,
    stopped: bool,
}

impl Worker {
    /// A worker on these queues: receive, transmit, event.
    pub fn new(
        guest_cid: u64,
        memory: GuestMemory,
        interrupt: Interrupt,
        [receive, transmit, event]: [Virtqueue; 3],
        shared: Arc<Shared>,
    ) -> Self {
        let muxer = Muxer::new(guest_cid, shared.clone());
        let transport_reset = TransportReset::None;
        Self { memory, interrupt, receive, transmit, event, muxer, shared, transport_reset, stopped: false }
    }

    /// Moves a batch of packets each way, and tells the driver once.
    fn run(&mut self) -> Result<(), QueueError> {
        self.advance_transport_reset()?;
        self.take_packets()?;
        let congested = self.muxer.is_congested();
        self.give_packets()?;
        if congested && !self.muxer.is_congested() {
            self.transmit.kick_self();
        }
        for queue in [&mut self.receive, &mut self.transmit, &mut self.event] {
            queue.notify(&self.memory, &self.interrupt)?;
        }
        Ok(())
    }

    /// Takes packets from the guest.
    fn take_packets(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        for _ in 0..BATCH {
            if self.muxer.is_congested() {
                // The next buffers that the guest offers for our replies bring us back here.
                return Ok(());
            }
            let Some(chain) = self.transmit.pop(&memory)? else {
                if self.transmit.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            // A malformed chain has no header that could be answered.
            if let Ok(packet) = GuestBuffers::readable(&memory, chain) {
                self.muxer.receive(packet);
            }
            self.transmit.push_used(&memory, head, 0)?;
        }
        self.transmit.kick_self();
        Ok(())
    }

    /// Gives packets to the guest.
    fn give_packets(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        for _ in 0..BATCH {
            if !self.muxer.has_packet() || self.transport_reset != TransportReset::None {
                return Ok(());
            }
            let Some(chain) = self.receive.pop(&memory)? else {
                if self.receive.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            // A buffer without room for data would turn the next packet into an empty one.
            let buffer = GuestBuffers::writable(&memory, chain).ok().filter(|room| room.len() > HEADER_LEN);
            let Some(buffer) = buffer else {
                self.receive.push_used(&memory, head, 0)?;
                continue;
            };
            let Some(len) = self.muxer.next_packet(buffer) else {
                self.receive.undo_pop();
                return Ok(());
            };
            self.receive.push_used(&memory, head, len as u32)?;
        }
        self.receive.kick_self();
        Ok(())
    }

    /// Tells the driver that its connections are gone, and waits until it knows: a connection that it makes
    /// between would be taken for one of the old ones.
    fn advance_transport_reset(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        while self.transport_reset == TransportReset::Due {
            let Some(chain) = self.event.pop(&memory)? else {
                if self.event.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let room = GuestBuffers::writable(&memory, chain);
            let written = room.map_or(0, |mut room| room.write(&TRANSPORT_RESET));
            // Before the driver can see the event: afterwards it may have returned the buffer already.
            let offered = self.event.avail_index(&memory)?;
            self.event.push_used(&memory, head, written as u32)?;
            if written == TRANSPORT_RESET.len() {
                self.transport_reset = TransportReset::Unacknowledged(offered);
            }
        }
        if let TransportReset::Unacknowledged(offered) = self.transport_reset
            && self.event.enable_kicks_beyond(&memory, offered)?
        {
            self.transport_reset = TransportReset::None;
        }
        Ok(())
    }

    fn obey(&mut self) {
        for command in self.shared.take_commands() {
            match command {
                Command::Connect(port, host) => self.muxer.connect(port, host),
                Command::ResetTransport => {
                    self.muxer.clear();
                    self.transport_reset = TransportReset::Due;
                }
            }
        }
    }

    /// Applies to epoll what happened to the connections. An event for a socket that is closed but not removed
    /// would be taken for one of the next socket with that number.
    fn apply_changes(&mut self, ops: &mut EventOps<'_>) {
        for change in self.muxer.take_changes() {
            match change {
                Change::Add(token) => {
                    let Some((socket, interest)) = self.muxer.watched(token) else { continue };
                    if ops.add(Events::with_data(socket, token, interest)).is_err() {
                        self.muxer.refuse(token);
                        self.receive.kick_self();
                    }
                }
                Change::Modify(token) => {
                    let Some((socket, interest)) = self.muxer.watched(token) else { continue };
                    // It fails only for a socket that could not be added.
                    let _ = ops.modify(Events::with_data(socket, token, interest));
                }
                Change::Remove(socket) => {
                    // As above.
                    let _ = ops.remove(Events::empty(&socket));
                }
            }
        }
    }

    /// Leaves the queues alone until the driver resets the device.
    fn stop(&mut self, ops: &mut EventOps<'_>) {
        self.stopped = true;
        self.interrupt.needs_reset();
        self.muxer.clear();
        for queue in [&self.receive, &self.transmit, &self.event] {
            let _ = ops.remove(Events::empty(queue));
        }
        let _ = ops.remove(Events::empty(&self.shared.wake().as_fd()));
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.stopped {
            return;
        }
        match events.data() {
            RECEIVE => self.receive.acknowledge_kick(),
            TRANSMIT => self.transmit.acknowledge_kick(),
            EVENT => self.event.acknowledge_kick(),
            WAKE => self.obey(),
            token => self.muxer.host_event(token, events.event_set()),
        }
        if self.run().is_err() {
            self.stop(ops);
        }
        self.apply_changes(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let watched = [
            (RECEIVE, self.receive.as_raw_fd()),
            (TRANSMIT, self.transmit.as_raw_fd()),
            (EVENT, self.event.as_raw_fd()),
            (WAKE, self.shared.wake().as_fd().as_raw_fd()),
        ];
        for (token, fd) in watched {
            if ops.add(Events::with_data_raw(fd, token, EventSet::IN)).is_err() {
                self.stop(ops);
                return;
            }
        }
    }
}
