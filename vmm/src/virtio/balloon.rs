//! The memory balloon (virtio 1.2, section 5.5), with free page reporting: what the guest does not use goes back
//! to the host.
//!
//! Two ways lead there. With *reporting* the guest tells on its own of stretches that have been free for some
//! time, and may take them back whenever it likes. By *inflating* it gives up as many pages as the host asks for
//! with [`BalloonHandle::set_target`]. Either way the host drops the pages; when the guest touches them
//! again it gets new ones, or where a file is mapped those of the file.
//!
//! To drop pages takes the kernel a while, so give this device a loop that no packet waits on.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

use super::buffers::{Descriptors, GuestBuffers};
use super::device::read_padded;
use super::virtqueue::{Chain, QueueError, Virtqueue};
use super::worker::{self, Notify, Post, Stop};
use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;
use crate::event_loop::EventLoopHandle;

/// The device's pages have this size whatever the guest's and the host's are (section 5.5.6).
pub const PAGE_SIZE: u64 = 4096;

/// Feature bit: the guest may take pages out of the balloon when it runs out of memory.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
/// Feature bit: the guest reports free pages. We do not offer PAGE_POISON: a driver whose free pages have to keep
/// a pattern then does not report them.
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Queues are numbered without those of features that are not offered (statistics and free page hints).
const REPORTING: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [64, 64, 32];

/// Page numbers are taken from a request up to this many bytes; Linux sends 1 KiB. The rest is ignored, so that
/// no request keeps the loop for long: those pages are merely not dropped.
const MAX_INFLATE: usize = 16 << 10;
/// How many requests are served before other devices of the loop get their turn.
const BATCH: usize = 16;

/// Where the driver writes how many pages are in the balloon.
const CONFIG_ACTUAL: u64 = 4;

/// What device and handle share. The numbers are accessed Relaxed: each stands for itself, and what a driver has to see
/// together is kept together by the lock of the configuration.
#[derive(Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    interrupt: Mutex<Option<Interrupt>>,
}

impl Shared {
    fn interrupt(&self) -> MutexGuard<'_, Option<Interrupt>> {
        self.interrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's side of the balloon.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Asks the guest to give up this many pages of 4 KiB in all. It does so in its own time, or not at all.
    pub fn set_target(&self, pages: u32) {
        let store = || self.shared.target.store(pages, Ordering::Relaxed);
        match &*self.shared.interrupt() {
            Some(interrupt) => interrupt.change_config(store),
            None => store(),
        }
    }

    /// How many pages the guest says it has given up.
    pub fn actual(&self) -> u32 {
        self.shared.actual.load(Ordering::Relaxed)
    }
}

/// The balloon device.
pub struct BalloonDevice {
    shared: Arc<Shared>,
    post: Post,
}

impl BalloonDevice {
    /// An empty balloon that is served by this loop. The memory of the guest has to be a private mapping:
    /// dropping pages of a shared one would drop nothing.
    pub fn new(events: EventLoopHandle) -> (BalloonDevice, BalloonHandle) {
        let shared = Arc::new(Shared::default());
        let device = BalloonDevice { shared: shared.clone(), post: Post::new(events) };
        (device, BalloonHandle { shared })
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << VIRTIO_BALLOON_F_REPORTING
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (target, actual) = (&self.shared.target, &self.shared.actual);
        let fields = [target, actual].map(|field| field.load(Ordering::Relaxed).to_le_bytes());
        read_padded(fields.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(actual), Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut all = [const { None }; QUEUE_SIZES.len()];
        for queue in queues {
            if let Some(slot) = all.get_mut(usize::from(queue.index)) {
                *slot = Some(Virtqueue::from(queue));
            }
        }
        let mut queue = |index: u16| all[usize::from(index)].take();
        let inflate = queue(INFLATE).ok_or(ActivateError::MissingQueue(INFLATE))?;
        let deflate = queue(DEFLATE).ok_or(ActivateError::MissingQueue(DEFLATE))?;
        let reporting = queue(REPORTING);
        *self.shared.interrupt() = Some(interrupt.clone());
        let to_worker = interrupt.clone();
        let worker = |stop| Worker { memory, interrupt: to_worker, inflate, deflate, reporting, stop };
        Ok(self.post.start(interrupt, worker)?)
    }

    fn reset(&mut self) {
        self.post.stop();
        *self.shared.interrupt() = None;
        // A balloon starts empty: the next driver knows nothing of the pages in it (section 5.5.5).
        self.shared.actual.store(0, Ordering::Relaxed);
    }
}

struct Worker {
    memory: GuestMemory,
    interrupt: Interrupt,
    inflate: Virtqueue,
    deflate: Virtqueue,
    /// Absent if the driver does not report.
    reporting: Option<Virtqueue>,
    stop: Stop,
}

impl worker::Worker for Worker {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let queues = [&self.inflate, &self.deflate].into_iter().chain(&self.reporting);
        queues.map(|queue| (queue.as_raw_fd(), EventSet::IN)).collect()
    }

    fn process(&mut self, source: RawFd) -> Result<(), QueueError> {
        let Worker { memory, interrupt, inflate, deflate, reporting, stop } = self;
        let memory = &**memory;
        let take: fn(&GuestMemoryMmap, Chain<'_>);
        let queue = if source == inflate.as_raw_fd() {
            take = take_listed;
            inflate
        } else if source == deflate.as_raw_fd() {
            // The guest uses these pages again, and gets memory for them when it touches them.
            take = |_, _| ();
            deflate
        } else if let Some(reporting) = reporting {
            take = take_reported;
            reporting
        } else {
            return Ok(());
        };
        worker::serve(queue, memory, interrupt, stop, (BATCH, Notify::Batch), |chain| {
            take(memory, chain);
            0
        })
    }
}

/// Takes pages whose numbers the guest lists, 32 bits each.
fn take_listed(memory: &GuestMemoryMmap, chain: Chain<'_>) {
    let Ok(mut list) = GuestBuffers::readable(memory, chain) else { return };
    list.truncate(MAX_INFLATE);
    let mut bytes = vec![0; list.len()];
    list.read(&mut bytes);
    let (numbers, _) = bytes.as_chunks();
    let mut pages: Vec<_> = numbers.iter().map(|number| u64::from(u32::from_le_bytes(*number))).collect();
    // Neighbours go in one call.
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|page, next| page + 1 == *next) {
        discard(memory, run[0] * PAGE_SIZE, run.len() as u64 * PAGE_SIZE);
    }
}

/// Takes pages that are the buffers of the request.
fn take_reported(memory: &GuestMemoryMmap, chain: Chain<'_>) {
    // What comes before the place where a chain breaks off is reported all the same.
    for descriptor in Descriptors::of(chain).map_while(Result::ok) {
        if descriptor.is_write_only() {
            discard(memory, descriptor.addr().0, u64::from(descriptor.len()));
        }
    }
}

/// Gives the host's pages back that lie wholly in this range of the guest's memory. A range that does not lie
/// in it is the guest's mistake, and nothing happens.
fn discard(memory: &GuestMemoryMmap, start: u64, len: u64) {
    let Some(end) = start.checked_add(len) else { return };
    let Some(start) = start.checked_next_multiple_of(PAGE_SIZE) else { return };
    let Some(len) = (end / PAGE_SIZE * PAGE_SIZE).checked_sub(start) else { return };
    // Where the range crosses a border between regions, it does so at a page.
    let Ok(slices) = memory.get_slices(GuestAddress(start), len as usize).collect::<Result<Vec<_>, _>>()
    else {
        return;
    };
    for slice in slices {
        let pages = slice.ptr_guard_mut();
        // SAFETY: the range lies in a mapping of guest memory, which `memory` keeps alive. Its contents change
        // to zeroes (or to those of the file it was mapped from) as if the guest had written them: guest memory
        // may change at any time, and nothing in this process holds a reference to it.
        unsafe { libc::madvise(pages.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::event_loop::EventLoop;
    use crate::virtio::testing::{Descriptor, Guest, MEMORY, NEXT, Part, WRITE};

    const PAGE: usize = PAGE_SIZE as usize;
    /// Memory that nothing else uses.
    const START: u64 = 32 << 20;

    fn running(guest: &Guest) -> (BalloonDevice, BalloonHandle) {
        let (mut device, handle) = BalloonDevice::new(EventLoop::spawn("test").unwrap().handle());
        guest.activate(&mut device, 0);
        (device, handle)
    }

    fn fill(guest: &Guest, pages: usize) {
        guest.memory.write_slice(&vec![0xaa; pages * PAGE], GuestAddress(START)).unwrap();
    }

    /// Which of the first pages from START still have their contents: '#', or are gone: '.'.
    fn contents(guest: &Guest, pages: usize) -> String {
        let mut bytes = vec![0; pages * PAGE];
        guest.memory.read_slice(&mut bytes, GuestAddress(START)).unwrap();
        let whole = |page: &[u8], value| page.iter().all(|&byte| byte == value);
        let kind = |page| match (whole(page, 0xaa), whole(page, 0)) {
            (true, _) => '#',
            (_, true) => '.',
            _ => '?',
        };
        bytes.chunks(PAGE).map(kind).collect()
    }

    fn numbers(pages: &[u32]) -> Part {
        Part::Out(pages.iter().flat_map(|page| page.to_le_bytes()).collect())
    }

    #[test]
    fn reported_pages_go_back_to_the_host() {
        let mut guest = Guest::new(&QUEUE_SIZES);
        let _running = running(&guest);
        fill(&guest, 8);
        guest.push_raw(
            usize::from(REPORTING),
            &[
                Descriptor::new(START + PAGE_SIZE, 2 * PAGE as u32, WRITE | NEXT, 1),
                Descriptor::new(START + 5 * PAGE_SIZE, PAGE as u32, WRITE, 0),
            ],
        );
        guest.kick(usize::from(REPORTING));
        assert_eq!(guest.wait_used(usize::from(REPORTING)).len, 0);
        assert_eq!(contents(&guest, 8), "#..##.##");
        guest.wait_interrupt();
    }

    #[test]
    fn inflated_pages_go_back_to_the_host_and_deflated_ones_are_left_alone() {
        let mut guest = Guest::new(&QUEUE_SIZES);
        let _running = running(&guest);
        fill(&guest, 8);
        let first = (START / PAGE_SIZE) as u32;
        guest.push(
            usize::from(INFLATE),
            &[numbers(&[first + 6, first + 1, first + 2]), numbers(&[first + 1])],
        );
        guest.kick(usize::from(INFLATE));
        guest.wait_used(usize::from(INFLATE));
        assert_eq!(contents(&guest, 8), "#..###.#");
        guest.push(usize::from(DEFLATE), &[numbers(&[first, first + 1])]);
        guest.kick(usize::from(DEFLATE));
        guest.wait_used(usize::from(DEFLATE));
        assert_eq!(contents(&guest, 8), "#..###.#");
    }

    #[test]
    fn parts_of_pages_stay() {
        let guest = Guest::new(&QUEUE_SIZES);
        let drop_in = |start: u64, len: u64| {
            fill(&guest, 4);
            discard(&guest.memory, START + start, len);
            contents(&guest, 4)
        };
        assert_eq!(drop_in(1, 4095), "####");
        assert_eq!(drop_in(1, 4096), "####");
        assert_eq!(drop_in(1, 8191), "#.##");
        assert_eq!(drop_in(0, 4095), "####");
        assert_eq!(drop_in(0, 4097), ".###");
        assert_eq!(drop_in(4096, 0), "####");
    }

    #[test]
    fn pages_out_of_memory_are_ignored() {
        let mut guest = Guest::new(&QUEUE_SIZES);
        let _running = running(&guest);
        fill(&guest, 4);
        let wild = [
            Descriptor::new(MEMORY, PAGE as u32, WRITE, 0),
            Descriptor::new(MEMORY - PAGE_SIZE, 2 * PAGE as u32, WRITE, 0),
            Descriptor::new(u64::MAX - 4095, PAGE as u32, WRITE, 0),
            Descriptor::new(u64::MAX, u32::MAX, WRITE, 0),
            Descriptor::new(u64::MAX - 100, 50, WRITE, 0),
            Descriptor::new(START, PAGE as u32, 0, 0),
        ];
        for descriptor in wild {
            guest.push_raw(usize::from(REPORTING), &[descriptor]);
            guest.kick(usize::from(REPORTING));
            guest.wait_used(usize::from(REPORTING));
        }
        guest.push(usize::from(INFLATE), &[numbers(&[u32::MAX, (MEMORY / PAGE_SIZE) as u32])]);
        guest.push(usize::from(INFLATE), &[Part::Out(vec![0xff; 3])]);
        guest.push(usize::from(INFLATE), &[Part::In(4096)]);
        guest.kick(usize::from(INFLATE));
        (0..3).for_each(|_| drop(guest.wait_used(usize::from(INFLATE))));
        assert_eq!(contents(&guest, 4), "####");
    }

    #[test]
    fn a_range_over_two_regions_is_dropped_in_both() {
        let ranges = [(GuestAddress(0), 2 * PAGE), (GuestAddress(2 * PAGE_SIZE), 2 * PAGE)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        memory.write_slice(&[1; 4 * PAGE], GuestAddress(0)).unwrap();
        discard(&memory, PAGE_SIZE, 2 * PAGE_SIZE);
        let mut bytes = vec![9; 4 * PAGE];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let firsts: Vec<_> = bytes.chunks(PAGE).map(|page| page[0]).collect();
        assert_eq!(firsts, [1, 0, 0, 1]);
    }

    #[test]
    fn a_driver_that_does_not_report_has_no_queue_for_it() {
        let mut guest = Guest::new(&QUEUE_SIZES[..2]);
        let (mut device, _handle) = running(&guest);
        guest.push(usize::from(INFLATE), &[numbers(&[1 << 12])]);
        guest.kick(usize::from(INFLATE));
        guest.wait_used(usize::from(INFLATE));
        device.reset();
        let lonely = Guest::new(&QUEUE_SIZES[..1]);
        assert!(matches!(device.activate(lonely.activation(0)), Err(ActivateError::MissingQueue(DEFLATE))));
    }

    #[test]
    fn a_corrupt_queue_stops_the_device() {
        let mut guest = Guest::new(&QUEUE_SIZES);
        let _running = running(&guest);
        guest.set_available(usize::from(REPORTING), 1000);
        guest.kick(usize::from(REPORTING));
        guest.wait_interrupt();
        assert!(guest.interrupt.is_reset_needed());
    }

    #[test]
    fn a_device_that_cannot_hear_its_driver_says_so() {
        for queue in [INFLATE, DEFLATE, REPORTING] {
            let guest = Guest::new(&QUEUE_SIZES);
            let (mut device, _handle) = BalloonDevice::new(EventLoop::spawn("test").unwrap().handle());
            device.activate(guest.deaf_activation(usize::from(queue))).unwrap();
            assert!(guest.interrupt.is_reset_needed());
        }
    }

    #[test]
    fn the_target_is_announced_and_the_driver_answers() {
        let guest = Guest::new(&QUEUE_SIZES);
        let (mut device, handle) = running(&guest);
        handle.set_target(0x0102_0304);
        assert!(guest.interrupted());
        device.write_config(CONFIG_ACTUAL, &7u32.to_le_bytes());
        device.write_config(0, &[9; 4]);
        device.write_config(CONFIG_ACTUAL, &[9; 3]);
        assert_eq!(handle.actual(), 7);
        let mut config = [0xff; 10];
        device.read_config(0, &mut config);
        assert_eq!(config, [4, 3, 2, 1, 7, 0, 0, 0, 0, 0]);
        device.reset();
        assert_eq!(handle.actual(), 0);
        handle.set_target(1);
        assert!(!guest.interrupted(), "a driver that is gone hears nothing");
    }

    proptest! {
        #[test]
        fn no_range_drops_what_lies_outside_of_it(start in 0..40_000u64, len in 0..40_000u64) {
            let guest = Guest::new(&[]);
            fill(&guest, 10);
            discard(&guest.memory, START + start, len);
            for (page, kind) in (0..10u64).zip(contents(&guest, 10).chars()) {
                let inside = start <= page * PAGE_SIZE && (page + 1) * PAGE_SIZE <= start + len;
                prop_assert_eq!(kind, if inside { '.' } else { '#' });
            }
        }
    }
}
