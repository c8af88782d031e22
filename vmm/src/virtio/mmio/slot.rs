//! A place in the machine for one device, at an address and with an interrupt of its own.
//!
//! The guest knows of all slots from its command line. An empty one has a device ID of 0; once a device is plugged
//! in, the guest's driver finds it when it probes the slot again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::page::RegisterPage;
use super::state::TransportState;
use super::{Transport, registers};
use crate::GuestMemory;
use crate::layout;
use crate::virtio::VirtioDevice;
use crate::virtio::device::INTERRUPT_USED_BUFFER;

/// The number of slot 0's page among the memory regions of the virtual machine, behind those of its memory.
const FIRST_REGION: u32 = 16;

/// Why a device could not be plugged in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is a device already.
    #[error("slot {0} has a device already")]
    Occupied(u8),
    /// A device has to have a type.
    #[error("the device for slot {0} has the type 0, which means that there is no device")]
    NoType(u8),
    /// An eventfd could not be made.
    #[error("the events of slot {slot} could not be created: {source}")]
    Event {
        /// The slot's number.
        slot: u8,
        /// What the operating system reported.
        source: io::Error,
    },
    /// It goes on where another device has stopped, and is not like that one.
    #[error("the device for slot {0} is not of the kind that was there when the machine was captured")]
    Unlike(u8),
    /// The device is not at rest.
    #[error("the device in slot {0} has failed, or its driver has not started it yet")]
    Unsettled(u8),
    /// KVM did not take an event.
    #[error("KVM refused the {what} of slot {slot}: {source}")]
    Kvm {
        /// What was refused.
        what: &'static str,
        /// The slot's number.
        slot: u8,
        /// What KVM reported.
        source: errno::Error,
    },
}

/// One slot.
pub(crate) struct Slot {
    number: u8,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    page: Arc<RegisterPage>,
    plugged: Mutex<Option<Plugged>>,
    /// How the first device goes on that is plugged in.
    expected: Mutex<Option<TransportState>>,
}

struct Plugged {
    transport: Transport,
    line: Arc<EventFd>,
    /// Where acknowledgements of used buffers go, which nobody has to hear of.
    acknowledged: EventFd,
}

impl Slot {
    /// An empty slot, whose page of registers the guest can read.
    pub(crate) fn new(number: u8, vm: Arc<VmFd>, memory: GuestMemory) -> Result<Self, SlotError> {
        let page = Arc::<RegisterPage>::default();
        let region = kvm_userspace_memory_region {
            slot: FIRST_REGION + u32::from(number),
            guest_phys_addr: layout::slot_page(number).0,
            memory_size: RegisterPage::len(),
            userspace_addr: page.address(),
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the page is as long as that and begins where a page does, and guests only read it. A virtual machine can
        // run as long as there are vCPUs, which own the bus, and with it this slot and its page.
        let mapped = unsafe { vm.set_user_memory_region(region) };
        mapped.map_err(|source| SlotError::Kvm { what: "registers", slot: number, source })?;
        Ok(Self { number, vm, memory, page, plugged: Mutex::default(), expected: Mutex::default() })
    }

    /// Puts a device in.
    pub(crate) fn plug(&self, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        if device.device_type() == 0 {
            return Err(SlotError::NoType(self.number));
        }
        let mut plugged = self.lock();
        if plugged.is_some() {
            return Err(SlotError::Occupied(self.number));
        }
        let event_error = |source| SlotError::Event { slot: self.number, source };
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(event_error);
        let (line, acknowledged) = (Arc::new(event()?), event()?);
        let transport = Transport::new(device, self.memory.clone(), self.page.clone(), line.clone());
        let transport = transport.inspect_err(|_| self.page.clear()).map_err(event_error)?;
        let mut new = Plugged { transport, line, acknowledged };
        let connected = self.connect(&new).and_then(|()| match self.take_expected() {
            // Once the interrupt can be raised.
            Some(state) if !new.transport.restore(&state) => Err(SlotError::Unlike(self.number)),
            _ => Ok(()),
        });
        if let Err(error) = connected {
            self.disconnect(&new);
            new.transport.into_device();
            self.page.clear();
            return Err(error);
        }
        *plugged = Some(new);
        Ok(())
    }

    /// The device that is plugged in next goes on as this one.
    pub(crate) fn expect(&self, state: TransportState) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    fn take_expected(&self) -> Option<TransportState> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Stops the device, if there is one, and tells how it was.
    pub(crate) fn capture(&self) -> Result<Option<TransportState>, SlotError> {
        let mut plugged = self.lock();
        let captured = plugged.as_mut().map(|plugged| plugged.transport.capture());
        captured.map(|state| state.ok_or(SlotError::Unsettled(self.number))).transpose()
    }

    /// Takes the device out, if there is one; it is reset.
    pub(crate) fn unplug(&self) -> Option<Box<dyn VirtioDevice>> {
        let plugged = self.lock().take()?;
        self.disconnect(&plugged);
        let device = plugged.transport.into_device();
        self.page.clear();
        Some(device)
    }

    /// Stops the device, if there is one, and leaves it in its place.
    pub(crate) fn reset(&self) {
        if let Some(plugged) = self.lock().as_mut() {
            plugged.transport.reset();
        }
    }

    /// Whether there is no device that a driver has touched. One that is busy at the moment has been.
    pub(crate) fn is_at_rest(&self) -> bool {
        match self.plugged.try_lock() {
            Ok(plugged) => plugged.as_ref().is_none_or(|plugged| plugged.transport.is_at_rest()),
            Err(_) => false,
        }
    }

    /// Whether there is a device that serves files on the threads of vCPUs.
    pub(crate) fn serves_files_on_vcpus(&self) -> bool {
        self.lock().as_ref().is_some_and(|plugged| plugged.transport.serves_files_on_vcpus())
    }

    /// A driver's read.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        match self.lock().as_ref() {
            Some(plugged) => plugged.transport.read(offset, data),
            None => registers::read_empty(offset, data),
        }
    }

    /// A driver's write; an empty slot takes none.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let mut slot = self.lock();
        let Some(plugged) = slot.as_mut() else { return };
        let bell = plugged.transport.bell(offset);
        match bell {
            Some(bell) => {
                // Other vCPUs need not wait, nor does the device's reset: it sees to those who ring.
                drop(slot);
                bell.ring();
            }
            None => plugged.transport.write(offset, data),
        }
    }

    /// A thread that panicked while it held the lock left a device behind that may be half set up; its registers
    /// are checked on each use all the same.
    fn lock(&self) -> MutexGuard<'_, Option<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on KVM raises the interrupt for the line, and turns a write of a queue's number to QueueNotify
    /// into that queue's kick, without an exit to user space. It also takes the acknowledgement of used buffers: that
    /// reason stays set from the first time on, which makes a driver look at its queues once too often where only the
    /// configuration changed.
    fn connect(&self, plugged: &Plugged) -> Result<(), SlotError> {
        let refused = |what| move |source| SlotError::Kvm { what, slot: self.number, source };
        let gsi = layout::slot_gsi(self.number);
        self.vm.register_irqfd(&plugged.line, gsi).map_err(refused("interrupt"))?;
        for (index, kick) in (0_u32..).zip(plugged.transport.kicks()) {
            self.vm.register_ioevent(kick, &self.notify(), index).map_err(refused("queue notification"))?;
        }
        self.vm
            .register_ioevent(&plugged.acknowledged, &self.acknowledge(), INTERRUPT_USED_BUFFER)
            .map_err(refused("interrupt's acknowledgement"))
    }

    /// The opposite of [`connect`](Self::connect), of which parts may be missing.
    fn disconnect(&self, plugged: &Plugged) {
        for (index, kick) in (0_u32..).zip(plugged.transport.kicks()) {
            let _ = self.vm.unregister_ioevent(kick, &self.notify(), index);
        }
        let acknowledged = &plugged.acknowledged;
        let _ = self.vm.unregister_ioevent(acknowledged, &self.acknowledge(), INTERRUPT_USED_BUFFER);
        let _ = self.vm.unregister_irqfd(&plugged.line, layout::slot_gsi(self.number));
    }

    fn notify(&self) -> IoEventAddress {
        self.register(VIRTIO_MMIO_QUEUE_NOTIFY)
    }

    fn acknowledge(&self) -> IoEventAddress {
        self.register(VIRTIO_MMIO_INTERRUPT_ACK)
    }

    fn register(&self, offset: u32) -> IoEventAddress {
        IoEventAddress::Mmio(layout::slot_address(self.number).0 + u64::from(offset))
    }
}
