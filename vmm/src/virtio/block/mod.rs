//! The block device (virtio 1.2, section 5.2) over a raw image file or a block device of the host.
//!
//! It has a thread of its own, which reads and writes the guest's memory directly, one request at a time.

mod disk;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device::read_padded;
use super::worker::Post;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, EventLoopError};
use disk::Disk;
use request::{MAX_RANGE_SECTORS, MAX_RANGES};
use worker::Worker;

const QUEUE_SIZES: [u16; 1] = [256];
/// How many pieces the data of a request may be in: the queue's length without header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZES[0] as u32 - 2;
/// The unit of positions and sizes in the protocol.
const SECTOR: u64 = 512;
/// Length of the configuration space.
const CONFIG_LEN: usize = 60;

/// Why there is no block device.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The file's size or identity cannot be had.
    #[error("the disk image could not be examined: {0}")]
    Image(#[from] io::Error),
    /// The file is of a kind that cannot be a disk.
    #[error("the disk image is neither a regular file nor a block device")]
    Kind,
    /// The device's thread could not be started.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

/// The block device.
#[derive(Debug)]
pub struct BlockDevice {
    disk: Arc<Disk>,
    _events: EventLoop,
    post: Post,
}

impl BlockDevice {
    /// A device over a file that is open for reading and, unless it is `read_only`, for writing. Bytes beyond its
    /// last whole sector of 512 are out of reach.
    pub fn new(image: File, read_only: bool) -> Result<Self, BlockError> {
        let disk = Arc::new(Disk::new(image, read_only)?);
        let events = EventLoop::spawn_confined("virtio-blk")?;
        Ok(Self { disk, post: Post::new(events.handle()), _events: events })
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Discard: sectors and ranges at most, and the alignment in sectors, here a page.
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        // Write zeroes: the same without alignment, and whether it may unmap.
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let access = match self.disk.is_read_only() {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        access
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_padded(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let queue =
            queues.into_iter().find(|queue| queue.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        // A driver that cannot flush has to find every write on the disk once it is done (section 5.2.6.2).
        let write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let (to_worker, disk) = (interrupt.clone(), self.disk.clone());
        Ok(self.post.start(interrupt, |stop| Worker {
            memory,
            interrupt: to_worker,
            queue: queue.into(),
            disk,
            write_through,
            stop,
        })?)
    }

    fn reset(&mut self) {
        self.post.stop();
    }
}
