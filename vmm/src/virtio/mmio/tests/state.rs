//! Devices that go on where another one has stopped.

use vm_memory::Bytes;

use super::*;
use crate::virtio::mmio::state::TransportState;

/// A driver in front of a new device, over the memory that another one uses.
fn beside(driver: &Driver) -> Driver {
    let mut other = Driver::new();
    other.transport.memory = driver.transport.memory.clone();
    other
}

fn running() -> Driver {
    let mut driver = Driver::new();
    driver.start(VERSION_1 | FEATURE | EVENT_IDX);
    driver
}

fn set_used(driver: &Driver, queue: u64, index: u16) {
    let at = GuestAddress(0x1_0000 * (queue + 1) + 0x4002);
    driver.transport.memory.write_obj(index, at).unwrap();
}

/// The state by way of its bytes.
fn captured(driver: &mut Driver) -> TransportState {
    let state = driver.transport.capture().unwrap();
    postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap()
}

#[test]
fn another_device_goes_on_with_the_queues() {
    let mut driver = running();
    driver.transport.interrupt.change_config(|| ());
    set_used(&driver, 0, 7);
    set_used(&driver, 1, 65_535);
    let state = captured(&mut driver);
    assert!(!driver.is_active(), "it has stopped");
    assert_eq!(driver.status(), status::DRIVER_OK, "and its driver has noticed nothing");

    let mut other = beside(&driver);
    assert!(state.is_possible(&other.transport.memory) && other.transport.restore(&state));
    assert_eq!(other.status(), status::DRIVER_OK);
    assert_eq!(other.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
    assert_eq!(
        other.read(VIRTIO_MMIO_INTERRUPT_STATUS),
        3,
        "what was pending, and one for what was on its way"
    );
    assert_eq!(other.line.read().unwrap(), 1);
    let log = other.log.lock().unwrap();
    let active = log.active.as_ref().unwrap();
    assert_eq!(active.features, VERSION_1 | FEATURE | EVENT_IDX);
    let indices = active.queues.iter().map(|queue| (queue.queue.next_avail(), queue.queue.next_used()));
    assert_eq!(indices.collect::<Vec<_>>(), [(7, 7), (65_535, 65_535)]);
    assert!(active.queues.iter().all(|queue| queue.kick.read().unwrap() == 1), "it looks at each");
}

#[test]
fn a_device_that_no_driver_has_touched_stays_so() {
    let mut driver = Driver::new();
    let state = captured(&mut driver);
    let mut other = beside(&driver);
    assert!(other.transport.restore(&state));
    assert_eq!((other.status(), other.is_active()), (status::RESET, false));
    assert!(other.line.read().is_err(), "there is nobody to interrupt");
    other.start(VERSION_1);
    assert!(other.is_active());
}

#[test]
fn what_is_not_settled_is_not_captured() {
    let mut driver = Driver::new();
    driver.negotiate(VERSION_1);
    assert_eq!(driver.transport.capture(), None);
    let mut driver = running();
    driver.transport.interrupt.needs_reset();
    assert_eq!(driver.transport.capture(), None);
}

#[test]
fn a_device_of_another_kind_does_not_go_on() {
    let mut driver = running();
    let state = captured(&mut driver);
    struct Other(Recorder, u32, u64, [u16; 2]);
    impl VirtioDevice for Other {
        fn device_type(&self) -> u32 {
            self.1
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.3
        }
        fn features(&self) -> u64 {
            self.2
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            self.0.activate(activation)
        }
        fn reset(&mut self) {}
    }
    for (kind, features, sizes, fits) in [
        (42, FEATURE | EVENT_IDX, [256, 64], true),
        (41, FEATURE | EVENT_IDX, [256, 64], false),
        (42, EVENT_IDX, [256, 64], false),
        (42, FEATURE | EVENT_IDX, [128, 64], false),
    ] {
        let device = Other(Recorder(Arc::default()), kind, features, sizes);
        let (memory, line) = (driver.transport.memory.clone(), driver.line.clone());
        let mut transport = Transport::new(Box::new(device), memory, Arc::default(), line).unwrap();
        assert_eq!(transport.restore(&state), fits, "{kind} {features:#x} {sizes:?}");
    }
}

#[test]
fn queues_outside_of_memory_are_not_possible() {
    let mut driver = running();
    let state = captured(&mut driver);
    assert!(state.is_possible(&driver.transport.memory));
    let small = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap());
    assert!(!state.is_possible(&small));
}
