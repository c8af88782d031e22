//! Frames between queues and tap.
//!
//! The tap is watched for changes (edge-triggered), and read only while the guest has buffers: a guest without any
//! costs nothing but one frame, and the others wait in the tap's own queue, which drops what is too much.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use event_manager::EventSet;
use nix::errno::Errno;
use vm_memory::GuestMemoryMmap;

use super::rate::Throttle;
use super::tap::Tap;
use super::{HEADER, LINK_HEADER, MAX_PACKET, Throttles};
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::buffers::{GuestBuffers, MAX_DESCRIPTORS};
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::worker::{self, Notify, Stop};

/// How many frames go one way before other devices of the loop get their turn.
const BATCH: usize = 64;
/// Longer frames are read into the guest's buffers themselves.
const LONG: usize = 4096;
/// Where the header tells over how many buffers a frame is spread.
const BUFFER_COUNT: usize = 10;

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

/// A buffer of the guest's for received frames.
struct Buffer<'m> {
    head: u16,
    room: GuestBuffers<'m>,
}

/// What the buffers at hand are good for.
enum Room<'m> {
    /// There are none.
    None,
    /// Some were no buffers at all, and went back.
    Refused,
    /// This much. It cannot grow any more if it `is_final`, whatever the driver adds.
    Found { room: GuestBuffers<'m>, is_final: bool },
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
        let mut buffers = VecDeque::new();
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
            pause = self.receive_one(&memory, &mut buffers)?;
            match pause {
                Some(Pause::Tap) => self.tap_ready = false,
                Some(Pause::Buffers) if self.receive.enable_kicks(&memory)? => pause = None,
                Some(Pause::Buffers | Pause::Line) => break,
                None => (),
            }
        }
        buffers.iter().for_each(|_| self.receive.undo_pop());
        if pause.is_none() {
            self.receive.kick_self();
        }
        self.receive.notify(&memory, &self.interrupt)
    }

    /// Receives one frame into the buffers at hand, of which more are taken from the queue as needed.
    fn receive_one<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        buffers: &mut VecDeque<Buffer<'m>>,
    ) -> Result<Option<Pause>, QueueError> {
        let direct = self.waiting == 0 && self.long;
        if self.waiting == 0
            && !direct
            && let Some(pause) = self.read_aside()
        {
            return Ok(Some(pause));
        }
        let wanted = if direct { self.largest } else { self.waiting };
        let (mut room, is_final) = match self.gather(memory, buffers, wanted)? {
            Room::Found { room, is_final } => (room, is_final),
            Room::None => return Ok(Some(Pause::Buffers)),
            Room::Refused => return Ok(None),
        };
        let header = room.clone();
        let len = if direct {
            if room.len() < self.largest {
                // To see how long it is.
                self.long = false;
                return Ok(None);
            }
            match room.read_stream(self.tap.as_fd()) {
                Ok(0) => return Ok(Some(Pause::Tap)),
                Ok(len) => len,
                Err(error) => return Ok(tap_pause(&error)),
            }
        } else if self.waiting <= room.len() {
            room.write(&self.aside[..std::mem::take(&mut self.waiting)])
        } else if is_final {
            // It is lost: it would wait for ever, and all the others behind it.
            self.waiting = 0;
            return Ok(None);
        } else {
            return Ok(Some(Pause::Buffers));
        };
        self.long = len > LONG;
        take(&mut self.throttles.receive, len);
        self.hand_over(memory, buffers, header, len)?;
        Ok(None)
    }

    /// The room for a frame of this length: buffers are taken until they suffice or there are no more.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        buffers: &mut VecDeque<Buffer<'m>>,
        wanted: usize,
    ) -> Result<Room<'m>, QueueError> {
        let mut all = GuestBuffers::empty();
        let mut next = 0;
        let mut is_full = false;
        while all.len() < wanted && (next == 0 || self.mergeable) {
            if next == buffers.len() {
                let Some(chain) = self.receive.pop(memory)? else { break };
                let head = chain.head_index();
                let room = GuestBuffers::writable(memory, chain).unwrap_or_else(|_| GuestBuffers::empty());
                buffers.push_back(Buffer { head, room });
                if buffers.back().is_some_and(|buffer| buffer.room.is_empty()) {
                    self.refuse(memory, buffers)?;
                    return Ok(Room::Refused);
                }
            }
            // One system call takes no more pieces, and would leave out the rest without a word.
            is_full = all.pieces() + buffers[next].room.pieces() > MAX_DESCRIPTORS;
            if is_full {
                break;
            }
            all.append(buffers[next].room.clone());
            next += 1;
        }
        let is_final = is_full || !self.mergeable || next == usize::from(self.receive.size());
        Ok(if next > 0 { Room::Found { room: all, is_final } } else { Room::None })
    }

    /// Gives all buffers at hand back unused, of which the last is none: a chain that makes no sense or has no room.
    /// Those before it go with it, because what is put back into the queue would come before what was used.
    fn refuse(
        &mut self,
        memory: &GuestMemoryMmap,
        buffers: &mut VecDeque<Buffer<'_>>,
    ) -> Result<(), QueueError> {
        let unused: Vec<_> = buffers.drain(..).map(|buffer| (buffer.head, 0)).collect();
        self.receive.push_used_together(memory, &unused)
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

    /// Gives buffers back with a frame in them.
    fn hand_over(
        &mut self,
        memory: &GuestMemoryMmap,
        buffers: &mut VecDeque<Buffer<'_>>,
        mut header: GuestBuffers<'_>,
        len: usize,
    ) -> Result<(), QueueError> {
        let (mut used, mut rest) = (Vec::new(), len);
        while let Some(buffer) = buffers.pop_front() {
            let filled = rest.min(buffer.room.len());
            used.push((buffer.head, filled as u32));
            rest -= filled;
            if rest == 0 {
                break;
            }
        }
        // Before the guest may look: the tap leaves this field alone.
        header.split_front(BUFFER_COUNT);
        header.write(&(used.len() as u16).to_le_bytes());
        // A driver that saw a part of the frame alone would take it for damaged.
        self.receive.push_used_together(memory, &used)
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
