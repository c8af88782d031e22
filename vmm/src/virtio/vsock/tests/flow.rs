//! Flow control, and a lot of data.

use std::io::{Read, Write};
use std::thread;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::*;
use crate::virtio::vsock::packet::SHUTDOWN_SEND;

#[test]
fn the_guest_gets_no_more_than_it_granted() {
    let mut driver = Driver { buf_alloc: 1000, ..Driver::new() };
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    let sent = pattern(3000);
    write(&host, &sent);
    let (_, mut arrived) = driver.expect(Operation::ReadWrite, 5000);
    assert_eq!(arrived.len(), 1000);
    driver.expect(Operation::CreditRequest, 5000);
    driver.send(Operation::CreditUpdate, 5000);
    // No news: nothing comes, not even another request.
    driver.expect_silence();

    for (fwd_cnt, len) in [(400, 400), (1400, 1000), (2400, 600)] {
        driver.fwd_cnt = fwd_cnt;
        driver.send(Operation::CreditUpdate, 5000);
        let (_, data) = driver.expect(Operation::ReadWrite, 5000);
        assert_eq!(data.len(), len);
        arrived.extend(data);
        if arrived.len() < sent.len() {
            driver.expect(Operation::CreditRequest, 5000);
        }
    }
    assert!(arrived == sent);
}

#[test]
fn a_guest_that_sends_more_than_it_was_granted_is_reset() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    driver.send(Operation::Request, 5000);
    let (response, _) = driver.expect(Operation::Response, 5000);
    let _host = listener.accept().unwrap();
    let packet = vec![7; 60_000];
    // What the socket of the host end holds, and the credit, and more.
    let mut sent = 0;
    let reset = loop {
        driver.send_data(5000, &packet);
        sent += packet.len();
        if let Some(used) = driver.guest.pop_used(RX) {
            let header = Header::from_bytes(used.data[..HEADER_LEN].try_into().unwrap());
            driver.offer_buffers(1);
            if header.operation == Some(Operation::Reset) {
                break sent;
            }
        }
        assert!(sent < 4 << 20, "the device takes more than it can account for");
    };
    assert!(reset > response.buf_alloc as usize);
}

#[test]
fn a_slow_host_end_gets_everything_that_was_granted() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    driver.send(Operation::Request, 5000);
    let (response, _) = driver.expect(Operation::Response, 5000);
    let host = listener.accept().unwrap();
    patient(&host);
    let sent = pattern(response.buf_alloc as usize);
    for data in sent.chunks(50_000) {
        driver.send_data(5000, data);
    }
    driver.shut_down(5000, SHUTDOWN_SEND);
    let mut arrived = Vec::new();
    let mut chunk = [0; 777];
    while arrived.len() < sent.len() {
        let len = (&host).read(&mut chunk).unwrap();
        assert_ne!(len, 0, "the end comes after the data");
        arrived.extend_from_slice(&chunk[..len]);
    }
    assert!(arrived == sent);
    assert_eq!(read_to_end(&host), b"");
}

#[test]
fn a_guest_that_asks_is_told_of_its_credit() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    driver.send_data(5000, b"12345");
    assert_eq!(read(&host, 5), b"12345");
    driver.send(Operation::CreditRequest, 5000);
    assert_eq!(driver.expect(Operation::CreditUpdate, 5000).0.fwd_cnt, 5);
    driver.expect_silence();
}

#[test]
fn a_stalled_connection_does_not_hold_up_others() {
    let mut driver = Driver { buf_alloc: 10, ..Driver::new() };
    let listener = driver.listen();
    let stalled = driver.connect(&listener, 5000);
    driver.buf_alloc = BUF_ALLOC;
    let other = driver.connect(&listener, 5001);
    write(&stalled, &[1; 1000]);
    driver.expect(Operation::ReadWrite, 5000);
    driver.expect(Operation::CreditRequest, 5000);
    write(&other, b"free");
    assert_eq!(driver.expect(Operation::ReadWrite, 5001).1, b"free");
}

#[test]
fn packets_wait_for_buffers_of_the_guest() {
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut driver = Driver::without_buffers(features);
        let listener = driver.listen();
        driver.send(Operation::Request, 5000);
        let host = listener.accept().unwrap();
        let sent = pattern(20_000);
        write(&host, &sent);
        drop(host);
        assert!(driver.guest.pop_used(RX).is_none());

        let mut arrived = Vec::new();
        let mut operations = Vec::new();
        while operations.last() != Some(&Operation::Reset) {
            driver.guest.push(RX, &[Part::In(40), Part::In(1), Part::In(1000)]);
            driver.guest.kick(RX);
            let packet = driver.guest.wait_used(RX).data;
            let header = Header::from_bytes(packet[..HEADER_LEN].try_into().unwrap());
            arrived.extend_from_slice(&packet[HEADER_LEN..]);
            operations.push(header.operation.unwrap());
        }
        assert!(arrived == sent);
        assert_eq!(operations[0], Operation::Response);
        assert_eq!(operations[operations.len() - 2..], [Operation::Shutdown, Operation::Reset]);
    }
}

/// Sends as Linux 6.12 does: 64 KiB a packet, the header and each page a descriptor of its own.
#[test]
fn a_lot_of_data_goes_to_the_host_unchanged() {
    const LEN: usize = 32 << 20;
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC] {
        let mut driver = Driver::without_buffers(features);
        driver.offer_buffers(100);
        let listener = driver.listen();
        driver.send(Operation::Request, 5000);
        let (response, _) = driver.expect(Operation::Response, 5000);
        let host = listener.accept().unwrap();
        let reader = thread::spawn(move || read_to_end(&host));

        let sent = pattern(LEN);
        let (mut position, mut known) = (0, response.fwd_cnt as usize);
        while position < LEN {
            while driver.guest.pop_used(TX).is_some() {}
            let len = (LEN - position).min(64 << 10);
            if position + len - known > response.buf_alloc as usize {
                known = driver.expect(Operation::CreditUpdate, 5000).0.fwd_cnt as usize;
                continue;
            }
            let header = Header { len: len as u32, ..driver.header(Operation::ReadWrite, 5000, PORT) };
            let mut parts = vec![Part::Out(header.to_bytes().to_vec())];
            parts.extend(sent[position..position + len].chunks(4096).map(|page| Part::Out(page.to_vec())));
            if features != 0 {
                driver.guest.push_indirect(TX, &parts);
            } else {
                while driver.guest.free_slots(TX) < parts.len() {
                    driver.guest.wait_used(TX);
                }
                driver.guest.push(TX, &parts);
            }
            driver.guest.kick(TX);
            position += len;
        }
        while driver.guest.pop_used(TX).is_some() {}
        driver.shut_down_eventually(5000);
        assert!(reader.join().unwrap() == sent);
    }
}

#[test]
fn a_lot_of_data_goes_to_the_guest_unchanged() {
    const LEN: usize = 32 << 20;
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut driver = Driver::without_buffers(features);
        driver.offer_buffers(100);
        let listener = driver.listen();
        let mut host = driver.connect(&listener, 5000);
        let sent = pattern(LEN);
        let writer = thread::spawn({
            let sent = sent.clone();
            move || host.write_all(&sent).unwrap()
        });
        let (mut arrived, mut told) = (Vec::with_capacity(LEN), 0);
        while arrived.len() < LEN {
            let (header, data) = driver.receive();
            match header.operation {
                Some(Operation::ReadWrite) => arrived.extend(data),
                other => assert_eq!(other, Some(Operation::CreditRequest)),
            }
            if arrived.len() - told >= BUF_ALLOC as usize / 2 {
                told = arrived.len();
                driver.fwd_cnt = told as u32;
                driver.send(Operation::CreditUpdate, 5000);
            }
        }
        assert!(arrived == sent);
        writer.join().unwrap();
    }
}

impl Driver {
    /// As `shut_down(SEND)`, while other packets of ours may come back meanwhile.
    fn shut_down_eventually(&mut self, guest_port: u32) {
        let flags = SHUTDOWN_SEND;
        let header = Header { flags, ..self.header(Operation::Shutdown, guest_port, PORT) };
        let head = loop {
            if self.guest.free_slots(TX) > 0 {
                break self.guest.push(TX, &[Part::Out(header.to_bytes().to_vec())]);
            }
            self.guest.wait_used(TX);
        };
        self.guest.kick(TX);
        while self.guest.wait_used(TX).head != head {}
    }
}
