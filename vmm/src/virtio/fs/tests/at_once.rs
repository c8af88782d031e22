//! Requests that are served on the thread of the vCPU which sends them.

use std::fs;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsyncIn, InHeader, OutHeader, ReadIn, WriteIn};
use vm_memory::ByteValued;

use super::driver::{ROOT, object};
use super::*;
use crate::confine::Duty;
use crate::virtio::fs::message::MAX_READ;
use crate::virtio::fs::pace::Patience;
use crate::virtio::fs::wire::opcode;
use crate::virtio::testing::{Guest, Part};

const QUEUE: usize = REQUEST_QUEUE as usize;

/// Waits until the device's thread has nothing to do: it looks for a next request after each answer.
fn settle(driver: &Driver) {
    worker::enter(&driver.device.events, &driver.device.server).unwrap();
}

/// Offers a request and does not tell the device.
fn push(driver: &mut Driver, unique: u64, opcode: u32, nodeid: u64, arguments: &[u8], room: u32) {
    settle(driver);
    let len = (size_of::<InHeader>() + arguments.len()) as u32;
    let header = InHeader { len, opcode, unique, nodeid, ..Default::default() };
    let request = [header.as_slice(), arguments].concat();
    driver.guest.push(QUEUE, &[Part::Out(request), Part::In(size_of::<OutHeader>() as u32 + room)]);
}

/// The number and the error of an answer that is there.
fn answer(driver: &mut Driver) -> Option<(u64, i32)> {
    let used = driver.guest.pop_used(QUEUE)?;
    let header: OutHeader = object(&used.data);
    Some((header.unique, header.error))
}

/// An open file of a driver, with this in it.
fn open_file(driver: &mut Driver, contents: &[u8]) -> (u64, u64) {
    fs::write(driver.host("file"), contents).unwrap();
    let node = driver.lookup(ROOT, c"file").unwrap().nodeid;
    (node, driver.open(node, libc::O_RDWR).unwrap().fh)
}

/// Takes the interrupts of what was answered until now.
fn hear(driver: &Driver) {
    settle(driver);
    while driver.guest.interrupted() {}
}

#[test]
fn what_is_quick_is_answered_before_the_kick_is_over_and_without_an_interrupt() {
    let mut driver = Driver::new();
    hear(&driver);
    for unique in [100, 102] {
        push(&mut driver, unique, opcode::LOOKUP, ROOT, b"missing\0", 128);
    }
    driver.ring(Duty::VcpuWithFiles);
    assert_eq!(answer(&mut driver), Some((100, 0)));
    assert_eq!(answer(&mut driver), Some((102, 0)));
    assert!(!driver.guest.interrupted());
    // The device's own thread still tells of what it has answered.
    push(&mut driver, 104, opcode::LOOKUP, ROOT, b"missing\0", 128);
    driver.guest.kick(QUEUE);
    driver.guest.wait_interrupt();
    assert_eq!(answer(&mut driver), Some((104, 0)));
}

#[test]
fn what_waits_for_a_disk_is_put_off_and_holds_nothing_up() {
    let mut driver = Driver::new();
    let (node, fh) = open_file(&mut driver, b"contents");
    let sync = FsyncIn { fh, ..Default::default() };
    let large = ReadIn { fh, size: 1 << 20, ..Default::default() };
    let waiting = WriteIn { fh, size: 4, flags: libc::O_DSYNC as u32, ..Default::default() };
    let write = [waiting.as_slice(), b"data"].concat();
    hear(&driver);
    push(&mut driver, 100, opcode::FSYNC, node, sync.as_slice(), 0);
    push(&mut driver, 102, opcode::READ, node, large.as_slice(), 1 << 20);
    push(&mut driver, 104, opcode::WRITE, node, &write, 128);
    push(&mut driver, 106, opcode::LOOKUP, ROOT, b"file\0", 128);
    driver.ring(Duty::VcpuWithFiles);
    let mut answers: Vec<_> = (0..4).map(|_| driver.guest.wait_used(QUEUE)).collect();
    answers.sort_by_key(|used| object::<OutHeader>(&used.data).unique);
    let told: Vec<_> = answers.iter().map(|used| object::<OutHeader>(&used.data)).collect();
    assert_eq!(
        told.iter().map(|told| (told.unique, told.error)).collect::<Vec<_>>(),
        [(100, 0), (102, 0), (104, 0), (106, 0)]
    );
    assert!(answers[1].data.ends_with(b"ents"));
    assert_eq!(fs::read(driver.host("file")).unwrap(), b"dataents");
    hear(&driver);
    push(&mut driver, 108, opcode::FSYNC, node, sync.as_slice(), 0);
    driver.ring(Duty::VcpuWithFiles);
    driver.guest.wait_interrupt();
    assert_eq!(answer(&mut driver), Some((108, 0)));
}

#[test]
fn after_what_took_long_the_devices_thread_answers_for_a_while() {
    let patience = Patience { long: Duration::ZERO, rest: Duration::from_secs(3600) };
    let mut driver = Driver::with(|server| server.patience = patience);
    push(&mut driver, 100, opcode::LOOKUP, ROOT, b"missing\0", 128);
    driver.ring(Duty::VcpuWithFiles);
    assert_eq!(answer(&mut driver), Some((100, 0)));
    hear(&driver);
    push(&mut driver, 102, opcode::LOOKUP, ROOT, b"missing\0", 128);
    driver.ring(Duty::VcpuWithFiles);
    driver.guest.wait_interrupt();
    assert_eq!(answer(&mut driver), Some((102, 0)));
}

#[test]
fn a_mebibyte_is_moved_at_once_wherever_in_its_pages_it_begins() {
    let mut driver = Driver::new();
    let contents: Vec<u8> = (0..MAX_READ).map(|number| (number / 4096) as u8).collect();
    let (node, fh) = open_file(&mut driver, &contents);
    let read = ReadIn { fh, size: MAX_READ, ..Default::default() };
    let write = WriteIn { fh, size: 1 << 20, offset: 4096, ..Default::default() };
    hear(&driver);
    push(&mut driver, 100, opcode::READ, node, read.as_slice(), MAX_READ);
    driver.ring(Duty::VcpuWithFiles);
    let used = driver.guest.pop_used(QUEUE).expect("it is read before the kick is over");
    assert!(used.data[size_of::<OutHeader>()..] == contents, "a short answer is the end of the file");
    push(&mut driver, 102, opcode::WRITE, node, &[write.as_slice(), &vec![7; 1 << 20]].concat(), 128);
    driver.ring(Duty::VcpuWithFiles);
    assert_eq!(answer(&mut driver), Some((102, 0)));
    let changed = fs::read(driver.host("file")).unwrap();
    assert!(changed[..4096] == contents[..4096] && changed[4096..].iter().all(|byte| *byte == 7));
}

#[test]
fn what_is_read_is_whole_whether_or_not_it_is_cached() {
    let mut driver = Driver::new();
    let contents: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let (node, fh) = open_file(&mut driver, &contents);
    let file = fs::File::open(driver.host("file")).unwrap();
    file.sync_all().unwrap();
    for offset in [0, 8192, contents.len() - 100, contents.len()] {
        // Of a part that is read only the end may be cached.
        for cached in [0, offset as i64 + 4096] {
            // SAFETY: the call takes integers only.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), cached, 0, libc::POSIX_FADV_DONTNEED) };
            for _ in 0..2 {
                let read = driver.read(node, fh, offset as u64, 65536).unwrap();
                let end = contents.len().min(offset + 65536);
                assert!(read == contents[offset..end], "{offset} {}", read.len());
            }
        }
    }
}

#[test]
fn a_thread_that_may_not_serve_leaves_it_to_the_devices() {
    let mut driver = Driver::new();
    push(&mut driver, 100, opcode::LOOKUP, ROOT, b"missing\0", 128);
    driver.ring(Duty::Vcpu);
    driver.guest.wait_used(QUEUE);
}

#[test]
fn a_driver_that_did_not_agree_has_no_bell() {
    let driver = Driver::new();
    assert!(driver.device.bell(BELL - 4).is_none() && driver.device.bell(BELL + 4).is_none());
    let server = FileServer::prepare().unwrap().serve_root(&driver.host("")).unwrap();
    let mut device = FsDevice::new("rootfs", server).unwrap();
    assert!(device.bell(BELL).is_none(), "it is not active");
    let guest = Guest::new(&QUEUE_SIZES);
    let features = device.features() & !(1 << FEATURE_AT_ONCE);
    guest.activate(&mut device, features);
    assert!(device.bell(BELL).is_none());
    device.reset();
}

#[test]
fn nothing_is_served_after_a_reset_though_somebody_still_rings() {
    let mut driver = Driver::new();
    let bell = driver.device.bell(BELL).unwrap();
    driver.device.reset();
    push(&mut driver, 100, opcode::LOOKUP, ROOT, b"missing\0", 128);
    thread::spawn(move || bell.ring()).join().unwrap();
    assert_eq!(answer(&mut driver), None);
}

#[test]
fn many_vcpus_ring_and_each_request_is_answered_once() {
    const VCPUS: u64 = 4;
    const ROUNDS: u64 = 200;
    let mut driver = Driver::new();
    for round in 0..ROUNDS {
        for vcpu in 0..VCPUS {
            push(&mut driver, 1000 + round * VCPUS + vcpu, opcode::LOOKUP, ROOT, b"missing\0", 128);
        }
        let bell = driver.device.bell(BELL).unwrap();
        thread::scope(|scope| (0..VCPUS).for_each(|_| drop(scope.spawn(|| bell.ring()))));
        let mut uniques: Vec<_> = (0..VCPUS).map(|_| answer(&mut driver).unwrap().0).collect();
        uniques.sort_unstable();
        assert!(uniques.into_iter().eq((0..VCPUS).map(|vcpu| 1000 + round * VCPUS + vcpu)));
        assert_eq!(answer(&mut driver), None);
    }
}

#[test]
fn of_many_vcpus_one_makes_a_name() {
    const VCPUS: u64 = 4;
    let mut driver = Driver::new();
    for round in 0..100 {
        let flags = (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR) as u32;
        let create = CreateIn { flags, mode: 0o600, ..Default::default() };
        let name = format!("file-{round}\0");
        let arguments = [create.as_slice(), name.as_bytes()].concat();
        for vcpu in 0..VCPUS {
            push(&mut driver, 1000 + vcpu, opcode::CREATE, ROOT, &arguments, 256);
        }
        let bell = driver.device.bell(BELL).unwrap();
        thread::scope(|scope| (0..VCPUS).for_each(|_| drop(scope.spawn(|| bell.ring()))));
        let mut errors: Vec<_> = (0..VCPUS).map(|_| answer(&mut driver).unwrap().1).collect();
        errors.sort_unstable();
        assert_eq!(errors, [-libc::EEXIST, -libc::EEXIST, -libc::EEXIST, 0]);
    }
}

#[test]
fn a_queue_that_makes_no_sense_ends_the_device_however_it_is_kicked() {
    let mut driver = Driver::new();
    driver.guest.set_available(QUEUE, 5000);
    driver.ring(Duty::VcpuWithFiles);
    driver.guest.wait_needs_reset();
    driver.ring(Duty::VcpuWithFiles);
}
