//! Frames between queues and tap.
//!
//! The tap is watched for changes (edge-triggered), and read only while the guest has buffers: a guest without any
//! costs nothing but one frame, and the others wait in the tap's own queue, which drops what is too much.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use super::rate::Throttle;
use super::room::{Found, Room};
use super::tap::Tap;
use super::{HEADER, LINK_HEADER, MAX_PACKET, Throttles};
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::worker::{self, Notify, Stop};
use event_manager::EventSet;
use nix::errno::Errno;

/// How many frames go one way before other devices of the loop get their turn.
const BATCH: usize = 64;
/// Longer frames are read into the guest's buffers themselves.
const LONG: usize = 4096;

/// What the device runs on the loop.
pub(super) struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    tap: Tap,
    receive: Virtqueue,
    transmit: Virtqueue,
    /// Whether a frame may be spread over several buffers.
    mergeable: bool,
    /// The longest frame for the guest, with its header.
    largest: usize,
    /// Whether the tap may have frames.
    tap_ready: bool,
    /// Where a short frame is read first.
    aside: Vec<u8>,
    /// Length of the frame there that waits for buffers, or 0.
    waiting: usize,
    /// Whether the last frame was long, and so the next may be.
    long: bool,
    throttles: Throttles,
    stop: Stop,
}

/// Why nothing more can be received now.
enum Pause {
    /// The tap has no frames.
    Tap,
    /// The guest has no buffers, or not enough.
    Buffers,
    /// The line is not free.
    Line,
}

impl Worker {
    /// A worker for a tap and the queues to receive and to transmit.
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Interrupt,
        tap: Tap,
        [receive, transmit]: [Virtqueue; 2],
        mergeable: bool,
        largest: usize,
        stop: Stop,
    ) -> Worker {
        Worker {
            memory,
            interrupt,
            tap,
            receive,
            transmit,
            mergeable,
            largest,
            // Frames that came before are not announced again.
            tap_ready: true,
            aside: Vec::new(),
            waiting: 0,
            long: false,
            throttles: Throttles::default(),
            stop,
        }
    }

    /// The same within limits.
    pub(super) fn throttled(self, throttles: Throttles) -> Worker {
        Worker { throttles, ..self }
    }

    /// Sends one batch of frames; where they are limited, one frame.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let throttle = &mut self.throttles.transmit;
        if throttle.as_mut().is_some_and(|throttle| !throttle.is_free()) {
            self.transmit.acknowledge_kick();
            return Ok(());
        }
        let batch = if throttle.is_some() { 1 } else { BATCH };
        let (memory, batch) = (&*self.memory, (batch, Notify::Batch));
        worker::serve(&mut self.transmit, memory, &self.interrupt, &self.stop, batch, |chain| {
            if let Ok(frame) = GuestBuffers::readable(memory, chain) {
                take(throttle, frame.len());
                send(&self.tap, frame);
            }
            0
        })
    }

    /// Receives one batch of frames.
    fn receive(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        let mut room = Room::new(&memory, self.mergeable);
        let mut pause = None;
        for _ in 0..BATCH {
            if self.stop.is_requested() {
                break;
            }
            if !self.tap_ready && self.waiting == 0 {
                pause = Some(Pause::Tap);
                break;
            }
            if self.throttles.receive.as_mut().is_some_and(|throttle| !throttle.is_free()) {
                pause = Some(Pause::Line);
                break;
            }
            pause = self.receive_one(&mut room)?;
            match pause {
                Some(Pause::Tap) => self.tap_ready = false,
                Some(Pause::Buffers) if self.receive.enable_kicks(&memory)? => pause = None,
                Some(Pause::Buffers | Pause::Line) => break,
                None => (),
            }
        }
        room.put_back(&mut self.receive);
        if pause.is_none() {
            self.receive.kick_self();
        }
        self.receive.notify(&memory, &self.interrupt)
    }

    /// Receives one frame into the buffers at hand, of which more are taken from the queue as needed.
    fn receive_one(&mut self, room: &mut Room<'_>) -> Result<Option<Pause>, QueueError> {
        let direct = self.waiting == 0 && self.long;
        if self.waiting == 0
            && !direct
            && let Some(pause) = self.read_aside()
        {
            return Ok(Some(pause));
        }
        let wanted = if direct { self.largest } else { self.waiting };
        let len = match room.gather(&mut self.receive, wanted)? {
            Found::Enough if direct => match room.read(&self.tap, self.largest) {
                Ok(0) => return Ok(Some(Pause::Tap)),
                Ok(len) => len,
                Err(error) => return Ok(tap_pause(&error)),
            },
            Found::Enough => {
                let len = std::mem::take(&mut self.waiting);
                room.write(&self.aside[..len]);
                len
            }
            Found::Less { .. } if direct => {
                // To see how long it is.
                self.long = false;
                return Ok(None);
            }
            Found::Less { is_final: true } => {
                // It is lost: it would wait for ever, and all the others behind it.
                self.waiting = 0;
                return Ok(None);
            }
            Found::Less { is_final: false } => return Ok(Some(Pause::Buffers)),
            Found::Refused => return Ok(None),
        };
        self.long = len > LONG;
        take(&mut self.throttles.receive, len);
        room.hand_over(&mut self.receive, len)?;
        Ok(None)
    }

    /// Reads a frame without looking for room first: for one that is short, room for the longest would be looked for in vain,
    /// which takes longer than to copy it.
    fn read_aside(&mut self) -> Option<Pause> {
        if self.aside.is_empty() {
            // Not before it is needed, and its pages not before they are.
            self.aside = vec![0; self.largest];
        }
        loop {
            match nix::unistd::read(&self.tap, &mut self.aside) {
                Ok(len @ 1..) => {
                    self.waiting = len;
                    return None;
                }
                Err(Errno::EINTR) => {}
                // An interface that is down or gone has no frames, and says so when it has.
                Ok(_) | Err(_) => return Some(Pause::Tap),
            }
        }
    }
}

/// Gives a frame to the tap, which checks the header. What it does not take is lost, as on any network.
fn send(tap: &Tap, mut frame: GuestBuffers<'_>) {
    if (HEADER + 1..=HEADER + LINK_HEADER + MAX_PACKET).contains(&frame.len()) {
        let _ = frame.write_stream(tap.as_fd());
    }
}

/// A frame of this length, header included, goes one way.
fn take(throttle: &mut Option<Throttle>, len: usize) {
    if let Some(throttle) = throttle {
        throttle.take(len.saturating_sub(HEADER));
    }
}

/// What an error of the tap means. An interface that is down or gone has no frames, and says so when it has.
fn tap_pause(error: &io::Error) -> Option<Pause> {
    match error.kind() {
        io::ErrorKind::Interrupted => None,
        _ => Some(Pause::Tap),
    }
}

impl worker::Worker for Worker {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let timer =
            |throttle: &Option<Throttle>| throttle.as_ref().map(|throttle| (throttle.source(), EventSet::IN));
        let mut sources = vec![
            (self.transmit.as_raw_fd(), EventSet::IN),
            (self.receive.as_raw_fd(), EventSet::IN),
            (self.tap.as_fd().as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED),
        ];
        sources.extend(timer(&self.throttles.transmit));
        sources.extend(timer(&self.throttles.receive));
        sources
    }

    fn process(&mut self, source: RawFd) -> Result<(), QueueError> {
        if source == self.transmit.as_raw_fd() {
            return self.transmit();
        }
        if let Some(throttle) =
            self.throttles.transmit.as_ref().filter(|throttle| throttle.source() == source)
        {
            throttle.acknowledge();
            return self.transmit();
        }
        match &self.throttles.receive {
            Some(throttle) if throttle.source() == source => throttle.acknowledge(),
            _ if source == self.receive.as_raw_fd() => self.receive.acknowledge_kick(),
            _ => self.tap_ready = true,
        }
        self.receive()
    }
}
