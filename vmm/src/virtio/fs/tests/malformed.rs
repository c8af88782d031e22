//! What no driver would send.

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn, OutHeader, ReadIn, WriteIn};
use nix::errno::Errno;
use proptest::prelude::*;
use vm_memory::ByteValued;

use super::driver::{ROOT, object};
use super::*;
use crate::virtio::fs::wire::opcode;
use crate::virtio::testing::{Descriptor, Guest, INDIRECT, MEMORY, NEXT, Part, WRITE};

const QUEUE: usize = REQUEST_QUEUE as usize;

/// Sends buffers as they are; returns the reply's header, if there is one, and how long the reply is.
fn send(driver: &mut Driver, parts: &[Part]) -> (Option<OutHeader>, u32) {
    driver.guest.push(QUEUE, parts);
    driver.guest.kick(QUEUE);
    let used = driver.guest.wait_used(QUEUE);
    ((used.data.len() >= size_of::<OutHeader>()).then(|| object(&used.data)), used.len)
}

fn alive(driver: &mut Driver) {
    driver.call(opcode::GETATTR, ROOT, &[&[0; 16]]).unwrap();
}

#[test]
fn headers_that_are_short_or_lie_are_refused() {
    let mut driver = Driver::new();
    let header = InHeader { len: 40, opcode: opcode::STATFS, unique: 9, nodeid: ROOT, ..Default::default() };
    let cases = [
        header.as_slice()[..39].to_vec(),
        InHeader { len: 39, ..header }.as_slice().to_vec(),
        InHeader { len: 41, ..header }.as_slice().to_vec(),
        InHeader { len: u32::MAX, ..header }.as_slice().to_vec(),
        InHeader { len: 0, ..header }.as_slice().to_vec(),
        vec![],
    ];
    for bytes in cases {
        let (reply, len) = send(&mut driver, &[Part::Out(bytes), Part::In(200)]);
        assert_eq!((reply.unwrap().error, len), (-libc::EINVAL, 16));
    }
    // A header in pieces is a header.
    let pieces = header.as_slice().chunks(7).map(|piece| Part::Out(piece.to_vec()));
    let parts: Vec<_> = pieces.chain([Part::In(3), Part::In(90), Part::In(90)]).collect();
    let (reply, len) = send(&mut driver, &parts);
    assert_eq!((reply.unwrap().unique, len), (9, 96));
}

#[test]
fn a_broken_queue_makes_the_device_ask_for_a_reset() {
    let mut driver = Driver::new();
    driver.guest.set_available(QUEUE, 5000);
    driver.guest.interrupted();
    driver.guest.kick(QUEUE);
    driver.guest.wait_interrupt();
    assert!(driver.guest.interrupt.is_reset_needed());
    driver.device.reset();
    driver.guest = Guest::new(&QUEUE_SIZES);
    let features = driver.device.features();
    driver.guest.activate(&mut driver.device, features);
    alive(&mut driver);
}

#[test]
fn replies_without_room_are_left_out() {
    let mut driver = Driver::new();
    let header = InHeader { len: 40, opcode: opcode::STATFS, unique: 9, nodeid: ROOT, ..Default::default() };
    let request = Part::Out(header.as_slice().to_vec());
    assert_eq!(send(&mut driver, std::slice::from_ref(&request)).1, 0);
    assert_eq!(send(&mut driver, &[request.clone(), Part::In(15)]).1, 0);
    let (reply, len) = send(&mut driver, &[request, Part::In(16 + 79)]);
    assert_eq!((reply.unwrap().error, len), (-libc::EINVAL, 16));
    alive(&mut driver);
}

#[test]
fn chains_without_sense_get_no_answer() {
    let mut driver = Driver::new();
    driver.device.reset();
    let mut guest = Guest::new(&QUEUE_SIZES);
    guest.activate(&mut driver.device, 0);
    let at = 0x80_0000;
    let chains: [&[Descriptor]; 7] = [
        // Room before the request.
        &[Descriptor::new(at, 80, WRITE | NEXT, 1), Descriptor::new(at, 40, 0, 0)],
        // A loop.
        &[Descriptor::new(at, 40, NEXT, 1), Descriptor::new(at, 40, NEXT, 0)],
        // Outside of memory.
        &[Descriptor::new(MEMORY - 20, 40, 0, 0)],
        &[Descriptor::new(u64::MAX - 10, 40, 0, 0)],
        &[Descriptor::new(at, u32::MAX, 0, 0)],
        // A table that is none.
        &[Descriptor::new(at, 17, INDIRECT, 0)],
        &[Descriptor::new(MEMORY, 32, INDIRECT, 0)],
    ];
    for chain in chains {
        guest.push_raw(QUEUE, chain);
        guest.kick(QUEUE);
        assert_eq!(guest.wait_used(QUEUE).len, 0, "{chain:?}");
    }
}

#[test]
fn requests_for_too_much_are_bounded() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    let node = entry.nodeid;
    let write = WriteIn { fh: opened.fh, size: 100, ..Default::default() };
    assert_eq!(driver.call(opcode::WRITE, node, &[write.as_slice(), b"less"]), Err(Errno::EINVAL));
    let read = ReadIn { fh: opened.fh, size: u32::MAX, ..Default::default() };
    driver.write(node, write, b"data").unwrap();
    assert_eq!(driver.call(opcode::READ, node, &[read.as_slice()]).unwrap(), b"data");
    let far = ReadIn { offset: u64::MAX, ..read };
    assert_eq!(driver.call(opcode::READ, node, &[far.as_slice()]), Err(Errno::EINVAL));
    let text = vec![b'a'; 100 << 10];
    assert_eq!(driver.call(opcode::LOOKUP, ROOT, &[&text]), Err(Errno::E2BIG));
    // The file of another inode.
    assert_eq!(driver.read(ROOT, opened.fh, 0, 1), Err(Errno::EBADF));
}

#[test]
fn other_protocols_and_operations_are_refused() {
    let mut driver = Driver::new();
    for opcode in [0, 7, 19, 25, 31, 32, 33, 34, 37, 40, 48, 49, 53, 4096, u32::MAX] {
        assert_eq!(driver.call(opcode, ROOT, &[&[0; 64]]), Err(Errno::ENOSYS), "{opcode}");
    }
    assert_eq!(driver.call(opcode::IOCTL, ROOT, &[&[0; 64]]), Err(Errno::ENOTTY));
    let old = InitIn { major: 6, ..Default::default() };
    assert_eq!(driver.call(opcode::INIT, 0, &[old.as_slice()]), Err(Errno::EPROTO));
    let new = InitIn { major: 8, ..Default::default() };
    assert_eq!(driver.call(opcode::INIT, 0, &[new.as_slice()]).unwrap()[..4], [7, 0, 0, 0]);
    alive(&mut driver);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_request_harms_the_server(
        requests in prop::collection::vec(
            (0..60u32, 0..4u64, prop::collection::vec(any::<u8>(), 0..120), prop::collection::vec(0..200u32, 0..3)),
            1..60,
        ),
    ) {
        let mut driver = Driver::new();
        driver.create(c"file", 0o644).unwrap();
        for (opcode, nodeid, body, rooms) in requests {
            // What this could do to the tests is not what is tested: sync(2) of the whole host takes its time.
            if opcode == opcode::SYNCFS {
                continue;
            }
            let len = (size_of::<InHeader>() + body.len()) as u32;
            let (uid, gid) = driver.user;
            let header = InHeader { len, opcode, unique: 1, nodeid, uid, gid, ..Default::default() };
            let mut parts = vec![Part::Out(header.as_slice().to_vec()), Part::Out(body)];
            parts.extend(rooms.into_iter().map(Part::In));
            send(&mut driver, &parts);
        }
        alive(&mut driver);
    }

    #[test]
    fn no_bytes_harm_the_server(
        chains in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..40),
        room in 0..300u32,
    ) {
        let mut driver = Driver::new();
        for bytes in chains {
            let (_, len) = send(&mut driver, &[Part::Out(bytes), Part::In(room)]);
            prop_assert!(len <= room);
        }
        alive(&mut driver);
    }
}
