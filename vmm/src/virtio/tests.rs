//! Devices behind the real transport: what a driver does by registers, and what comes of it in its queues.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::balloon::BalloonDevice;
use super::block::BlockDevice;
use super::mmio::Transport;
use super::rng::RngDevice;
use super::testing::{Guest, Part};
use super::{VirtioDevice, hostile};
use crate::event_loop::{EventLoop, EventLoopHandle};

const STATUS: u64 = 0x70;
const RUNNING: u32 = 15;

fn events() -> EventLoopHandle {
    EventLoop::spawn("test").unwrap().handle()
}

fn status(transport: &Transport) -> u32 {
    let mut data = [0; 4];
    transport.read(STATUS, &mut data);
    u32::from_le_bytes(data)
}

fn reset(transport: &mut Transport) {
    transport.write(STATUS, &[0; 4]);
    assert_eq!(status(transport), 0);
}

/// A request to a disk: a header, data and a status.
fn disk_request(kind: u32, sector: u64, data: Part) -> [Part; 3] {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    [Part::Out(header), data, Part::In(1)]
}

fn disk(bytes: &[u8]) -> (Box<dyn VirtioDevice>, File) {
    let image = tempfile::tempfile().unwrap();
    image.write_all_at(bytes, 0).unwrap();
    (Box::new(BlockDevice::new(image.try_clone().unwrap(), false).unwrap()), image)
}

#[test]
fn a_guest_gets_random_bytes() {
    let mut guest = Guest::new(&[64]);
    let transport = guest.start(Box::new(RngDevice::new(events())));
    guest.push(0, &[Part::In(64)]);
    guest.kick(0);
    guest.wait_interrupt();
    let used = guest.wait_used(0);
    assert_eq!(used.len, 64);
    assert!(used.data.iter().any(|byte| *byte != 0));
    assert_eq!(status(&transport), RUNNING);
}

#[test]
fn a_guest_reads_and_writes_a_disk() {
    let (device, image) = disk(&[7; 4096]);
    let mut guest = Guest::new(&[256]);
    let _transport = guest.start(device);
    guest.push(0, &disk_request(0, 2, Part::In(512)));
    guest.kick(0);
    assert_eq!(guest.wait_used(0).data, [&[7; 512][..], &[0]].concat());
    guest.push(0, &disk_request(1, 3, Part::Out(vec![9; 512])));
    guest.kick(0);
    assert_eq!(guest.wait_used(0).data, [0]);
    let mut written = [0; 512];
    image.read_exact_at(&mut written, 3 * 512).unwrap();
    assert_eq!(written, [9; 512]);
}

#[test]
fn a_guest_sends_and_receives_frames() {
    let (device, far) = hostile::net();
    far.set_nonblocking(false).unwrap();
    let mut guest = Guest::new(&[256, 256]);
    let _transport = guest.start(device);
    let frame = [vec![0; 12], vec![5; 60]].concat();
    guest.push(1, &[Part::Out(frame.clone())]);
    guest.kick(1);
    let mut sent = [0; 100];
    let len = far.recv(&mut sent).unwrap();
    assert_eq!(sent[..len], frame);
    // Merged from buffers of 1500 bytes.
    far.send(&[vec![0; 12], vec![6; 5000]].concat()).unwrap();
    for _ in 0..50 {
        guest.push(0, &[Part::In(1500)]);
    }
    guest.kick(0);
    let lens = [(); 4].map(|()| guest.wait_used(0).len);
    assert_eq!(lens, [1500, 1500, 1500, 512]);
}

#[test]
fn a_guest_gives_pages_back() {
    let mut guest = Guest::new(&[64, 64, 32]);
    let _transport = guest.start(Box::new(BalloonDevice::new(events()).0));
    let page = guest.alloc(3 * 4096).0.div_ceil(4096);
    let address = GuestAddress(page * 4096);
    guest.memory.write_slice(&[1; 4096], address).unwrap();
    guest.push(0, &[Part::Out((page as u32).to_le_bytes().to_vec())]);
    guest.kick(0);
    guest.wait_used(0);
    assert_eq!(guest.memory.read_obj::<u8>(address).unwrap(), 0);
}

#[test]
fn a_reset_during_work_leaves_the_queues_alone_and_the_device_fit() {
    let (device, _image) = disk(&vec![7; 1 << 20]);
    let mut device = Some(device);
    for round in 0..50 {
        let mut guest = Guest::new(&[256]);
        let mut transport = guest.start(device.take().unwrap());
        for _ in 0..80 {
            guest.push(0, &disk_request(0, 0, Part::In(64 << 10)));
        }
        guest.kick(0);
        // Somewhere in the middle: after none, some or all of them.
        for _ in 0..round % 5 {
            guest.wait_used(0);
        }
        reset(&mut transport);
        let before = guest.used_index(0);
        std::thread::yield_now();
        assert_eq!(guest.used_index(0), before);
        device = Some(transport.into_device());
    }
    let mut guest = Guest::new(&[256]);
    let _transport = guest.start(device.unwrap());
    guest.push(0, &disk_request(0, 0, Part::In(512)));
    guest.kick(0);
    assert_eq!(guest.wait_used(0).len, 513);
}
