//! The driver's side of virtqueues, for the tests of devices.
//!
//! A [`Guest`] owns memory and split virtqueues (virtio 1.2, section 2.7) in it. It plugs them into a device the
//! way the transport does, offers chains of descriptors, well formed or not, and takes back what the device
//! used. The rings are written here byte by byte, so that a test can break each of them; virtio-queue's own mock
//! places its used ring over the end of the available ring and cannot wrap around.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Transport;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::{GuestMemory, confine};

pub(crate) use virtio_queue::desc::{RawDescriptor, split::Descriptor};

/// Flag of a descriptor that another one follows.
pub(crate) const NEXT: u16 = 1;
/// Flag of a descriptor that the device writes.
pub(crate) const WRITE: u16 = 2;
/// Flag of a descriptor that refers to a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// Bytes of memory from address 0. Addresses beyond are outside of the guest's memory.
pub(crate) const MEMORY: u64 = 64 << 20;

/// Where buffers start; the queues lie below.
const HEAP: u64 = 4 << 20;
/// Room for one queue of up to 4096 descriptors.
const QUEUE_STRIDE: u64 = 0x2_0000;
/// How long a device may take before a test counts it as stuck.
const PATIENCE: Duration = Duration::from_secs(20);

/// One buffer of a chain.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// Bytes for the device to read.
    Out(Vec<u8>),
    /// Room of this length for the device to write.
    In(u32),
}

/// A chain that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Used {
    /// The index of the chain's first descriptor.
    pub(crate) head: u16,
    /// How many bytes the device says it wrote.
    pub(crate) len: u32,
    /// Those bytes, out of the chain's writable buffers in their order.
    pub(crate) data: Vec<u8>,
}

/// What has to be remembered of an offered chain.
struct Offered {
    slots: Vec<u16>,
    writable: Vec<(GuestAddress, u32)>,
}

/// The driver's half of one queue.
struct DriverQueue {
    size: u16,
    free: Vec<u16>,
    offered: HashMap<u16, Offered>,
    next_avail: u16,
    next_used: u16,
    kick: EventFd,
}

/// A guest's memory with queues in it.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    queues: Vec<DriverQueue>,
    pub(crate) interrupt: Interrupt,
    line: Arc<EventFd>,
    heap: u64,
}

impl Guest {
    /// A guest with one queue of each size.
    pub(crate) fn new(queue_sizes: &[u16]) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let interrupt = Interrupt::new(Arc::default(), line.clone());
        let mut guest = Guest { memory: Arc::new(memory), queues: Vec::new(), interrupt, line, heap: HEAP };
        for &size in queue_sizes {
            guest.queues.push(DriverQueue {
                size,
                free: (0..size).rev().collect(),
                offered: HashMap::new(),
                next_avail: 0,
                next_used: 0,
                kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            });
        }
        guest
    }

    /// What the transport would hand to a device now, with every queue ready and kicked once.
    pub(crate) fn activation(&self, features: u64) -> Activation {
        let queues = (0..self.queues.len()).map(|index| self.active_queue(index, features)).collect();
        let interrupt = self.interrupt.clone();
        Activation { memory: self.memory.clone(), queues, features, interrupt }
    }

    /// As [`Guest::activation`], but no loop can wait for a kick of this queue.
    pub(crate) fn deaf_activation(&self, queue: usize) -> Activation {
        let mut activation = self.activation(0);
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        // SAFETY: the descriptor is open, and owned by nobody else since `into_raw_fd`.
        activation.queues[queue].kick = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
        activation
    }

    /// Waits until the device asks for a reset.
    pub(crate) fn wait_needs_reset(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.interrupt.is_reset_needed() {
            assert!(Instant::now() < deadline, "the device asked for no reset");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Starts a device on these queues, on a thread with what a vCPU's has: that is where drivers do it.
    pub(crate) fn activate(&self, device: &mut dyn VirtioDevice, features: u64) {
        let activation = self.activation(features);
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                confine::enter_vcpu(confine::Duty::Vcpu).unwrap();
                device.activate(activation).unwrap();
            });
            vcpu.join().unwrap();
        });
        self.queues.iter().for_each(|queue| queue.kick.write(1).unwrap());
    }

    /// Starts a device on these queues by its registers, with all of its features. From then on kicks and interrupts
    /// are those of the transport.
    pub(crate) fn start(&mut self, device: Box<dyn VirtioDevice>) -> Transport {
        let mut transport =
            Transport::new(device, self.memory.clone(), Arc::default(), self.line.clone()).unwrap();
        let mut write = |register: u32, value: u32| transport.write(register.into(), &value.to_le_bytes());
        write(VIRTIO_MMIO_STATUS, 1);
        write(VIRTIO_MMIO_STATUS, 3);
        for half in 0..2 {
            transport.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL.into(), &u32::to_le_bytes(half));
            transport.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL.into(), &u32::to_le_bytes(half));
            let mut features = [0; 4];
            transport.read(VIRTIO_MMIO_DEVICE_FEATURES.into(), &mut features);
            transport.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), &features);
        }
        let mut write = |register: u32, value: u32| transport.write(register.into(), &value.to_le_bytes());
        write(VIRTIO_MMIO_STATUS, 11);
        for index in 0..self.queues.len() {
            write(VIRTIO_MMIO_QUEUE_SEL, index as u32);
            write(VIRTIO_MMIO_QUEUE_NUM, self.queues[index].size.into());
            write(VIRTIO_MMIO_QUEUE_DESC_LOW, self.table(index).0 as u32);
            write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, self.avail(index).0 as u32);
            write(VIRTIO_MMIO_QUEUE_USED_LOW, self.used(index).0 as u32);
            write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        write(VIRTIO_MMIO_STATUS, 15);
        for (queue, kick) in self.queues.iter_mut().zip(transport.kicks()) {
            queue.kick = kick.try_clone().unwrap();
        }
        transport
    }

    /// How many chains the device has used in all, modulo 2^16.
    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.memory.load(self.used(queue).unchecked_add(2), Ordering::Acquire).unwrap()
    }

    fn active_queue(&self, index: usize, features: u64) -> ActiveQueue {
        let driver = &self.queues[index];
        let mut queue = Queue::new(driver.size).unwrap();
        queue.set_size(driver.size);
        queue.set_desc_table_address(Some(self.table(index).0 as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail(index).0 as u32), Some(0));
        queue.set_used_ring_address(Some(self.used(index).0 as u32), Some(0));
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue { index: index as u16, queue, kick: driver.kick.try_clone().unwrap() }
    }

    /// The address of a queue's descriptor table.
    pub(crate) fn table(&self, queue: usize) -> GuestAddress {
        GuestAddress(0x1_0000 + QUEUE_STRIDE * queue as u64)
    }

    /// The address of a queue's available ring.
    pub(crate) fn avail(&self, queue: usize) -> GuestAddress {
        self.table(queue).unchecked_add(0x1_0000)
    }

    /// The address of a queue's used ring.
    pub(crate) fn used(&self, queue: usize) -> GuestAddress {
        self.table(queue).unchecked_add(0x1_4000)
    }

    /// Memory for a buffer. It is handed out again once the whole heap was.
    pub(crate) fn alloc(&mut self, len: u32) -> GuestAddress {
        let len = u64::from(len);
        if self.heap + len > MEMORY {
            self.heap = HEAP;
        }
        let address = GuestAddress(self.heap);
        self.heap += len.next_multiple_of(16);
        address
    }

    /// Offers a chain of these buffers, one descriptor each, and returns its head. Does not kick.
    pub(crate) fn push(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let (buffers, writable) = self.place(parts);
        let slots = self.take_slots(queue, parts.len());
        for (position, &(address, len, flags)) in buffers.iter().enumerate() {
            let next = slots.get(position + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let descriptor = Descriptor::new(address.0, len, flags, next.unwrap_or(0));
            self.write_descriptor(queue, slots[position], descriptor);
        }
        self.offer_chain(queue, Offered { slots, writable })
    }

    /// Offers these buffers as one descriptor that refers to a table.
    pub(crate) fn push_indirect(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let (buffers, writable) = self.place(parts);
        let table = self.alloc(16 * parts.len() as u32);
        for (position, &(address, len, flags)) in buffers.iter().enumerate() {
            let flags = flags | if position + 1 < buffers.len() { NEXT } else { 0 };
            let descriptor = Descriptor::new(address.0, len, flags, position as u16 + 1);
            let at = table.unchecked_add(16 * position as u64);
            self.memory.write_obj(RawDescriptor::from(descriptor), at).unwrap();
        }
        let slots = self.take_slots(queue, 1);
        let descriptor = Descriptor::new(table.0, 16 * parts.len() as u32, INDIRECT, 0);
        self.write_descriptor(queue, slots[0], descriptor);
        self.offer_chain(queue, Offered { slots, writable })
    }

    /// Offers descriptors as they are, at indices 0, 1, 2 ... of the table, with index 0 as the head. Not to be
    /// mixed with [`Guest::push`] on the same queue.
    pub(crate) fn push_raw(&mut self, queue: usize, descriptors: &[Descriptor]) {
        for (slot, descriptor) in descriptors.iter().enumerate() {
            self.write_descriptor(queue, slot as u16, *descriptor);
        }
        self.offer(queue, 0);
    }

    /// Writes one entry of a queue's descriptor table.
    pub(crate) fn write_descriptor(&self, queue: usize, slot: u16, descriptor: Descriptor) {
        let at = self.table(queue).unchecked_add(16 * u64::from(slot));
        self.memory.write_obj(RawDescriptor::from(descriptor), at).unwrap();
    }

    /// Puts a head on the available ring, whatever it is.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let driver = &self.queues[queue];
        let entry = 4 + 2 * u64::from(driver.next_avail % driver.size);
        self.memory.write_obj(head, self.avail(queue).unchecked_add(entry)).unwrap();
        self.set_available(queue, self.queues[queue].next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index, whatever it is.
    pub(crate) fn set_available(&mut self, queue: usize, index: u16) {
        self.queues[queue].next_avail = index;
        let at = self.avail(queue).unchecked_add(2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    /// Tells the device of new buffers.
    pub(crate) fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Takes back a chain that the device used, if there is one.
    pub(crate) fn pop_used(&mut self, queue: usize) -> Option<Used> {
        let ring = self.used(queue);
        let driver = &mut self.queues[queue];
        let index: u16 = self.memory.load(ring.unchecked_add(2), Ordering::Acquire).unwrap();
        if index == driver.next_used {
            return None;
        }
        let entry = ring.unchecked_add(4 + 8 * u64::from(driver.next_used % driver.size));
        let head = self.memory.read_obj::<u32>(entry).unwrap() as u16;
        let len = self.memory.read_obj::<u32>(entry.unchecked_add(4)).unwrap();
        driver.next_used = driver.next_used.wrapping_add(1);
        let offered = driver.offered.remove(&head);
        let mut data = Vec::new();
        if let Some(Offered { slots, writable }) = offered {
            driver.free.extend(slots);
            for (address, room) in writable {
                let mut bytes = vec![0; room.min(len - data.len() as u32) as usize];
                self.memory.read_slice(&mut bytes, address).unwrap();
                data.append(&mut bytes);
            }
        }
        self.want_interrupt(queue);
        Some(Used { head, len, data })
    }

    /// Waits for a chain that the device used.
    pub(crate) fn wait_used(&mut self, queue: usize) -> Used {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.pop_used(queue) {
                return used;
            }
            assert!(Instant::now() < deadline, "the device used no buffer of queue {queue}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// How many more descriptors can be offered.
    pub(crate) fn free_slots(&self, queue: usize) -> usize {
        self.queues[queue].free.len()
    }

    /// Whether the interrupt line was raised since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    /// Waits for an interrupt.
    pub(crate) fn wait_interrupt(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.interrupted() {
            assert!(Instant::now() < deadline, "the device raised no interrupt");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sets `used_event`, where a driver with EVENT_IDX says which used buffer it wants to hear of: the next.
    fn want_interrupt(&self, queue: usize) {
        let driver = &self.queues[queue];
        let at = self.avail(queue).unchecked_add(4 + 2 * u64::from(driver.size));
        self.memory.write_obj(driver.next_used, at).unwrap();
    }

    /// Puts the parts into memory: address, length and flags of each, and which of them the device writes.
    #[allow(clippy::type_complexity)]
    fn place(&mut self, parts: &[Part]) -> (Vec<(GuestAddress, u32, u16)>, Vec<(GuestAddress, u32)>) {
        let mut buffers = Vec::new();
        for part in parts {
            buffers.push(match part {
                Part::Out(bytes) => {
                    let address = self.alloc(bytes.len() as u32);
                    self.memory.write_slice(bytes, address).unwrap();
                    (address, bytes.len() as u32, 0)
                }
                Part::In(len) => (self.alloc(*len), *len, WRITE),
            });
        }
        let writable = buffers.iter().filter(|(_, _, flags)| flags & WRITE != 0);
        let writable = writable.map(|&(address, len, _)| (address, len)).collect();
        (buffers, writable)
    }

    fn take_slots(&mut self, queue: usize, count: usize) -> Vec<u16> {
        let free = &mut self.queues[queue].free;
        assert!(count > 0 && count <= free.len(), "a chain of {count} with {} free descriptors", free.len());
        free.split_off(free.len() - count)
    }

    fn offer_chain(&mut self, queue: usize, offered: Offered) -> u16 {
        let head = offered.slots[0];
        self.queues[queue].offered.insert(head, offered);
        self.offer(queue, head);
        head
    }
}
