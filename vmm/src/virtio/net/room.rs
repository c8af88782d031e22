//! The guest's buffers for received frames: taken from the queue as frames need them, given back with frames in them.

use std::collections::VecDeque;
use std::io;

use std::os::fd::AsFd;

use vm_memory::GuestMemoryMmap;

use super::tap::Tap;
use crate::virtio::buffers::{GuestBuffers, MAX_DESCRIPTORS};
use crate::virtio::virtqueue::{QueueError, Virtqueue};

/// Where the header of a frame tells over how many buffers it is spread.
const BUFFER_COUNT: usize = 10;

/// The buffers at hand: taken from the queue, and neither filled nor given back yet.
#[derive(Debug)]
pub(super) struct Room<'m> {
    memory: &'m GuestMemoryMmap,
    /// Whether a frame may be spread over several of them.
    mergeable: bool,
    /// The head and the length of each.
    buffers: VecDeque<(u16, usize)>,
    /// The bytes of all of them, in this order.
    bytes: GuestBuffers<'m>,
}

/// What the buffers at hand are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// There is as much room as was wanted.
    Enough,
    /// There is less. The driver may add more, unless it `is_final`.
    Less { is_final: bool },
    /// Some were no buffers at all, and went back.
    Refused,
}

impl<'m> Room<'m> {
    /// No room yet.
    pub(super) fn new(memory: &'m GuestMemoryMmap, mergeable: bool) -> Self {
        Self { memory, mergeable, buffers: VecDeque::new(), bytes: GuestBuffers::empty() }
    }

    /// Takes buffers until they suffice for a frame of this length or there are no more.
    pub(super) fn gather(&mut self, queue: &mut Virtqueue, wanted: usize) -> Result<Found, QueueError> {
        while self.bytes.len() < wanted {
            if !self.buffers.is_empty() && !self.mergeable {
                return Ok(Found::Less { is_final: true });
            }
            let Some(chain) = queue.pop(self.memory)? else {
                let is_final = self.buffers.len() == usize::from(queue.size());
                return Ok(Found::Less { is_final });
            };
            let (head, before) = (chain.head_index(), self.bytes.len());
            match self.bytes.extend_writable(self.memory, chain) {
                // One system call takes no more pieces, and would leave out the rest without a word.
                Ok(_) if self.bytes.pieces() > MAX_DESCRIPTORS => {
                    self.bytes.truncate(before);
                    queue.undo_pop();
                    return Ok(Found::Less { is_final: true });
                }
                Ok(len @ 1..) => self.buffers.push_back((head, len)),
                Ok(0) | Err(_) => {
                    self.refuse(queue, head)?;
                    return Ok(Found::Refused);
                }
            }
        }
        Ok(Found::Enough)
    }

    /// Gives all buffers at hand back unused, and with them a chain that makes no sense or has no room: what is put
    /// back into the queue would come before what was used.
    fn refuse(&mut self, queue: &mut Virtqueue, head: u16) -> Result<(), QueueError> {
        let unused: Vec<_> = self.buffers.drain(..).map(|(head, _)| (head, 0)).chain([(head, 0)]).collect();
        self.bytes.truncate(0);
        queue.push_used_together(self.memory, &unused)
    }

    /// Reads a frame of at most this length from the tap into the buffers; returns its length.
    pub(super) fn read(&self, tap: &Tap, largest: usize) -> io::Result<usize> {
        self.bytes.read_stream(tap.as_fd(), largest)
    }

    /// Copies a frame into the buffers.
    pub(super) fn write(&self, frame: &[u8]) {
        self.bytes.write_at(0, frame);
    }

    /// Gives the buffers back that a frame of this length fills.
    pub(super) fn hand_over(&mut self, queue: &mut Virtqueue, len: usize) -> Result<(), QueueError> {
        let (mut used, mut taken, mut rest) = (Vec::new(), 0, len);
        while let Some((head, room)) = self.buffers.pop_front() {
            let filled = rest.min(room);
            used.push((head, filled as u32));
            taken += room;
            rest -= filled;
            if rest == 0 {
                break;
            }
        }
        // Before the guest may look: the tap leaves this field alone.
        self.bytes.write_at(BUFFER_COUNT, &(used.len() as u16).to_le_bytes());
        self.bytes.skip(taken);
        // A driver that saw a part of the frame alone would take it for damaged.
        queue.push_used_together(self.memory, &used)
    }

    /// Puts the buffers that are still at hand back to where they were.
    pub(super) fn put_back(self, queue: &mut Virtqueue) {
        self.buffers.iter().for_each(|_| queue.undo_pop());
    }
}
