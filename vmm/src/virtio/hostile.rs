//! Drivers that mean harm: bytes, in property tests arbitrary and in fuzzing chosen, become the registers, rings and
//! descriptors that a device sees through the real transport.
//!
//! Most addresses, heads and lengths are folded towards what makes sense, because a device throws the rest away after
//! the first look; each keeps a chance to be as wild as it can be.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::balloon::BalloonDevice;
use super::block::BlockDevice;
use super::mmio::Transport;
use super::net::NetDevice;
use super::rng::RngDevice;
use super::vsock::VsockDevice;
use crate::event_loop::EventLoop;

/// Bytes of memory.
const MEMORY: u64 = 1 << 20;
/// Descriptors of each queue.
const SIZE: u16 = 16;
/// Where a queue's parts lie, one page each: descriptors, available ring, used ring.
const QUEUES: u64 = 0x1000;
/// Where buffers and tables lie.
const HEAP: u64 = 0x8_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Status bits in the order in which a driver sets them.
const STEPS: [u32; 4] = [1, 3, 11, 15];
/// How long a device may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(20);

/// An entropy device.
pub fn rng() -> Box<dyn VirtioDevice> {
    Box::new(RngDevice::new(events()))
}

/// A balloon.
pub fn balloon() -> Box<dyn VirtioDevice> {
    Box::new(BalloonDevice::new(events()).0)
}

/// A device for connections.
pub fn vsock() -> Box<dyn VirtioDevice> {
    Box::new(VsockDevice::new(3, events()).expect("3 is a context ID").0)
}

/// A disk of 64 KiB.
pub fn block(read_only: bool) -> Box<dyn VirtioDevice> {
    let image = nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let image = File::from(image.expect("there is memory"));
    image.set_len(64 << 10).expect("there is memory");
    Box::new(BlockDevice::new(image, read_only).expect("it is a file"))
}

/// A network device, and the other end of its wire.
pub fn net() -> (Box<dyn VirtioDevice>, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().expect("there are descriptors");
    near.set_nonblocking(true).expect("it is a socket");
    far.set_nonblocking(true).expect("it is a socket");
    (Box::new(NetDevice::new(near, [2, 0, 0, 0, 0, 1], 1500, events())), far)
}

fn events() -> crate::event_loop::EventLoopHandle {
    EventLoop::spawn("hostile").expect("there are threads").handle()
}

/// Has a hostile driver use a device. Panics where the device does, hangs, or does not come back after a reset.
pub fn attack(device: Box<dyn VirtioDevice>, input: &[u8]) {
    let mut input = Input(input);
    let mut driver = Driver::new(device);
    for _ in 0..1 + input.byte() % 3 {
        driver.start(&mut input);
        driver.fill(&mut input);
        driver.kick();
        if input.byte() & 1 == 0 {
            driver.wait();
        }
        for _ in 0..input.byte() % 8 {
            driver.poke(&mut input);
        }
        driver.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0, "a reset helps always");
    }
    driver.start(&mut Input(&[]));
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 15, "the device is as good as new");
}

/// Bytes that turn to zeroes after their end.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    pub(super) fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        array[..now.len()].copy_from_slice(now);
        self.0 = later;
        array
    }
}

struct Driver {
    transport: Transport,
    memory: Arc<GuestMemoryMmap>,
    queues: u64,
}

impl Driver {
    fn new(device: Box<dyn VirtioDevice>) -> Driver {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]);
        let memory = Arc::new(memory.expect("there is memory"));
        let line = EventFd::new(libc::EFD_NONBLOCK).expect("there are descriptors");
        let queues = device.queue_sizes().len() as u64;
        let transport = Transport::new(device, memory.clone(), Arc::default(), Arc::new(line));
        Driver { transport: transport.expect("there are descriptors"), memory, queues }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Gets the device to run, with some of its features.
    fn start(&mut self, input: &mut Input<'_>) {
        self.memory.write_slice(&[0; HEAP as usize], GuestAddress(0)).expect("it is in memory");
        self.write(VIRTIO_MMIO_STATUS, STEPS[0]);
        self.write(VIRTIO_MMIO_STATUS, STEPS[1]);
        for half in 0..2 {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let unwanted = if half == 0 { input.word() } else { 0 };
            let features = self.read(VIRTIO_MMIO_DEVICE_FEATURES) & !unwanted;
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(VIRTIO_MMIO_STATUS, STEPS[2]);
        for queue in 0..self.queues as u32 {
            let base = part(queue.into(), 0).0 as u32;
            self.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            self.write(VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
            self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
            self.write(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.write(VIRTIO_MMIO_STATUS, STEPS[3]);
    }

    /// Fills rings, tables and buffers.
    fn fill(&mut self, input: &mut Input<'_>) {
        let memory = &self.memory;
        let put = |value: &[u8], at: GuestAddress| memory.write_slice(value, at).expect("it is in memory");
        // Where headers of requests are likely to be looked for.
        for block in 0..16 {
            let mut header = input.array::<32>();
            if header[31] & 3 != 0 {
                // Small numbers, as for a kind of request and a sector.
                header[0] %= 16;
                header[1..8].fill(0);
                header[9..16].fill(0);
            }
            put(&header, GuestAddress(HEAP + 0x1000 * block));
        }
        // Two tables for indirect descriptors, and those of the queues.
        for table in [GuestAddress(HEAP + 0x2_0000), GuestAddress(HEAP + 0x2_1000)]
            .into_iter()
            .chain((0..self.queues).map(|queue| part(queue, 0)))
        {
            for slot in 0..u64::from(SIZE) {
                let descriptor = RawDescriptor::from(descriptor(input));
                memory.write_obj(descriptor, GuestAddress(table.0 + 16 * slot)).expect("it is in memory");
            }
        }
        for queue in 0..self.queues {
            // A whole request, which chance alone would hardly make: a header, data either way, a status.
            let (choice, block) = (input.byte(), u64::from(input.byte() % 16));
            let direction = if choice & 2 == 0 { WRITE } else { 0 };
            let request = [
                Descriptor::new(HEAP + 0x1000 * block, 16, NEXT, 1),
                Descriptor::new(HEAP + 0x1_0000, 512 * u32::from(choice >> 4), NEXT | direction, 2),
                Descriptor::new(HEAP + 0x1_8000, 1, WRITE, 0),
            ];
            for (slot, descriptor) in (0..).zip(request).filter(|_| choice & 1 == 0) {
                let at = GuestAddress(part(queue, 0).0 + 16 * slot);
                memory.write_obj(RawDescriptor::from(descriptor), at).expect("it is in memory");
            }
            let available = part(queue, 1);
            for slot in 0..u64::from(SIZE) {
                let head = u16::from(input.byte()) % (SIZE + 1);
                put(&head.to_le_bytes(), GuestAddress(available.0 + 4 + 2 * slot));
            }
            let count = match input.byte() {
                wild @ 240.. => u16::from_le_bytes([wild, input.byte()]),
                count => u16::from(count) % (SIZE + 1),
            };
            put(&count.to_le_bytes(), GuestAddress(available.0 + 2));
        }
    }

    fn kick(&mut self) {
        for queue in 0..self.queues as u32 {
            self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
        }
    }

    /// An access to any register, but none that would end the round.
    fn poke(&mut self, input: &mut Input<'_>) {
        let offset = u64::from(input.word() % 0x120);
        let mut data = input.array::<8>();
        let width = usize::from(input.byte() % 9);
        if offset & !3 != u64::from(VIRTIO_MMIO_STATUS) {
            self.transport.write(offset, &data[..width]);
        }
        self.transport.read(offset, &mut data[..width]);
    }

    /// Waits until the device has looked at all queues: it has once it takes the second of two kicks. A device that
    /// has given up takes none.
    fn wait(&mut self) {
        for _ in 0..2 {
            let deadline = Instant::now() + PATIENCE;
            while self.is_kicked() && self.read(VIRTIO_MMIO_STATUS) == 15 {
                assert!(Instant::now() < deadline, "the device does not look at its queues");
                thread::sleep(Duration::from_micros(20));
            }
            self.kick();
        }
    }

    fn is_kicked(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::{AsRawFd, BorrowedFd};
        self.transport.kicks().iter().any(|kick| {
            // SAFETY: the transport keeps the descriptor open.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            poll(&mut [PollFd::new(kick, PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
        })
    }
}

/// A part of a queue: descriptors, available ring or used ring.
fn part(queue: u64, part: u64) -> GuestAddress {
    GuestAddress(QUEUES + 0x3000 * queue + 0x1000 * part)
}

fn descriptor(input: &mut Input<'_>) -> Descriptor {
    let kind = input.byte();
    let (place, len) = (input.word(), input.word());
    let address = match kind >> 5 {
        0 => u64::from(place) << 32 | u64::from(len),
        1 => MEMORY - 64 + u64::from(place % 128),
        // A table, which makes sense with the flag for it.
        2 => HEAP + 0x2_0000 + u64::from(place & 1) * 0x1000,
        // The rings themselves.
        3 => u64::from(place % HEAP as u32),
        _ => HEAP + u64::from(place % 16) * 0x1000,
    };
    let len = match kind >> 5 {
        0 => len,
        2 => 16 * (len % 20),
        _ => [0, 1, 16, 16, 44, 512, 4096, len % 70_000][len as usize % 8],
    };
    let flags = match kind >> 5 {
        0 => u16::from(kind & 7),
        2 => INDIRECT,
        _ => [0, NEXT, NEXT, NEXT, WRITE, WRITE, WRITE | NEXT, WRITE | NEXT][usize::from(kind & 7)],
    };
    Descriptor::new(address, len, flags, (place >> 16) as u16 % (SIZE + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn input() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..3000)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_driver_breaks_the_entropy_device(input in input()) {
            attack(rng(), &input);
        }

        #[test]
        fn no_driver_breaks_the_balloon(input in input()) {
            attack(balloon(), &input);
        }

        #[test]
        fn no_driver_breaks_the_disk(input in input(), read_only in any::<bool>()) {
            attack(block(read_only), &input);
        }

        #[test]
        fn no_driver_breaks_the_network(input in input()) {
            let (device, far) = net();
            for len in [13, 60, 1514] {
                far.send(&vec![1; len]).unwrap();
            }
            attack(device, &input);
        }

        #[test]
        fn no_driver_breaks_the_sockets(input in input()) {
            attack(vsock(), &input);
        }
    }
}
