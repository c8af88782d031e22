//! Frames over real virtqueues: to a socket that keeps the bounds of frames as a tap does, and to a tap.

use std::fs::OpenOptions;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::event_loop::EventLoop;
use crate::virtio::testing::{Descriptor, Guest, MEMORY, NEXT, Part, WRITE};

const RX: usize = RECEIVE_QUEUE as usize;
const TX: usize = TRANSMIT_QUEUE as usize;

/// A worker between a guest's queues and a socket.
struct Wire {
    guest: Guest,
    far: UnixDatagram,
    post: Post,
}

impl Wire {
    fn new(mergeable: bool, features: u64, largest: usize) -> Wire {
        let guest = Guest::new(&QUEUE_SIZES);
        let activation = guest.activation(features);
        Wire::with(guest, activation, mergeable, largest)
    }

    fn with(guest: Guest, activation: Activation, mergeable: bool, largest: usize) -> Wire {
        Wire::throttled(guest, activation, mergeable, largest, Throttles::default())
    }

    fn throttled(
        guest: Guest,
        activation: Activation,
        mergeable: bool,
        largest: usize,
        throttles: Throttles,
    ) -> Wire {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let [transmit, receive] = [queues.pop().unwrap(), queues.pop().unwrap()];
        let queues = [receive.into(), transmit.into()];
        let tap = Tap::new(near.into());
        let largest = HEADER + LINK_HEADER + largest;
        let mut post = Post::new(EventLoop::spawn("test").unwrap().handle());
        let to_worker = interrupt.clone();
        post.start(interrupt, |stop| {
            Worker::new(memory, to_worker, tap, queues, mergeable, largest, stop).throttled(throttles)
        })
        .unwrap();
        Wire { guest, far, post }
    }

    /// A wire of so many bytes a second each way.
    fn limited(rate: u64) -> Wire {
        let guest = Guest::new(&QUEUE_SIZES);
        let activation = guest.activation(0);
        let rate = std::num::NonZeroU64::new(rate);
        let throttles = Throttles::new(Rates { receive: rate, transmit: rate }).unwrap();
        Wire::throttled(guest, activation, false, 1500, throttles)
    }

    fn offer(&mut self, parts: &[Part]) {
        self.guest.push(RX, parts);
        self.guest.kick(RX);
    }

    /// Takes one received frame, out of as many buffers as its header says, without the header.
    fn receive(&mut self) -> Vec<u8> {
        let mut data = self.guest.wait_used(RX).data;
        let buffers = u16::from_le_bytes([data[10], data[11]]);
        for _ in 1..buffers {
            data.extend(self.guest.wait_used(RX).data);
        }
        data.split_off(HEADER)
    }

    fn send(&mut self, parts: &[Part]) {
        self.guest.push(TX, parts);
        self.guest.kick(TX);
        assert_eq!(self.guest.wait_used(TX).len, 0);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.post.stop();
    }
}

/// A frame as the tap hands it over: its header, in which the number of buffers is garbage, and bytes.
fn frame(len: usize) -> Vec<u8> {
    let bytes = (0..len).map(|i| (i * 31 + i / 251) as u8);
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee].into_iter().chain(bytes).collect()
}

#[test]
fn frames_are_received_in_order_in_one_buffer_each() {
    let mut wire = Wire::new(false, 0, 1500);
    for len in [1, 60, 1514] {
        wire.far.send(&frame(len)).unwrap();
    }
    for len in [1, 60, 1514] {
        wire.offer(&[Part::In(12), Part::In(2000)]);
        assert_eq!(wire.receive(), frame(len)[HEADER..]);
    }
    wire.guest.wait_interrupt();
}

#[test]
fn a_long_frame_is_spread_over_buffers() {
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut wire = Wire::new(true, features, MAX_PACKET);
        for _ in 0..100 {
            wire.guest.push(RX, &[Part::In(1526)]);
        }
        wire.guest.kick(RX);
        for len in [65_000, 1514, 1515, 3040, 3041, 42] {
            wire.far.send(&frame(len)).unwrap();
            assert_eq!(wire.receive(), frame(len)[HEADER..], "{len}");
        }
    }
}

#[test]
fn a_frame_waits_until_there_are_enough_buffers() {
    let mut wire = Wire::new(true, 0, MAX_PACKET);
    wire.far.send(&frame(5000)).unwrap();
    wire.far.send(&frame(10)).unwrap();
    for _ in 0..3 {
        wire.offer(&[Part::In(1500)]);
    }
    // A frame out has its turn after the kicks above, and all of them were in vain.
    wire.send(&[Part::Out(frame(60))]);
    assert!(wire.guest.pop_used(RX).is_none());
    wire.offer(&[Part::In(2000)]);
    assert_eq!(wire.receive(), frame(5000)[HEADER..]);
    wire.offer(&[Part::In(100)]);
    assert_eq!(wire.receive(), frame(10)[HEADER..]);
}

#[test]
fn a_frame_too_long_for_its_buffer_is_dropped() {
    let mut wire = Wire::new(false, 0, 1500);
    wire.far.send(&frame(300)).unwrap();
    wire.far.send(&frame(10)).unwrap();
    wire.offer(&[Part::In(200)]);
    assert_eq!(wire.receive(), frame(10)[HEADER..]);
}

#[test]
fn a_frame_in_too_many_pieces_is_dropped_and_holds_up_nothing() {
    let mut wire = Wire::new(true, 0, MAX_PACKET);
    // Each buffer has 300 pieces; four of them are more than one system call takes.
    for _ in 0..4 {
        wire.guest.push_indirect(RX, &vec![Part::In(10); 300]);
    }
    wire.far.send(&frame(9500)).unwrap();
    wire.far.send(&frame(5000)).unwrap();
    wire.guest.kick(RX);
    assert_eq!(wire.receive(), frame(5000)[HEADER..]);
}

#[test]
fn a_frame_that_a_full_queue_cannot_hold_is_dropped() {
    let mut wire = Wire::new(true, 0, MAX_PACKET);
    for _ in 0..QUEUE_SIZES[RX] {
        wire.guest.push(RX, &[Part::In(20)]);
    }
    wire.far.send(&frame(6000)).unwrap();
    wire.far.send(&frame(5000)).unwrap();
    wire.guest.kick(RX);
    assert_eq!(wire.receive(), frame(5000)[HEADER..]);
}

#[test]
fn a_buffer_without_room_comes_back_with_those_before_it() {
    let mut wire = Wire::new(true, 0, MAX_PACKET);
    let heads = [wire.guest.push(RX, &[Part::In(100)]), wire.guest.push(RX, &[Part::In(0), Part::In(0)])];
    let good = wire.guest.push(RX, &[Part::In(6000)]);
    wire.far.send(&frame(5000)).unwrap();
    wire.guest.kick(RX);
    for head in heads {
        let used = wire.guest.wait_used(RX);
        assert_eq!((used.head, used.len), (head, 0));
    }
    let used = wire.guest.wait_used(RX);
    assert_eq!((used.head, &used.data[HEADER..]), (good, &frame(5000)[HEADER..]));
}

#[test]
fn many_frames_pass_both_ways() {
    let mut wire = Wire::new(true, 1 << VIRTIO_RING_F_EVENT_IDX, 1500);
    let far = wire.far.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for round in 0..2000 {
            far.send(&frame(round % 1000 + 1)).unwrap();
        }
    });
    for round in 0..2000 {
        if wire.guest.free_slots(RX) > 0 {
            wire.offer(&[Part::In(1600)]);
        }
        assert_eq!(wire.receive(), frame(round % 1000 + 1)[HEADER..]);
    }
    sender.join().unwrap();
    let mut received = [0; 2000];
    for round in 0..2000 {
        wire.send(&[Part::Out(frame(round % 1000 + 1))]);
        let len = wire.far.recv(&mut received).unwrap();
        assert_eq!(received[..len], frame(round % 1000 + 1));
    }
}

#[test]
fn no_more_goes_through_than_is_allowed_and_nothing_is_lost() {
    let mut wire = Wire::limited(100_000);
    for _ in 0..40 {
        wire.guest.push(RX, &[Part::In(2000)]);
        wire.guest.push(TX, &[Part::Out(frame(1500))]);
    }
    let start = std::time::Instant::now();
    wire.guest.kick(RX);
    wire.guest.kick(TX);
    for _ in 0..40 {
        wire.far.send(&frame(1500)).unwrap();
    }
    let mut received = [0; 2000];
    for _ in 0..40 {
        assert_eq!(wire.far.recv(&mut received).unwrap(), HEADER + 1500);
        assert_eq!(wire.receive().len(), 1500);
    }
    // 60,000 bytes less the burst take 0.58 s, and both ways have a line of their own.
    let elapsed = start.elapsed();
    assert!(elapsed > Duration::from_millis(500), "{elapsed:?}");
}

#[test]
fn frames_are_sent_whatever_their_descriptors() {
    let mut wire = Wire::new(false, 0, 1500);
    let whole = frame(1514);
    let mut received = [0; 70_000];
    for parts in [vec![whole.clone()], vec![whole[..12].to_vec(), whole[12..].to_vec()], pieces(&whole)] {
        wire.send(&parts.into_iter().map(Part::Out).collect::<Vec<_>>());
        let len = wire.far.recv(&mut received).unwrap();
        assert_eq!(received[..len], whole);
    }
}

fn pieces(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.chunks(100).map(<[u8]>::to_vec).collect()
}

#[test]
fn frames_without_sense_are_dropped() {
    let mut wire = Wire::new(false, 0, 1500);
    wire.send(&[Part::Out(vec![0; 12])]);
    wire.send(&[Part::Out(vec![])]);
    wire.send(&[Part::Out(frame(65_600))]);
    wire.send(&[Part::In(100)]);
    wire.send(&[Part::Out(frame(60)), Part::In(100)]);
    wire.send(&[Part::Out(frame(61))]);
    let mut received = [0; 100];
    assert_eq!(wire.far.recv(&mut received).unwrap(), 73, "only the last one passed");
}

#[test]
fn chains_without_sense_harm_nothing() {
    let chains: [&[Descriptor]; 4] = [
        &[Descriptor::new(MEMORY - 4, 100, 0, 0)],
        &[Descriptor::new(0x50_0000, 1, NEXT, 0)],
        &[Descriptor::new(u64::MAX, 100, WRITE, 0)],
        &[Descriptor::new(0x50_0000, u32::MAX, 0, 0)],
    ];
    for chain in chains {
        let mut wire = Wire::new(true, 0, 1500);
        wire.guest.push_raw(TX, chain);
        wire.guest.kick(TX);
        assert_eq!(wire.guest.wait_used(TX).len, 0);
        wire.guest.push_raw(RX, chain);
        wire.far.send(&frame(60)).unwrap();
        wire.guest.kick(RX);
        assert_eq!(wire.guest.wait_used(RX).len, 0, "it comes back at once");
        // The other queue still works.
        wire.guest.push_raw(TX, chain);
        wire.guest.kick(TX);
        assert_eq!(wire.guest.wait_used(TX).len, 0);
    }
}

#[test]
fn a_corrupt_queue_stops_the_worker() {
    let mut wire = Wire::new(true, 0, 1500);
    wire.guest.set_available(RX, 300);
    wire.far.send(&frame(60)).unwrap();
    wire.guest.kick(RX);
    wire.guest.wait_needs_reset();
    assert!(wire.guest.pop_used(RX).is_none());
    let mut wire = Wire::new(true, 0, 1500);
    wire.guest.set_available(TX, 300);
    wire.guest.kick(TX);
    wire.guest.wait_needs_reset();
}

#[test]
fn a_worker_that_cannot_hear_its_driver_says_so() {
    for queue in [RX, TX] {
        let guest = Guest::new(&QUEUE_SIZES);
        let activation = guest.deaf_activation(queue);
        assert!(Wire::with(guest, activation, false, 1500).guest.interrupt.is_reset_needed());
    }
}

#[test]
fn the_buffers_of_a_frame_become_visible_together() {
    let mut guest = Guest::new(&QUEUE_SIZES);
    // Of this ring only the first entry lies in memory, so the work ends after one element.
    let mut activation = guest.activation(0);
    activation.queues[RX].queue.try_set_used_ring_address(GuestAddress(MEMORY - 12)).unwrap();
    guest.push(RX, &[Part::In(100)]);
    guest.push(RX, &[Part::In(100)]);
    let wire = Wire::with(guest, activation, true, 150);
    wire.far.send(&frame(150)).unwrap();
    wire.guest.kick(RX);
    wire.guest.wait_needs_reset();
    assert_eq!(wire.guest.memory.read_obj::<u16>(GuestAddress(MEMORY - 10)).unwrap(), 0);
}

#[test]
fn the_configuration_has_address_and_mtu() {
    let events = EventLoop::spawn("test").unwrap().handle();
    let file = || tempfile::tempfile().unwrap();
    let mut device = NetDevice::new(file(), [2, 0, 0, 0, 0, 9], 9000, events.clone());
    let mut config = [0xff; 14];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0x28, 0x23, 0, 0]);
    assert_ne!(device.features() & (1 << VIRTIO_NET_F_MTU), 0);
    assert_eq!(NetDevice::new(file(), [0; 6], 0, events).features() & (1 << VIRTIO_NET_F_MTU), 0);
    // No tap, no device.
    let guest = Guest::new(&QUEUE_SIZES);
    assert!(matches!(device.activate(guest.activation(0)), Err(ActivateError::Io(_))));
    device.reset();
}

/// Opens a tap in a network namespace of this thread's own, as the shim would.
fn tap() -> Option<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNET).ok()?;
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    request[16..18].copy_from_slice(&(flags as u16).to_le_bytes());
    nix::ioctl_write_ptr_bad!(attach, nix::request_code_write!(b'T', 202, size_of::<i32>()), [u8; 40]);
    // SAFETY: the request is an `ifreq`, which is 40 bytes long.
    unsafe { attach(std::os::fd::AsRawFd::as_raw_fd(&tap), &request) }.ok()?;
    let status = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&tap, nix::fcntl::FcntlArg::F_SETFL(status)).ok()?;
    ip(&["link", "set", "tap0", "address", "02:00:00:00:00:01", "up"]).then_some(tap.into())
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).status().is_ok_and(|status| status.success())
}

/// This test needs root and /dev/net/tun, and passes without doing anything elsewhere.
#[test]
fn a_tap_takes_the_offers_of_the_driver_and_carries_frames() {
    let Some(tap) = tap() else { return };
    let mut device =
        NetDevice::new(tap, [2, 0, 0, 0, 0, 2], 1500, EventLoop::spawn("test").unwrap().handle());
    let mut guest = Guest::new(&QUEUE_SIZES);
    let features = device.features();
    guest.activate(&mut device, features);
    for _ in 0..128 {
        guest.push(RX, &[Part::In(1526)]);
    }
    guest.kick(RX);

    // Who has 10.9.9.1? The host's kernel answers, to the address in the request.
    assert!(ip(&["address", "add", "10.9.9.1/24", "dev", "tap0"]));
    let mut request = vec![0; HEADER];
    request.extend([0xff; 6]);
    request.extend([2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 9, 9, 2]);
    request.extend([0, 0, 0, 0, 0, 0, 10, 9, 9, 1]);
    request.resize(HEADER + 60, 0);
    guest.push(TX, &[Part::Out(request)]);
    guest.kick(TX);
    guest.wait_used(TX);
    loop {
        let data = guest.wait_used(RX).data;
        assert_eq!(data[10..12], [1, 0]);
        // Frames of the interface's own come as well, such as router solicitations.
        if data[HEADER + 12..HEADER + 14] == [8, 6] && data[HEADER + 21] == 2 {
            assert_eq!(data[HEADER..HEADER + 12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
            break;
        }
    }
    device.reset();
    assert!(guest.pop_used(TX).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_buffers_receive_any_frames(
        rooms in prop::collection::vec(prop::collection::vec(1..300u32, 1..4), 40),
        lens in prop::collection::vec(1..1400usize, 1..4),
    ) {
        let mut wire = Wire::new(true, 1 << VIRTIO_RING_F_EVENT_IDX, 1500);
        for len in &lens {
            wire.far.send(&frame(*len)).unwrap();
        }
        // The first buffer of a frame has to hold the header.
        let wide = |rooms: &Vec<u32>| rooms.iter().map(|room| Part::In(room + 12)).collect::<Vec<_>>();
        rooms.iter().for_each(|rooms| wire.offer(&wide(rooms)));
        let total: u32 = rooms.iter().flatten().map(|room| room + 12).sum();
        let mut needed = 0;
        for len in lens {
            needed += len + HEADER + 1000;
            prop_assume!(needed < total as usize);
            prop_assert_eq!(wire.receive(), &frame(len)[HEADER..]);
        }
    }
}
