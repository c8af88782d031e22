//! The transport as a driver sees it: by its registers.

use std::sync::Mutex;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::ActivateError;

mod state;

const MEMORY: usize = 1 << 20;
const FEATURE: u64 = 1 << 5;
const CONFIG_OFFSET: u64 = VIRTIO_MMIO_CONFIG as u64;

/// What the transport asked of the device.
#[derive(Default)]
struct Log {
    active: Option<Activation>,
    activations: usize,
    resets: usize,
    config: [u8; 8],
    refuses: bool,
}

/// A device with two queues that writes down what happens to it.
struct Recorder(Arc<Mutex<Log>>);

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn features(&self) -> u64 {
        FEATURE | EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let log = self.0.lock().unwrap();
        for (byte, value) in data.iter_mut().zip(log.config.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut log = self.0.lock().unwrap();
        for (value, byte) in log.config.iter_mut().skip(offset as usize).zip(data) {
            *value = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.0.lock().unwrap();
        assert!(log.active.is_none(), "activated twice without a reset");
        log.activations += 1;
        if log.refuses {
            return Err(ActivateError::MissingQueue(1));
        }
        log.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.active = None;
        log.resets += 1;
    }
}

/// A driver in front of the recorder.
struct Driver {
    transport: Transport,
    log: Arc<Mutex<Log>>,
    line: Arc<EventFd>,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let log = Arc::new(Mutex::new(Log::default()));
        let page = Arc::default();
        let transport =
            Transport::new(Box::new(Recorder(log.clone())), Arc::new(memory), page, line.clone()).unwrap();
        Self { transport, log, line }
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(register.into(), &mut data);
        let value = u32::from_le_bytes(data);
        if Readable::at(register.into()).is_some() {
            assert_eq!(self.transport.page.load(register), value, "what the guest sees at {register:#x}");
        }
        value
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn set_status(&mut self, status: u32) {
        self.write(VIRTIO_MMIO_STATUS, status);
    }

    fn offered(&mut self) -> u64 {
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    fn accept(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// Up to FEATURES_OK.
    fn negotiate(&mut self, features: u64) {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        self.accept(features);
        self.set_status(status::FEATURES_OK);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        let base = 0x1_0000 * (index + 1);
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x2000);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x4000);
        for high in [VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_USED_HIGH] {
            self.write(high, 0);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// All the way up, with both queues.
    fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.set_up_queue(0, 128);
        self.set_up_queue(1, 64);
        self.set_status(status::DRIVER_OK);
    }

    fn is_active(&self) -> bool {
        self.log.lock().unwrap().active.is_some()
    }
}

#[test]
fn verify_spec_4_2_2_a_device_is_recognized() {
    let driver = Driver::new();
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(driver.status(), 0);
}

#[test]
fn verify_spec_4_2_3_1_1_an_empty_slot_has_no_device() {
    let read = |offset: u32| {
        let mut data = [0xaa; 4];
        registers::read_empty(offset.into(), &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(read(VIRTIO_MMIO_DEVICE_ID), 0);
    assert_eq!(read(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(read(VIRTIO_MMIO_CONFIG), 0);
}

#[test]
fn verify_spec_3_1_1_a_device_starts() {
    let mut driver = Driver::new();
    driver.start(VERSION_1 | FEATURE | EVENT_IDX);
    assert_eq!(driver.status(), status::DRIVER_OK);
    let log = driver.log.lock().unwrap();
    let active = log.active.as_ref().unwrap();
    assert_eq!(active.features, VERSION_1 | FEATURE | EVENT_IDX);
    let queues: Vec<_> = active.queues.iter().map(|queue| (queue.index, queue.queue.size())).collect();
    assert_eq!(queues, [(0, 128), (1, 64)]);
    let queue = &active.queues[1].queue;
    assert_eq!((queue.desc_table(), queue.avail_ring(), queue.used_ring()), (0x2_0000, 0x2_2000, 0x2_4000));
    assert!(queue.event_idx_enabled());
}

#[test]
fn event_idx_is_used_only_where_it_was_accepted() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    let log = driver.log.lock().unwrap();
    assert!(!log.active.as_ref().unwrap().queues[0].queue.event_idx_enabled());
}

#[test]
fn a_queue_that_the_driver_left_out_is_absent() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(1, 64);
    driver.set_status(status::DRIVER_OK);
    let log = driver.log.lock().unwrap();
    let queues = &log.active.as_ref().unwrap().queues;
    assert_eq!(queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [1]);
}

#[test]
fn verify_spec_2_2_features_come_in_two_halves() {
    let mut driver = Driver::new();
    assert_eq!(driver.offered(), VERSION_1 | FEATURE | EVENT_IDX);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn verify_spec_2_2_2_features_that_were_not_offered_are_refused() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1 | 1 << 6);
    assert_eq!(driver.status(), status::DRIVER);
    driver.accept(VERSION_1 | FEATURE);
    driver.set_status(status::FEATURES_OK);
    assert_eq!(driver.status(), status::FEATURES_OK, "the driver may think again");
}

#[test]
fn verify_spec_6_1_legacy_drivers_are_refused() {
    let mut driver = Driver::new();
    driver.negotiate(FEATURE);
    assert_eq!(driver.status(), status::DRIVER);
}

#[test]
fn features_are_settled_once() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.accept(VERSION_1 | FEATURE);
    driver.set_up_queue(0, 8);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.log.lock().unwrap().active.as_ref().unwrap().features, VERSION_1);
}

#[test]
fn a_driver_that_skips_a_step_stays_where_it_is() {
    for skipped in [status::DRIVER, status::FEATURES_OK, status::DRIVER_OK] {
        let mut driver = Driver::new();
        driver.set_status(skipped);
        assert_eq!(driver.status(), 0, "{skipped:#x}");
    }
    let mut driver = Driver::new();
    driver.set_status(status::ACKNOWLEDGE);
    driver.set_status(status::DRIVER);
    driver.set_up_queue(0, 8);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.status(), status::DRIVER);
    assert_eq!(driver.log.lock().unwrap().activations, 0);
}

#[test]
fn a_device_is_activated_once() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    driver.set_status(status::DRIVER_OK);
    driver.set_status(status::FEATURES_OK);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.log.lock().unwrap().activations, 1);
}

#[test]
fn queues_cannot_be_moved_under_an_active_device() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn verify_spec_4_2_2_queues_that_do_not_exist_have_no_size() {
    let mut driver = Driver::new();
    for (queue, size) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), size, "{queue}");
    }
    driver.negotiate(VERSION_1);
    driver.set_up_queue(2, 64);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn verify_spec_2_1_2_a_bad_queue_needs_a_reset() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 100);
    driver.set_status(status::DRIVER_OK);
    assert_eq!(driver.status(), status::DRIVER_OK | status::NEEDS_RESET);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(driver.line.read().unwrap(), 1, "the driver is told");
    assert!(!driver.is_active());

    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    driver.start(VERSION_1);
    assert!(driver.is_active());
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let mut driver = Driver::new();
    driver.log.lock().unwrap().refuses = true;
    driver.start(VERSION_1);
    assert_eq!(driver.status(), status::DRIVER_OK | status::NEEDS_RESET);
}

#[test]
fn a_worker_can_ask_for_a_reset() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    let interrupt = driver.log.lock().unwrap().active.as_ref().unwrap().interrupt.clone();
    interrupt.needs_reset();
    assert_eq!(driver.status(), status::DRIVER_OK | status::NEEDS_RESET);
    driver.set_status(0);
    assert_eq!((driver.status(), driver.read(VIRTIO_MMIO_INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn verify_spec_2_4_a_reset_forgets_everything() {
    let mut driver = Driver::new();
    driver.start(VERSION_1 | FEATURE);
    driver.set_status(0);
    assert!(!driver.is_active());
    assert_eq!(driver.log.lock().unwrap().resets, 1, "when the write returns, the device has stopped");
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);

    driver.negotiate(VERSION_1);
    driver.set_status(status::DRIVER_OK);
    let log = driver.log.lock().unwrap();
    let active = log.active.as_ref().unwrap();
    assert_eq!((active.features, active.queues.len()), (VERSION_1, 0));
}

#[test]
fn each_queue_is_kicked_once_after_activation_and_later_by_its_number() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(1, 64);
    driver.set_status(status::DRIVER_OK);
    assert!(driver.transport.kicks()[0].read().is_err(), "not in use");
    {
        let log = driver.log.lock().unwrap();
        let kick = &log.active.as_ref().unwrap().queues[0].kick;
        assert_eq!(kick.read().unwrap(), 1);
    }
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    let log = driver.log.lock().unwrap();
    assert_eq!(log.active.as_ref().unwrap().queues[0].kick.read().unwrap(), 1);
}

#[test]
fn verify_spec_4_2_2_interrupts_are_acknowledged_by_reason() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    let interrupt = driver.log.lock().unwrap().active.as_ref().unwrap().interrupt.clone();
    interrupt.used_buffers();
    interrupt.change_config(|| ());
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn verify_spec_2_5_1_the_generation_changes_with_the_configuration() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    let before = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    driver.log.lock().unwrap().active.as_ref().unwrap().interrupt.change_config(|| ());
    assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

#[test]
fn verify_spec_2_5_1_a_configuration_and_its_generation_change_together() {
    let driver = Driver::new();
    let interrupt = driver.transport.interrupt.clone();
    // Both halves of a field always hold the same number, and so does the generation.
    let log = driver.log.clone();
    let changes = std::thread::spawn(move || {
        for value in 1..=2000_u32 {
            interrupt.change_config(|| {
                log.lock().unwrap().config[..4].copy_from_slice(&value.to_le_bytes());
                std::thread::yield_now();
                log.lock().unwrap().config[4..].copy_from_slice(&value.to_le_bytes());
            });
        }
    });
    let mut last = 0;
    while last < 2000 {
        let before = driver.transport.page.load(VIRTIO_MMIO_CONFIG_GENERATION);
        let halves = [driver.read(VIRTIO_MMIO_CONFIG), driver.read(VIRTIO_MMIO_CONFIG + 4)];
        last = driver.transport.page.load(VIRTIO_MMIO_CONFIG_GENERATION);
        if last == before {
            assert_eq!(halves, [last; 2]);
        }
    }
    changes.join().unwrap();
}

#[test]
fn the_configuration_is_read_in_any_width() {
    let driver = Driver::new();
    driver.log.lock().unwrap().config = [1, 2, 3, 4, 5, 6, 7, 8];
    let mut byte = [0];
    driver.transport.read(CONFIG_OFFSET + 5, &mut byte);
    assert_eq!(byte, [6]);
    let mut long = [0; 8];
    driver.transport.read(CONFIG_OFFSET + 4, &mut long);
    assert_eq!(long, [5, 6, 7, 8, 0, 0, 0, 0]);
}

#[test]
fn the_configuration_is_written_by_a_driver_only() {
    let mut driver = Driver::new();
    driver.transport.write(CONFIG_OFFSET, &[1]);
    assert_eq!(driver.log.lock().unwrap().config[0], 0);
    driver.set_status(status::ACKNOWLEDGE);
    driver.set_status(status::DRIVER);
    driver.transport.write(CONFIG_OFFSET, &[1]);
    assert_eq!(driver.log.lock().unwrap().config[0], 1);
    driver.set_status(status::DRIVER | status::FAILED);
    driver.transport.write(CONFIG_OFFSET, &[2]);
    assert_eq!(driver.log.lock().unwrap().config[0], 1);
}

#[test]
fn verify_spec_4_2_2_2_registers_are_32_bits_wide_and_aligned() {
    let mut driver = Driver::new();
    for width in [1, 2, 3, 8] {
        let mut data = vec![0xaa; width];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0; width]);
        driver.transport.write(VIRTIO_MMIO_STATUS.into(), &vec![1; width]);
    }
    let mut data = [0xaa; 4];
    driver.transport.read(2, &mut data);
    assert_eq!((data, driver.status()), ([0; 4], 0));
}

#[test]
fn verify_spec_4_2_2_there_is_no_shared_memory() {
    let driver = Driver::new();
    for register in [VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_BASE_LOW] {
        assert_eq!(driver.read(register), u32::MAX);
    }
}

#[test]
fn an_unplugged_device_is_reset() {
    let mut driver = Driver::new();
    driver.start(VERSION_1);
    let device = driver.transport.into_device();
    assert_eq!(device.device_type(), 42);
    assert!(driver.log.lock().unwrap().active.is_none());
}

/// An access of a driver: mostly to registers that exist, with values that sometimes make sense.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let offset = prop_oneof![
        6 => (0_u64..0x48).prop_map(|word| word * 4),
        2 => Just(u64::from(VIRTIO_MMIO_STATUS)),
        1 => 0_u64..0x1000,
        1 => any::<u64>(),
    ];
    let known = prop::sample::select(vec![0_u32, 1, 2, 3, 7, 11, 15, 64, 128, 0x1_0000, 0x2_0000, u32::MAX]);
    let data = prop_oneof![
        4 => known.prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..9),
    ];
    (any::<bool>(), offset, data)
}

proptest! {
    #[test]
    fn no_order_of_accesses_breaks_the_transport(
        accesses in prop::collection::vec(access(), 0..200),
        starts in any::<bool>(),
    ) {
        let mut driver = Driver::new();
        if starts {
            driver.start(VERSION_1);
        }
        for (is_write, offset, mut data) in accesses {
            if is_write {
                driver.transport.write(offset, &data);
            } else {
                driver.transport.read(offset, &mut data);
            }
            // The device is active exactly when the status says so.
            prop_assert_eq!(driver.is_active(), driver.status() & !status::FAILED == status::DRIVER_OK);
            let log = driver.log.lock().unwrap();
            for queue in log.active.iter().flat_map(|active| &active.queues) {
                prop_assert!(queue.queue.is_valid(&*driver.transport.memory));
            }
        }
        driver.set_status(0);
        driver.start(VERSION_1);
        prop_assert!(driver.is_active(), "a reset helps always");
    }
}
