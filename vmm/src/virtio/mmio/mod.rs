//! The virtio-mmio transport (virtio 1.2, section 4.2): a device behind a page of registers.
//!
//! [`Transport`] is one device with its registers and knows nothing of KVM; a [`Slot`](slot::Slot) is the place in
//! the machine into which one is plugged.

pub(crate) mod page;
mod queue;
mod registers;
pub(crate) mod slot;
pub(crate) mod state;
pub(crate) mod status;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::page::RegisterPage;
use self::queue::QueueSetup;
use self::registers::{QueueRegister, Readable, Writable};
use self::status::Step;
use super::device::Bell;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::GuestMemory;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// How a queue is made of what the driver wrote; there is none if that makes no sense.
type BuildQueue = fn(&QueueSetup, &GuestMemory, bool) -> Option<Queue>;

/// A device with its registers.
pub(crate) struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    /// What the driver reads.
    page: Arc<RegisterPage>,
    interrupt: Interrupt,
    /// One a queue; the ioeventfds of the slot.
    kicks: Vec<EventFd>,
    driver: DriverState,
}

/// All that the driver wrote; a reset forgets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DriverState {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

impl DriverState {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: status::RESET,
            device_features_select: 0,
            driver_features_select: 0,
            features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueSetup::new(size)).collect(),
        }
    }

    fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn selected_queue_mut(&mut self) -> Option<&mut QueueSetup> {
        self.queues.get_mut(usize::try_from(self.queue_select).ok()?)
    }
}

impl Transport {
    /// A device as the driver finds it first, which shows its registers on `page` and interrupts through `line`.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        page: Arc<RegisterPage>,
        line: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let driver = DriverState::new(device.queue_sizes());
        let kicks = driver.queues.iter().map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
        let transport = Self {
            kicks: kicks.collect::<Result<_, _>>()?,
            interrupt: Interrupt::new(page.clone(), line),
            device,
            memory,
            page,
            driver,
        };
        transport.interrupt.reset();
        transport.show();
        Ok(transport)
    }

    /// The events that tell of new buffers, in the order of the queues.
    pub(crate) fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Stops the device and gives it back.
    pub(crate) fn into_device(mut self) -> Box<dyn VirtioDevice> {
        self.device.reset();
        self.device
    }

    /// Brings the page of registers up to date with what the driver wrote. The interrupt's reasons are always.
    fn show(&self) {
        let unchanged = self.interrupt.lock_config();
        for offset in Readable::offsets() {
            let value = match Readable::at(offset.into()) {
                Some(Readable::ConfigGeneration) => *unchanged,
                Some(Readable::InterruptStatus) | None => continue,
                Some(register) => self.read_register(register),
            };
            self.page.store(offset, value);
        }
    }

    /// A driver's read. What does not exist reads as zero. Registers come here only where the page is not mapped.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            let _unchanged = self.interrupt.lock_config();
            self.device.read_config(offset, data);
        } else if let (Some(register), Ok(word)) = (Readable::at(offset), <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(register).to_le_bytes();
        }
    }

    /// Whether the device serves files on the threads of vCPUs.
    pub(crate) fn serves_files_on_vcpus(&self) -> bool {
        self.device.serves_files_on_vcpus()
    }

    /// What a driver rings by a write at an offset.
    pub(crate) fn bell(&self, offset: u64) -> Option<Arc<dyn Bell>> {
        self.device.bell(offset.checked_sub(registers::CONFIG)?)
    }

    /// A driver's write. What does not exist, or is not allowed now, is ignored.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            if self.has_driver() {
                self.device.write_config(offset, data);
            }
        } else if let (Some(register), Ok(word)) = (Writable::at(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(word));
            self.show();
        }
    }

    fn read_register(&self, register: Readable) -> u32 {
        match register {
            Readable::Magic => registers::MAGIC,
            Readable::Version => registers::VERSION,
            Readable::DeviceId => self.device.device_type(),
            Readable::VendorId => registers::VENDOR,
            Readable::DeviceFeatures => match self.driver.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            Readable::QueueSizeMax => self.driver.selected_queue().map_or(0, |queue| queue.max_size().into()),
            Readable::QueueReady => self.driver.selected_queue().is_some_and(QueueSetup::is_ready).into(),
            Readable::InterruptStatus => self.interrupt.pending(),
            Readable::Status => self.status(),
            Readable::SharedMemory => registers::NO_SHARED_MEMORY,
            Readable::ConfigGeneration => self.interrupt.generation(),
        }
    }

    fn write_register(&mut self, register: Writable, value: u32) {
        match register {
            Writable::DeviceFeaturesSelect => self.driver.device_features_select = value,
            Writable::DriverFeaturesSelect => self.driver.driver_features_select = value,
            Writable::DriverFeatures => self.write_features(value),
            Writable::QueueSelect => self.driver.queue_select = value,
            Writable::Queue(register) => self.write_queue(register, value),
            Writable::QueueNotify => self.kick(value),
            Writable::InterruptAcknowledge => self.interrupt.acknowledge(value),
            Writable::Status => self.write_status(value),
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.is_reset_needed() { status::NEEDS_RESET } else { 0 };
        self.driver.status | needs_reset
    }

    /// Whether there is a driver that may use the configuration space.
    fn has_driver(&self) -> bool {
        self.driver.status & status::DRIVER == status::DRIVER && self.driver.status & status::FAILED == 0
    }

    fn write_features(&mut self, value: u32) {
        if self.driver.status != status::DRIVER {
            return;
        }
        let value = u64::from(value);
        let features = &mut self.driver.features;
        match self.driver.driver_features_select {
            0 => *features = *features & !u64::from(u32::MAX) | value,
            1 => *features = *features & u64::from(u32::MAX) | value << 32,
            _ => {}
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK (virtio 1.2, section 3.1.1); afterwards they belong to
    /// the device.
    fn write_queue(&mut self, register: QueueRegister, value: u32) {
        if self.driver.status == status::FEATURES_OK
            && let Some(queue) = self.driver.selected_queue_mut()
        {
            queue.write(register, value);
        }
    }

    /// Comes here only where no ioeventfd took it.
    fn kick(&self, queue: u32) {
        if let Some(kick) = usize::try_from(queue).ok().and_then(|index| self.kicks.get(index)) {
            // It fails only when the counter is full, and then the device has been told already.
            let _ = kick.write(1);
        }
    }

    fn write_status(&mut self, wanted: u32) {
        match status::step(self.driver.status, wanted) {
            Step::Reset => self.reset(),
            Step::Noted => self.driver.status = wanted & !status::NEEDS_RESET,
            Step::SettleFeatures if self.are_features_acceptable() => {
                self.driver.status = status::FEATURES_OK;
            }
            Step::Activate => {
                self.driver.status = status::DRIVER_OK;
                self.activate();
            }
            // Features that are not acceptable are refused by leaving FEATURES_OK unset.
            Step::SettleFeatures | Step::Ignored => {}
        }
    }

    fn are_features_acceptable(&self) -> bool {
        let features = self.driver.features;
        features & !self.offered_features() == 0 && features & VERSION_1 != 0
    }

    /// Whether there is nothing that a reset would change.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.status() == status::RESET
    }

    /// Stops the device, and forgets all that the driver wrote.
    pub(crate) fn reset(&mut self) {
        self.device.reset();
        self.driver = DriverState::new(self.device.queue_sizes());
        self.interrupt.reset();
        self.show();
    }

    /// Hands the queues to the device. A driver that set up something that cannot be used, or too little, is told
    /// by DEVICE_NEEDS_RESET.
    fn activate(&mut self) {
        self.activate_with(QueueSetup::build);
    }

    /// The same, with queues that `build` makes.
    fn activate_with(&mut self, build: BuildQueue) {
        let activation = self.activation(build);
        let started = activation.is_some_and(|activation| self.device.activate(activation).is_ok());
        if !started {
            self.interrupt.needs_reset();
            return;
        }
        // A driver may have filled a queue, and kicked, before the device listened.
        for (queue, kick) in self.driver.queues.iter().zip(&self.kicks) {
            if queue.is_ready() {
                let _ = kick.write(1);
            }
        }
    }

    fn activation(&self, build: BuildQueue) -> Option<Activation> {
        let features = self.driver.features;
        let mut queues = Vec::with_capacity(self.driver.queues.len());
        for (index, (setup, kick)) in (0..).zip(self.driver.queues.iter().zip(&self.kicks)) {
            if setup.is_ready() {
                let queue = build(setup, &self.memory, features & EVENT_IDX != 0)?;
                queues.push(ActiveQueue { index, queue, kick: kick.try_clone().ok()? });
            }
        }
        let interrupt = self.interrupt.clone();
        Some(Activation { memory: self.memory.clone(), queues, features, interrupt })
    }
}

#[cfg(test)]
mod tests;
