//! The thread's work: take requests from the queue, do them, tell the driver.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::EventSet;

use super::disk::Disk;
use super::request;
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::virtqueue::{QueueError, Virtqueue};
use crate::virtio::worker::{self, Notify, Stop};

/// How many requests are done before the loop looks for other events.
const BATCH: usize = 64;

/// What the device runs on its thread.
pub(super) struct Worker {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) queue: Virtqueue,
    pub(super) disk: Arc<Disk>,
    /// Whether a write is done only when it is on the disk.
    pub(super) write_through: bool,
    pub(super) stop: Stop,
}

impl worker::Worker for Worker {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.queue.as_raw_fd(), EventSet::IN)]
    }

    fn process(&mut self, _: RawFd) -> Result<(), QueueError> {
        let (memory, batch) = (&*self.memory, (BATCH, Notify::Each));
        worker::serve(&mut self.queue, memory, &self.interrupt, &self.stop, batch, |chain| {
            request::serve(&self.disk, self.write_through, &self.stop, memory, chain)
        })
    }
}
