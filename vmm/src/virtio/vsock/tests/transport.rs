//! The event queue: telling the driver that its connections are gone.

use super::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

#[test]
fn a_transport_reset_ends_connections_and_holds_packets_until_it_is_acknowledged() {
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut driver = Driver::without_buffers(features);
        driver.offer_buffers(10);
        for _ in 0..4 {
            driver.guest.push(EVENT, &[Part::In(4)]);
        }
        driver.guest.kick(EVENT);
        let listener = driver.listen();
        let host = driver.connect(&listener, 5000);

        driver.handle.reset_transport().unwrap();
        let event = driver.guest.wait_used(EVENT);
        assert_eq!(event.data, [0; 4]);
        assert_eq!(read_to_end(&host), b"");

        driver.send(Operation::Request, 5001);
        assert!(
            driver.guest.pop_used(RX).is_none(),
            "the driver would take it for one of the old connections"
        );
        driver.guest.push(EVENT, &[Part::In(4)]);
        driver.guest.kick(EVENT);
        driver.expect(Operation::Response, 5001);
    }
}

#[test]
fn a_transport_reset_waits_for_a_buffer() {
    let mut driver = Driver::new();
    driver.handle.reset_transport().unwrap();
    driver.guest.push(EVENT, &[Part::In(3)]);
    driver.guest.push(EVENT, &[Part::Out(vec![0; 4])]);
    driver.guest.kick(EVENT);
    driver.guest.wait_used(EVENT);
    assert_eq!(driver.guest.wait_used(EVENT).len, 0);
    driver.guest.push(EVENT, &[Part::In(8)]);
    driver.guest.kick(EVENT);
    assert_eq!(driver.guest.wait_used(EVENT).data, [0; 4]);
}
