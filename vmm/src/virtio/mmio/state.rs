//! A device at rest, to be taken over by another one of its kind.
//!
//! A device keeps nothing that its driver could miss: what a driver wrote is here, and how far the device has come with
//! its queues is in the guest's memory.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS;

use super::queue::QueueSetup;
use super::{DriverState, EVENT_IDX, Transport, status};
use crate::GuestMemory;

/// The state of a device's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TransportState {
    device_type: u32,
    driver: DriverState,
    interrupt_status: u32,
    generation: u32,
}

impl TransportState {
    /// What kind of device it was.
    pub(crate) fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Whether a driver could have brought it about.
    pub(crate) fn is_possible(&self, memory: &GuestMemory) -> bool {
        let event_idx = self.driver.features & EVENT_IDX != 0;
        let is_running = self.driver.status == status::DRIVER_OK;
        let has_queues = || {
            let mut ready = self.driver.queues.iter().filter(|queue| queue.is_ready());
            ready.all(|queue| queue.rebuild(memory, event_idx).is_some())
        };
        is_running && has_queues() || self.driver.status == status::RESET
    }

    /// Whether a device has what this one had.
    pub(super) fn fits(&self, transport: &Transport) -> bool {
        let sizes = transport.device.queue_sizes();
        let mut same = self.driver.queues.iter().zip(sizes).map(|(queue, size)| queue.max_size() == *size);
        let features = self.driver.features & !transport.offered_features();
        self.device_type == transport.device.device_type()
            && self.driver.queues.len() == sizes.len()
            && same.all(|same| same)
            && features == 0
    }
}

impl Transport {
    /// Stops the device, and tells how its registers are. None for a device that has failed, or one whose driver is on
    /// its way.
    pub(crate) fn capture(&mut self) -> Option<TransportState> {
        self.device.reset();
        let is_settled = matches!(self.driver.status, status::DRIVER_OK | status::RESET);
        (is_settled && !self.interrupt.is_reset_needed()).then(|| TransportState {
            device_type: self.device.device_type(),
            driver: self.driver.clone(),
            interrupt_status: self.interrupt.pending(),
            generation: self.interrupt.generation(),
        })
    }

    /// Takes over the state of another device, and goes on where that one has stopped. Returns whether it fits.
    pub(crate) fn restore(&mut self, state: &TransportState) -> bool {
        if !state.fits(self) {
            return false;
        }
        self.driver = state.driver.clone();
        *self.interrupt.lock_config() = state.generation;
        self.page.store(VIRTIO_MMIO_INTERRUPT_STATUS, state.interrupt_status);
        self.show();
        if self.driver.status == status::DRIVER_OK {
            self.activate_with(QueueSetup::rebuild);
            // An interrupt may have been on its way. One too many does no harm.
            self.interrupt.used_buffers();
        }
        !self.interrupt.is_reset_needed()
    }
}
