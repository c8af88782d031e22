//! A driver that breaks every rule it can.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::*;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::testing::{Descriptor, MEMORY, NEXT, WRITE};
use crate::virtio::virtqueue::Virtqueue;
use crate::virtio::vsock::handle::Shared;
use crate::virtio::vsock::muxer::{Change, MAX_CONNECTIONS, MAX_REPLIES, Muxer};
use crate::virtio::vsock::packet::SHUTDOWN_SEND;

const BUFFER: u64 = 0x200_0000;

/// Offers descriptors as they are in a fresh device, and asserts that it gives them back and goes on.
fn survives(descriptors: &[Descriptor]) {
    let mut driver = Driver::new();
    let header = driver.header(Operation::Request, 5000, PORT).to_bytes();
    vm_memory::Bytes::write_slice(&*driver.guest.memory, &header, vm_memory::GuestAddress(BUFFER)).unwrap();
    driver.guest.push_raw(TX, descriptors);
    driver.guest.kick(TX);
    assert_eq!(driver.guest.wait_used(TX).len, 0);
    driver.guest.push_raw(TX, &[Descriptor::new(BUFFER, HEADER_LEN as u32, 0, 0)]);
    driver.guest.kick(TX);
    driver.expect(Operation::Reset, 5000);
    driver.guest.wait_used(TX);
    assert!(driver.guest.pop_used(RX).is_none(), "a malformed chain gets no answer");
}

#[test]
fn chains_without_a_whole_header_are_dropped() {
    survives(&[Descriptor::new(BUFFER, HEADER_LEN as u32 - 1, 0, 0)]);
    survives(&[Descriptor::new(BUFFER, 0, 0, 0)]);
    survives(&[Descriptor::new(BUFFER, 0, NEXT, 1), Descriptor::new(BUFFER, 20, 0, 0)]);
}

#[test]
fn chains_that_the_device_may_not_read_are_dropped() {
    survives(&[Descriptor::new(BUFFER, 44, WRITE, 0)]);
    survives(&[Descriptor::new(BUFFER, 44, NEXT, 1), Descriptor::new(BUFFER, 44, WRITE, 0)]);
    survives(&[Descriptor::new(MEMORY - 20, 44, 0, 0)]);
    survives(&[Descriptor::new(u64::MAX - 20, 44, 0, 0)]);
    survives(&[Descriptor::new(BUFFER, u32::MAX, 0, 0)]);
}

#[test]
fn chains_that_lead_nowhere_are_dropped() {
    // Round in a circle, with less than a header in all; beyond the table; an indirect table of odd length.
    survives(&[Descriptor::new(BUFFER, 0, NEXT, 1), Descriptor::new(BUFFER, 0, NEXT, 0)]);
    survives(&[Descriptor::new(BUFFER, 10, NEXT, 128)]);
    survives(&[Descriptor::new(BUFFER, 17, 4, 0)]);
    survives(&[Descriptor::new(MEMORY, 16, 4, 0)]);
}

#[test]
fn a_header_that_promises_more_than_the_chain_holds_resets_the_connection() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    for len in [6, 70_000, u32::MAX] {
        let host = driver.connect(&listener, 5000);
        let header = Header { len, ..driver.header(Operation::ReadWrite, 5000, PORT) };
        driver.send_header(header, b"12345");
        driver.expect(Operation::Reset, 5000);
        assert_eq!(read_to_end(&host), b"");
    }
}

#[test]
fn a_chain_that_holds_more_than_its_header_promises_is_cut() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    let header = Header { len: 3, ..driver.header(Operation::ReadWrite, 5000, PORT) };
    driver.send_header(header, b"12345");
    driver.send_data(5000, b"");
    driver.send_data(5000, b"678");
    assert_eq!(read(&host, 6), b"123678");
}

#[test]
fn header_and_data_may_be_split_anywhere() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    let header = Header { len: 60, ..driver.header(Operation::ReadWrite, 5000, PORT) };
    let data = pattern(60);
    let packet = [&header.to_bytes()[..], &data].concat();
    for size in [1, 7, 43, 45, 104] {
        let parts: Vec<_> = packet.chunks(size).map(|part| Part::Out(part.to_vec())).collect();
        driver.guest.push(TX, &parts);
        driver.guest.push_indirect(TX, &parts);
        driver.guest.kick(TX);
        driver.guest.wait_used(TX);
        driver.guest.wait_used(TX);
        assert_eq!(read(&host, 120), [&data[..], &data].concat());
    }
}

#[test]
fn wrong_addresses_types_and_operations_reach_no_connection() {
    let mut driver = Driver::new();
    let listener = driver.listen();
    let host = driver.connect(&listener, 5000);
    let good = Header { len: 1, ..driver.header(Operation::ReadWrite, 5000, PORT) };

    // Somebody else's packet is nobody's to answer.
    driver.send_header(Header { source_cid: 4, ..good }, b"x");
    driver.send_header(Header { source_cid: HOST_CID, ..good }, b"x");
    driver.expect_silence();

    driver.send_header(Header { socket_type: 2, ..good }, b"x");
    assert_eq!(driver.expect(Operation::Reset, 5000).0.socket_type, 2);

    driver.send_header(Header { destination_cid: 77, ..good }, b"x");
    let packet = driver.guest.wait_used(RX).data;
    let reset = Header::from_bytes(packet[..].try_into().unwrap());
    assert_eq!((reset.operation, reset.source_cid), (Some(Operation::Reset), 77));

    driver.send_data(5000, b"good");
    assert_eq!(read(&host, 4), b"good");
    driver.send_header(Header { operation: None, ..good }, b"x");
    driver.expect(Operation::Reset, 5000);
    assert_eq!(read_to_end(&host), b"");
}

#[test]
fn operations_at_the_wrong_time_reset_the_connection() {
    for operation in [Operation::Response, Operation::Request] {
        let mut driver = Driver::new();
        let listener = driver.listen();
        let host = driver.connect(&listener, 5000);
        driver.send(operation, 5000);
        driver.expect(Operation::Reset, 5000);
        assert_eq!(read_to_end(&host), b"");
    }
    let mut driver = Driver::new();
    let listener = driver.listen();
    let _host = driver.connect(&listener, 5000);
    driver.shut_down(5000, SHUTDOWN_SEND);
    driver.send_data(5000, b"I said I would not");
    driver.expect(Operation::Reset, 5000);
}

#[test]
fn receive_buffers_without_room_are_given_back() {
    let mut driver = Driver::without_buffers(0);
    let _listener = driver.listen();
    driver.guest.push(RX, &[Part::In(HEADER_LEN as u32)]);
    driver.guest.push(RX, &[Part::In(10)]);
    driver.guest.push(RX, &[Part::In(44), Part::Out(vec![0; 100])]);
    driver.guest.push(RX, &[Part::Out(vec![0; 100])]);
    driver.offer_buffers(1);
    driver.send(Operation::Request, 5000);
    for _ in 0..4 {
        assert_eq!(driver.guest.wait_used(RX).len, 0);
    }
    driver.expect(Operation::Response, 5000);
}

#[test]
fn replies_without_buffers_stop_the_transmit_queue_until_there_are_some() {
    let mut driver = Driver::without_buffers(0);
    let header = driver.header(Operation::ReadWrite, 5000, PORT).to_bytes().to_vec();
    let (mut sent, mut taken) = (0, 0);
    while sent < MAX_REPLIES {
        driver.guest.push(TX, &[Part::Out(header.clone())]);
        driver.guest.kick(TX);
        driver.guest.wait_used(TX);
        (sent, taken) = (sent + 1, taken + 1);
    }
    for _ in 0..100 {
        driver.guest.push(TX, &[Part::Out(header.clone())]);
        sent += 1;
    }
    driver.guest.kick(TX);
    driver.offer_buffers(100);
    for _ in 0..sent {
        driver.expect(Operation::Reset, 5000);
        while driver.guest.pop_used(TX).is_some() {
            taken += 1;
        }
    }
    while taken < sent {
        driver.guest.wait_used(TX);
        taken += 1;
    }
}

#[test]
fn a_corrupt_queue_stops_the_device_until_a_reset() {
    for queue in [RX, TX, EVENT] {
        let mut driver = Driver::new();
        let listener = driver.listen();
        let host = driver.connect(&listener, 5000);
        driver.guest.set_available(queue, 1000);
        match queue {
            RX => write(&host, b"x"),
            TX => driver.guest.kick(TX),
            _ => driver.handle.reset_transport().unwrap(),
        }
        // The end, or an error where the device closed with something unread.
        assert_eq!((&host).read(&mut [0]).unwrap_or(0), 0);
        assert!(driver.guest.interrupt.is_reset_needed());
        driver.device.reset();
        driver.guest = Guest::new(driver.device.queue_sizes());
        driver.guest.activate(&mut driver.device, 0);
        driver.offer_buffers(2);
        driver.connect(&listener, 5000);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Packet(Header, usize),
    GiveBuffers(usize),
    HostWrites(usize),
    HostReads(usize),
    HostCloses(usize),
    HostConnects,
}

fn header() -> impl Strategy<Value = Header> {
    use Operation::*;
    let operation = prop_oneof![
        4 => Just(Some(ReadWrite)),
        4 => Just(Some(Request)),
        1 => Just(Some(Response)),
        1 => Just(Some(Reset)),
        2 => Just(Some(Shutdown)),
        1 => Just(Some(CreditUpdate)),
        1 => Just(Some(CreditRequest)),
        1 => Just(None),
    ];
    let rare = |usual: u64| prop_oneof![20 => Just(usual), 1 => any::<u64>()];
    let ports = (0..3u32, prop_oneof![Just(PORT), Just(1 << 30), Just((1 << 30) + 1), any::<u32>()]);
    let counters = (prop_oneof![0..5000u32, any::<u32>()], prop_oneof![0..5000u32, any::<u32>()]);
    (
        rare(CID),
        rare(HOST_CID),
        ports,
        prop_oneof![0..3000u32, any::<u32>()],
        operation,
        any::<u32>(),
        counters,
    )
        .prop_map(|(source_cid, destination_cid, ports, len, operation, flags, counters)| Header {
            source_cid,
            destination_cid,
            source_port: ports.0,
            destination_port: ports.1,
            len,
            socket_type: TYPE_STREAM,
            operation,
            flags,
            buf_alloc: counters.0,
            fwd_cnt: counters.1,
        })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (header(), 0..3000usize).prop_map(|(header, len)| Step::Packet(header, len)),
        2 => (0..10usize).prop_map(Step::GiveBuffers),
        2 => (0..5000usize).prop_map(Step::HostWrites),
        1 => (0..5000usize).prop_map(Step::HostReads),
        1 => (0..8usize).prop_map(Step::HostCloses),
        1 => Just(Step::HostConnects),
    ]
}

/// A muxer without threads or epoll: every socket is asked after each step.
struct Bench {
    guest: Guest,
    queue: Virtqueue,
    muxer: Muxer,
    watched: Vec<u32>,
}

impl Bench {
    fn with_chain<T>(
        &mut self,
        parts: &[Part],
        run: impl FnOnce(&mut Muxer, GuestBuffers<'_>) -> T,
    ) -> (T, Vec<u8>) {
        let head = self.guest.push(0, parts);
        let memory = Arc::clone(&self.guest.memory);
        let chain = self.queue.pop(&memory).unwrap().unwrap();
        let writable = matches!(parts[0], Part::In(_));
        let buffers = match writable {
            true => GuestBuffers::writable(&memory, chain),
            false => GuestBuffers::readable(&memory, chain),
        };
        let result = run(&mut self.muxer, buffers.unwrap());
        self.queue.push_used(&memory, head, if writable { 1000 } else { 0 }).unwrap();
        (result, self.guest.pop_used(0).unwrap().data)
    }

    fn poll_sockets(&mut self) {
        for change in self.muxer.take_changes() {
            if let Change::Add(token) = change {
                self.watched.push(token);
            }
        }
        for &token in &self.watched {
            let Some((socket, _)) = self.muxer.watched(token) else { continue };
            let all = PollFlags::POLLIN | PollFlags::POLLOUT;
            let mut fds = [PollFd::new(socket.as_fd(), all)];
            poll(&mut fds, PollTimeout::ZERO).unwrap();
            let events = fds[0].revents().unwrap_or(PollFlags::empty()).bits() as u32;
            self.muxer.host_event(token, event_manager::EventSet::from_bits_truncate(events));
        }
        self.watched.retain(|&token| self.muxer.watched(token).is_some());
    }
}

#[test]
fn connections_that_end_unheard_of_leave_a_bounded_number_of_replies() {
    let guest = Guest::new(&[16]);
    let queue = Virtqueue::from(guest.activation(0).queues.remove(0));
    let muxer = Muxer::new(CID, Shared::new().unwrap());
    let mut bench = Bench { guest, queue, muxer, watched: Vec::new() };
    for _ in 0..3 * MAX_CONNECTIONS {
        let (device, host) = UnixStream::pair().unwrap();
        bench.muxer.connect(1, device);
        drop(host);
        for change in bench.muxer.take_changes() {
            if let Change::Add(token) = change {
                bench.muxer.refuse(token);
            }
        }
    }
    assert_eq!(bench.muxer.waiting(), MAX_REPLIES);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_the_guest_sends_the_muxer_stays_within_its_bounds(steps in prop::collection::vec(step(), 1..80)) {
        let shared = Shared::new().unwrap();
        let handle = VsockHandle::new(shared.clone());
        let listener = handle.listen(PORT).unwrap();
        let guest = Guest::new(&[16]);
        let queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let mut bench = Bench { guest, queue, muxer: Muxer::new(CID, shared), watched: Vec::new() };
        let mut hosts: Vec<UnixStream> = Vec::new();
        for step in steps {
            match step {
                // The worker takes no packet then.
                Step::Packet(..) if bench.muxer.is_congested() => {}
                Step::Packet(header, len) => {
                    let parts = [Part::Out(header.to_bytes().to_vec()), Part::Out(vec![1; len])];
                    bench.with_chain(&parts, |muxer, packet| muxer.receive(packet));
                }
                Step::GiveBuffers(count) => for _ in 0..count {
                    let (len, data) = bench.with_chain(&[Part::In(1000)], |muxer, room| muxer.next_packet(room));
                    let Some(len) = len else { break };
                    let header = Header::from_bytes(data[..HEADER_LEN].try_into().unwrap());
                    prop_assert_eq!(len, HEADER_LEN + header.len as usize);
                    prop_assert!(len <= 1000);
                    prop_assert!(header.operation.is_some());
                },
                Step::HostWrites(len) => for mut host in hosts.iter() {
                    let _ = host.write(&vec![2; len]);
                },
                Step::HostReads(len) => for mut host in hosts.iter() {
                    let _ = host.read(&mut vec![0; len]);
                },
                Step::HostCloses(index) => if index < hosts.len() {
                    hosts.remove(index);
                },
                Step::HostConnects => {
                    let (device, host) = UnixStream::pair().unwrap();
                    bench.muxer.connect(1, device);
                    hosts.push(host);
                }
            }
            hosts.extend(std::iter::from_fn(|| listener.accept()));
            hosts.iter().for_each(|host| host.set_nonblocking(true).unwrap());
            bench.poll_sockets();
            prop_assert!(bench.watched.len() <= MAX_CONNECTIONS);
            prop_assert!(bench.muxer.waiting() <= MAX_REPLIES + MAX_CONNECTIONS);
        }
        // Whatever happened, the muxer runs out of packets, unless a host end has endless data for the guest.
        drop(hosts);
        bench.poll_sockets();
        let mut packets = 0;
        while bench.muxer.has_packet() {
            bench.with_chain(&[Part::In(1000)], |muxer, room| muxer.next_packet(room));
            bench.poll_sockets();
            packets += 1;
            prop_assert!(packets < 10_000, "the muxer always has another packet");
        }
    }
}
