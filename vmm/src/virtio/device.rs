//! The contract between the MMIO transport and a device.
//!
//! The transport owns the registers, the status machine (virtio 1.2, section 2.1) and feature negotiation. When
//! the driver sets DRIVER_OK it hands the queues to the device, which moves them into a worker on an
//! [event loop](crate::event_loop). A reset takes them back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::page::RegisterPage;
use super::mmio::status::NEEDS_RESET;
use crate::GuestMemory;
use crate::event_loop::EventLoopError;

/// Interrupt status bit: the device used a buffer (virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED_BUFFER: u32 = 1 << 0;
/// Interrupt status bit: the device's configuration changed.
pub const INTERRUPT_CONFIG_CHANGE: u32 = 1 << 1;

/// A device that can be plugged into a slot.
pub trait VirtioDevice: Send {
    /// The device's type (virtio 1.2, section 5), such as 1 for a network device. Never 0.
    fn device_type(&self) -> u32;

    /// The largest size of each queue, each a power of two. Its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits that the device offers. The transport adds `VIRTIO_F_VERSION_1`, and refuses a driver that
    /// does not accept it or accepts a bit that was not offered.
    fn features(&self) -> u64;

    /// Reads from the device's configuration space. Bytes beyond its end read as zero. What a worker changes
    /// there it changes within [`Interrupt::change_config`].
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device's configuration space. Most devices have nothing there that a driver may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The bell at an offset of the configuration space, if there is one and the device is active.
    fn bell(&self, _offset: u64) -> Option<Arc<dyn Bell>> {
        None
    }

    /// Whether the device serves files on the threads of vCPUs, see [`bell`](Self::bell).
    fn serves_files_on_vcpus(&self) -> bool {
        false
    }

    /// Starts the device. On an error the transport sets DEVICE_NEEDS_RESET. Runs on a vCPU's thread.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device: when this returns, it touches neither queues nor guest memory until the next
    /// `activate`. Called also for a device that is not active. Runs on a vCPU's thread.
    fn reset(&mut self);
}

/// What a driver rings by a write to the configuration space, to have something done before the write is over.
pub trait Bell: Send + Sync {
    /// The driver has rung. Runs on the vCPU's thread, and other drivers of the guest do not wait for its end.
    fn ring(&self);
}

/// Reads from a configuration space that has these bytes; what lies beyond them is zero.
pub(crate) fn read_padded(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// What a device needs to run.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues that the driver made ready, in the order of their index. A queue that the driver left
    /// unused is absent, so look at [`ActiveQueue::index`].
    pub queues: Vec<ActiveQueue>,
    /// The feature bits that both sides accepted.
    pub features: u64,
    /// How to tell the driver.
    pub interrupt: Interrupt,
}

/// A queue that is ready, with the event that tells of new buffers.
pub struct ActiveQueue {
    /// The queue's number in the device.
    pub index: u16,
    /// The queue; valid at the time of activation, and with EVENT_IDX set where that was negotiated.
    pub queue: Queue,
    /// Readable when the driver kicked. The transport kicks each queue once after activation.
    pub kick: EventFd,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue out that the device cannot work without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(u16),
    /// The event loop took no worker.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The operating system refused something.
    #[error("the device could not start: {0}")]
    Io(#[from] std::io::Error),
}

/// The device's interrupt line with the registers behind it that a device changes while it runs.
#[derive(Clone)]
pub struct Interrupt {
    registers: Arc<RegisterPage>,
    /// How often the configuration changed; held while it changes or is read.
    generation: Arc<Mutex<u32>>,
    needs_reset: Arc<AtomicBool>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that raises `line` (an irqfd), with its reasons among these registers.
    pub(crate) fn new(registers: Arc<RegisterPage>, line: Arc<EventFd>) -> Self {
        Self { registers, generation: Arc::default(), needs_reset: Arc::default(), line }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffers(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Changes the configuration, and tells the driver. One that is in the middle of reading it sees the generation
    /// change with it, and reads again (virtio 1.2, section 2.5.1).
    pub fn change_config(&self, change: impl FnOnce()) {
        let mut generation = self.lock_config();
        change();
        *generation = generation.wrapping_add(1);
        self.registers.store(VIRTIO_MMIO_CONFIG_GENERATION, *generation);
        drop(generation);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// Tells the driver that the device cannot go on before a reset (DEVICE_NEEDS_RESET): the driver broke a
    /// rule that leaves no way to continue, such as an available index beyond the queue.
    pub fn needs_reset(&self) {
        self.change_config(|| {
            self.needs_reset.store(true, Ordering::SeqCst);
            self.registers.add(VIRTIO_MMIO_STATUS, NEEDS_RESET);
        });
    }

    /// The reasons that the driver has not acknowledged yet.
    pub(crate) fn pending(&self) -> u32 {
        self.registers.load(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    /// The driver has seen these reasons.
    pub(crate) fn acknowledge(&self, reasons: u32) {
        self.registers.remove(VIRTIO_MMIO_INTERRUPT_STATUS, reasons);
    }

    /// How often the configuration changed.
    pub(crate) fn generation(&self) -> u32 {
        *self.lock_config()
    }

    /// As long as this is held, the configuration does not change.
    pub(crate) fn lock_config(&self) -> MutexGuard<'_, u32> {
        // A counter is whole whatever happened while it was held.
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the device asked for a reset.
    pub(crate) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Back to the state of a device that was just plugged. The generation goes on: a driver may hold an old one.
    pub(crate) fn reset(&self) {
        self.registers.store(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        // The status comes first: a driver that is interrupted must find the reason.
        self.registers.add(VIRTIO_MMIO_INTERRUPT_STATUS, bit);
        // A write to an eventfd fails only when its counter is full, and then the line is raised already.
        let _ = self.line.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_ends_in_zeroes() {
        let read = |offset| {
            let mut data = [0xff; 3];
            read_padded(&[1, 2, 3, 4], offset, &mut data);
            data
        };
        assert_eq!(
            [read(0), read(2), read(4), read(5), read(u64::MAX)].concat(),
            [1, 2, 3, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn an_interrupt_sets_its_reason_and_raises_the_line() {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let interrupt = Interrupt::new(Arc::default(), line.clone());
        interrupt.used_buffers();
        interrupt.change_config(|| ());
        assert_eq!(interrupt.pending(), INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE);
        assert_eq!(line.read().unwrap(), 2);
    }

    #[test]
    fn a_device_that_needs_a_reset_says_so_until_it_gets_one() {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let interrupt = Interrupt::new(Arc::default(), line.clone());
        interrupt.clone().needs_reset();
        assert!(interrupt.is_reset_needed());
        assert_eq!(interrupt.pending(), INTERRUPT_CONFIG_CHANGE);
        assert_eq!(interrupt.generation(), 1);
        interrupt.reset();
        assert!(!interrupt.is_reset_needed());
        assert_eq!((interrupt.pending(), interrupt.generation()), (0, 1));
    }
}
