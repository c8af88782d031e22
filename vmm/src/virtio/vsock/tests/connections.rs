//! How connections come and go.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::*;
use crate::virtio::vsock::muxer::MAX_CONNECTIONS;
use crate::virtio::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::vsock::{VsockError, VsockHandle};

#[test]
fn the_guest_connects_and_data_flows_both_ways() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    driver.send_data(5000, b"from the guest");
    assert_eq!(read(&host, 14), b"from the guest");
    write(&host, b"from the host");
    let (header, data) = driver.expect(Operation::ReadWrite, 5000);
    assert_eq!(data, b"from the host");
    assert_eq!((header.source_port, header.fwd_cnt), (PORT, 14));
}

#[test]
fn the_host_connects_and_data_waits_for_the_response() {
    let mut driver = Driver::new();
    let host = driver.handle.connect(80).unwrap();
    write(&host, b"early");
    let (request, _) = driver.expect(Operation::Request, 80);
    driver.expect_silence();
    driver.send_header(driver.header(Operation::Response, 80, request.source_port), &[]);
    assert_eq!(driver.expect(Operation::ReadWrite, 80).1, b"early");
    let data = Header { len: 2, ..driver.header(Operation::ReadWrite, 80, request.source_port) };
    driver.send_header(data, b"ok");
    assert_eq!(read(&host, 2), b"ok");
}

#[test]
fn a_connection_that_the_guest_refuses_ends() {
    let mut driver = Driver::new();
    let host = driver.handle.connect(80).unwrap();
    patient(&host);
    let (request, _) = driver.expect(Operation::Request, 80);
    driver.send_header(driver.header(Operation::Reset, 80, request.source_port), &[]);
    assert_eq!(read_to_end(&host), b"");
    driver.expect_silence();
}

#[test]
fn a_request_of_the_host_waits_for_the_driver() {
    let events = EventLoop::spawn("test").unwrap().handle();
    let (mut device, handle) = VsockDevice::new(CID, events).unwrap();
    let _host = handle.connect(80).unwrap();
    let mut guest = Guest::new(device.queue_sizes());
    guest.push(RX, &[Part::In(RX_BUFFER)]);
    guest.activate(&mut device, 0);
    let packet = guest.wait_used(RX).data;
    let header = Header::from_bytes(packet[..].try_into().unwrap());
    assert_eq!((header.operation, header.destination_port), (Some(Operation::Request), 80));
}

#[test]
fn a_request_without_a_listener_is_refused() {
    let mut driver = Driver::new();
    driver.send(Operation::Request, 5000);
    let (reset, _) = driver.expect(Operation::Reset, 5000);
    assert_eq!(reset.source_port, PORT);
}

#[test]
fn packets_without_a_connection_are_reset_but_for_resets() {
    let mut driver = Driver::new();
    let _listener = driver.listen();
    for operation in [Operation::Response, Operation::Shutdown, Operation::ReadWrite, Operation::CreditUpdate]
    {
        driver.send(operation, 5000);
        driver.expect(Operation::Reset, 5000);
    }
    driver.send(Operation::Reset, 5000);
    driver.expect_silence();
}

#[test]
fn the_end_of_the_hosts_stream_follows_its_data() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    write(&host, b"last words");
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(driver.expect(Operation::ReadWrite, 5000).1, b"last words");
    assert_eq!(driver.expect(Operation::Shutdown, 5000).0.flags, SHUTDOWN_SEND);
    driver.send_data(5000, b"still here");
    assert_eq!(read(&host, 10), b"still here");

    driver.shut_down(5000, SHUTDOWN_SEND);
    driver.expect(Operation::Reset, 5000);
    assert_eq!(read_to_end(&host), b"");
    driver.expect_silence();
}

/// Both directions end. The device may see the end of the stream a moment before it sees that nobody reads any more.
fn expect_the_end(driver: &mut Driver, port: u32) {
    let flags = driver.expect(Operation::Shutdown, port).0.flags;
    if flags != SHUTDOWN_BOTH {
        assert_eq!(flags, SHUTDOWN_SEND);
        assert_eq!(driver.expect(Operation::Shutdown, port).0.flags, SHUTDOWN_BOTH);
    }
    driver.expect(Operation::Reset, port);
}

#[test]
fn the_end_of_the_guests_stream_follows_its_data() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    driver.send_data(5000, b"last words");
    driver.shut_down(5000, SHUTDOWN_SEND);
    assert_eq!(read_to_end(&host), b"last words");
    write(&host, b"still here");
    assert_eq!(driver.expect(Operation::ReadWrite, 5000).1, b"still here");
    drop(host);
    expect_the_end(&mut driver, 5000);
}

#[test]
fn a_host_end_that_closes_ends_both_directions() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    write(&host, b"last words");
    drop(host);
    assert_eq!(driver.expect(Operation::ReadWrite, 5000).1, b"last words");
    expect_the_end(&mut driver, 5000);
    driver.send_data(5000, b"too late");
    driver.expect(Operation::Reset, 5000);
}

#[test]
fn a_host_end_that_stops_reading_is_announced_when_the_guest_writes() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    host.shutdown(Shutdown::Read).unwrap();
    driver.send_data(5000, b"unwanted");
    let (header, _) = driver.expect(Operation::Shutdown, 5000);
    assert_eq!((header.flags, header.fwd_cnt), (SHUTDOWN_RECEIVE, 8));
    write(&host, b"the other direction lives");
    assert_eq!(driver.expect(Operation::ReadWrite, 5000).1, b"the other direction lives");
}

#[test]
fn a_guest_that_stops_reading_fails_the_hosts_writes() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let mut host = driver.connect(&listener, 5000);
    driver.shut_down(5000, SHUTDOWN_RECEIVE);
    assert_eq!(host.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    driver.send_data(5000, b"the other direction lives");
    assert_eq!(read(&host, 25), b"the other direction lives");
}

#[test]
fn what_the_host_wrote_and_the_guest_never_read_does_not_spoil_the_end() {
    let mut driver = Driver { buf_alloc: 4, ..Driver::new() };
    let listener = driver.listen();
    let mut host = driver.connect(&listener, 5000);
    write(&host, b"more than the guest has room for");
    assert_eq!(driver.expect(Operation::ReadWrite, 5000).1, b"more");
    driver.expect(Operation::CreditRequest, 5000);
    driver.send_data(5000, b"bye");
    driver.shut_down(5000, SHUTDOWN_BOTH);
    driver.expect(Operation::Reset, 5000);
    assert_eq!(read_to_end(&host), b"bye", "an end, and not an error");
    assert_eq!(host.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn what_the_guest_sent_before_it_was_gone_still_arrives() {
    for reset in [false, true] {
        let mut driver = Driver::new();
        let listener = driver.listen();
        let host = driver.connect(&listener, 5000);
        // More than the socket holds, so that a part waits in the device.
        let sent = pattern(400_000);
        let (first, second) = sent.split_at(200_000);
        driver.send_data(5000, first);
        driver.send_data(5000, second);
        if reset {
            driver.send(Operation::Reset, 5000);
        } else {
            driver.shut_down(5000, SHUTDOWN_BOTH);
            while driver.receive().0.operation != Some(Operation::Reset) {}
        }
        // The guest may use the ports anew at once.
        driver.send(Operation::Request, 5000);
        while driver.receive().0.operation != Some(Operation::Response) {}
        let again = listener.accept().unwrap();
        driver.send_data(5000, b"new");
        assert_eq!(read(&again, 3), b"new");
        assert!(read_to_end(&host) == sent);
    }
}

#[test]
fn a_second_request_resets_the_connection() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    driver.send(Operation::Request, 5000);
    driver.expect(Operation::Reset, 5000);
    assert_eq!(read_to_end(&host), b"");
}

#[test]
fn many_connections_do_not_mix_up() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let hosts: Vec<_> = (0..200).map(|port| driver.connect(&listener, port)).collect();
    for port in (0..200u32).rev() {
        driver.send_data(port, &port.to_le_bytes());
    }
    for (port, mut host) in (0u32..).zip(&hosts) {
        let mut bytes = [0; 4];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), port);
        write(host, &bytes);
    }
    let mut answered = Vec::new();
    for _ in &hosts {
        let (header, data) = driver.receive();
        assert_eq!(data, header.destination_port.to_le_bytes());
        answered.push(header.destination_port);
    }
    answered.sort();
    assert_eq!(answered, (0..200).collect::<Vec<_>>());
}

#[test]
fn connections_are_capped() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let mut hosts: Vec<_> = (0..MAX_CONNECTIONS as u32).map(|port| driver.connect(&listener, port)).collect();
    driver.send(Operation::Request, 70_000);
    driver.expect(Operation::Reset, 70_000);
    assert!(listener.accept().is_none());
    let refused = driver.handle.connect(80).unwrap();
    assert_eq!(read_to_end(&refused), b"");

    hosts.pop();
    driver.expect(Operation::Shutdown, MAX_CONNECTIONS as u32 - 1);
    driver.expect(Operation::Reset, MAX_CONNECTIONS as u32 - 1);
    driver.connect(&listener, 70_000);
}

#[test]
fn a_reset_by_the_driver_ends_connections_but_not_listeners() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    driver.device.reset();
    assert_eq!(read_to_end(&host), b"");

    driver.guest = Guest::new(driver.device.queue_sizes());
    driver.guest.activate(&mut driver.device, 0);
    driver.offer_buffers(10);
    let host = driver.connect(&listener, 5000);
    driver.send_data(5000, b"again");
    assert_eq!(read(&host, 5), b"again");
}

#[test]
fn context_ids_with_a_meaning_are_refused() {
    let events = EventLoop::spawn("test").unwrap().handle();
    let refusal =
        |cid| VsockDevice::new(cid, events.clone()).map(|(_, handle): (_, VsockHandle)| handle).err();
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert!(matches!(refusal(cid), Some(VsockError::ContextId(refused)) if refused == cid));
    }
    assert!(refusal(3).is_none());
}

#[test]
fn the_configuration_holds_the_context_id() {
    let events = EventLoop::spawn("test").unwrap().handle();
    let (device, _handle) = VsockDevice::new(0x0102_0304, events).unwrap();
    let mut config = [0xff; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [4, 3, 2, 1, 0, 0, 0, 0, 0, 0]);
    let mut beyond = [0xff; 4];
    device.read_config(u64::MAX - 1, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}
