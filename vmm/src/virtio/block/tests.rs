//! Requests over real virtqueues, against image files.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::virtio::testing::{Descriptor, Guest, INDIRECT, MEMORY, NEXT, Part, WRITE};

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const SECTORS: u64 = 256;

struct Fixture {
    guest: Guest,
    device: BlockDevice,
    image: File,
}

impl Fixture {
    fn new(read_only: bool) -> Fixture {
        Self::with_features(read_only, |features| features)
    }

    fn with_features(read_only: bool, choose: impl Fn(u64) -> u64) -> Fixture {
        let image = tempfile::tempfile().unwrap();
        // A few bytes more than whole sectors, and different ones everywhere.
        let bytes: Vec<u8> = (0..SECTORS * SECTOR + 100).map(|i| (i * 7 + i / SECTOR) as u8).collect();
        image.write_all_at(&bytes, 0).unwrap();
        let mut device = BlockDevice::new(image.try_clone().unwrap(), read_only).unwrap();
        let guest = Guest::new(&QUEUE_SIZES);
        let features = choose(device.features());
        guest.activate(&mut device, features);
        Fixture { guest, device, image }
    }

    /// Sends a request; returns status, what was read, and the length of both.
    fn request(&mut self, kind: u32, sector: u64, parts: &[Part]) -> (u8, Vec<u8>) {
        let mut all = vec![Part::Out(header(kind, sector))];
        all.extend_from_slice(parts);
        all.push(Part::In(1));
        self.guest.push(0, &all);
        self.guest.kick(0);
        // In this order: a driver that has seen the buffer already need not be interrupted for it.
        self.guest.wait_interrupt();
        let mut data = self.guest.wait_used(0).data;
        let status = data.pop().unwrap();
        (status, data)
    }

    fn bytes(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
        bytes
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.device.reset();
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn sectors_are_read_and_written() {
    let mut disk = Fixture::new(false);
    let (status, read) = disk.request(VIRTIO_BLK_T_IN, 3, &[Part::In(512), Part::In(100), Part::In(924)]);
    assert_eq!((status, read), (OK, disk.bytes(3, 1536)));
    let data: Vec<u8> = (0..2048).map(|i| (i * 3) as u8).collect();
    let parts = [Part::Out(data[..700].to_vec()), Part::Out(data[700..].to_vec())];
    let before = (disk.bytes(9, 512), disk.bytes(14, 512));
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 10, &parts), (OK, vec![]));
    assert_eq!(disk.bytes(10, 2048), data);
    assert_eq!((disk.bytes(9, 512), disk.bytes(14, 512)), before);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    let last = disk.bytes(SECTORS - 1, 512);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, SECTORS - 1, &[Part::In(512)]), (OK, last));
}

#[test]
fn what_lies_beyond_the_disk_is_out_of_reach() {
    let mut disk = Fixture::new(false);
    let size = disk.image.metadata().unwrap().len();
    for (sector, sectors) in
        [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX / 512, 1), (u64::MAX - 1, 2)]
    {
        let len = sectors as usize * 512;
        assert_eq!(disk.request(VIRTIO_BLK_T_IN, sector, &[Part::In(len as u32)]).0, ERROR, "{sector}");
        assert_eq!(disk.request(VIRTIO_BLK_T_OUT, sector, &[Part::Out(vec![1; len])]).0, ERROR, "{sector}");
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let ranges = [range(0, 1, 0), range(sector, sectors, 0)].concat();
            let first = disk.bytes(0, 512);
            assert_eq!(disk.request(kind, 0, &[Part::Out(ranges)]).0, ERROR);
            assert_eq!(disk.bytes(0, 512), first, "nothing is done by halves");
        }
    }
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Part::In(511)]).0, ERROR, "no whole sector");
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[Part::Out(vec![0; 513])]).0, ERROR, "no whole sector");
    assert_eq!(disk.image.metadata().unwrap().len(), size);
}

#[test]
fn a_read_only_disk_cannot_be_changed() {
    let mut disk = Fixture::new(true);
    assert_ne!(disk.device.features() & (1 << VIRTIO_BLK_F_RO), 0);
    assert_eq!(disk.device.features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
    let before = disk.bytes(0, (SECTORS * SECTOR) as usize);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[Part::Out(vec![1; 512])]).0, ERROR);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(disk.request(kind, 0, &[Part::Out(range(0, 8, 0))]).0, ERROR);
    }
    assert_eq!(disk.bytes(0, before.len()), before);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Part::In(512)]).0, OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut disk = Fixture::new(false);
    for (flags, first) in [(0, 16), (1, 64)] {
        let kept = (disk.bytes(first - 1, 512), disk.bytes(first + 24, 512));
        let ranges = [range(first, 8, flags), range(first + 16, 8, flags)].concat();
        assert_eq!(disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[Part::Out(ranges)]), (OK, vec![]));
        assert_eq!(disk.bytes(first, 4096), [0; 4096]);
        assert_eq!(disk.bytes(first + 16, 4096), [0; 4096]);
        assert_ne!(disk.bytes(first + 8, 4096), [0; 4096]);
        assert_eq!((disk.bytes(first - 1, 512), disk.bytes(first + 24, 512)), kept);
    }
    let (blocks, len) = (|disk: &Fixture| disk.image.metadata().unwrap().blocks(), SECTORS * SECTOR + 100);
    let before = blocks(&disk);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[Part::Out(range(128, 64, 0))]).0, OK);
    assert!(blocks(&disk) < before);
    assert_eq!(disk.bytes(128, 4096), [0; 4096]);
    assert_eq!(disk.image.metadata().unwrap().len(), len);
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[Part::Out(range(0, 0, 0))]).0, OK);

    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[Part::Out(range(0, 1, 1))]).0, UNSUPPORTED);
    assert_eq!(disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[Part::Out(range(0, 1, 2))]).0, UNSUPPORTED);
    for bad in [vec![], vec![0; 15], vec![0; 17], vec![0; 16 * (MAX_RANGES as usize + 1)]] {
        assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[Part::Out(bad)]).0, ERROR);
    }
}

#[test]
fn a_corrupt_queue_stops_the_device_and_a_reset_revives_it() {
    let mut disk = Fixture::new(false);
    disk.guest.set_available(0, QUEUE_SIZES[0] + 1);
    disk.guest.kick(0);
    disk.guest.wait_needs_reset();
    disk.device.reset();
    disk.guest = Guest::new(&QUEUE_SIZES);
    disk.guest.activate(&mut disk.device, 0);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Part::In(512)]).0, OK);
    assert!(!disk.guest.interrupt.is_reset_needed());
}

#[test]
fn a_device_that_cannot_hear_its_driver_says_so() {
    let guest = Guest::new(&QUEUE_SIZES);
    let mut device = BlockDevice::new(tempfile::tempfile().unwrap(), false).unwrap();
    device.activate(guest.deaf_activation(0)).unwrap();
    assert!(guest.interrupt.is_reset_needed());
}

#[test]
fn a_disk_has_a_name() {
    let mut disk = Fixture::new(false);
    let (status, name) = disk.request(VIRTIO_BLK_T_GET_ID, 0, &[Part::In(20)]);
    assert_eq!(status, OK);
    assert_eq!(name, Disk::new(disk.image.try_clone().unwrap(), true).unwrap().name(), "the same each time");
    assert_ne!(name, Disk::new(tempfile::tempfile().unwrap(), true).unwrap().name());
}

#[test]
fn a_driver_without_flush_gets_its_writes_through() {
    let mut disk = Fixture::with_features(false, |features| features & !(1 << VIRTIO_BLK_F_FLUSH));
    let flushes = |disk: &Fixture| disk.device.disk.flushes.load(Ordering::SeqCst);
    for (request, expected) in [
        ((VIRTIO_BLK_T_OUT, Part::Out(vec![7; 512])), 1),
        ((VIRTIO_BLK_T_WRITE_ZEROES, Part::Out(range(8, 8, 0))), 2),
        ((VIRTIO_BLK_T_IN, Part::In(512)), 2),
    ] {
        assert_eq!(disk.request(request.0, 0, &[request.1]).0, OK);
        assert_eq!(flushes(&disk), expected);
    }
    assert_eq!(disk.bytes(0, 512), [7; 512]);

    let mut disk = Fixture::new(false);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[Part::Out(vec![7; 512])]).0, OK);
    assert_eq!(flushes(&disk), 0, "this one flushes when it wants");
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(flushes(&disk), 1);
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let disk = Fixture::new(false);
    let mut config = [0xff; 64];
    disk.device.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[36..40], MAX_RANGE_SECTORS.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    let mut middle = [0xff; 2];
    disk.device.read_config(6, &mut middle);
    assert_eq!(middle, [0; 2]);
}

#[test]
fn not_everything_is_a_disk() {
    let refused = |path| BlockDevice::new(File::open(path).unwrap(), true);
    assert!(matches!(refused("/dev/null"), Err(BlockError::Kind)));
    assert!(matches!(refused("/"), Err(BlockError::Kind)));
    let empty = BlockDevice::new(tempfile::tempfile().unwrap(), false).unwrap();
    let mut capacity = [0xff; 8];
    empty.read_config(0, &mut capacity);
    assert_eq!(capacity, [0; 8]);
}

#[test]
fn an_image_that_became_shorter_is_an_error_of_the_disk() {
    let mut disk = Fixture::new(false);
    disk.image.set_len(600).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Part::In(512)]).0, OK);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[Part::In(512)]).0, ERROR);
}

#[test]
fn requests_without_sense_harm_nothing() {
    let mut disk = Fixture::new(false);
    assert_eq!(disk.request(77, 0, &[]).0, UNSUPPORTED);
    let at = 0x80_0000;
    let chains: [(&[Descriptor], u32); 8] = [
        // No status, a status that is read, no header, half a header.
        (&[Descriptor::new(at, 16, 0, 0)], 0),
        (&[Descriptor::new(at, 16, NEXT, 1), Descriptor::new(at + 16, 1, 0, 0)], 0),
        (&[Descriptor::new(at, 1, WRITE, 0)], 1),
        (&[Descriptor::new(at, 15, NEXT, 1), Descriptor::new(at + 64, 1, WRITE, 0)], 1),
        // Status before the header, a loop, outside of memory, a table of tables.
        (&[Descriptor::new(at, 1, WRITE | NEXT, 1), Descriptor::new(at, 16, 0, 0)], 0),
        (&[Descriptor::new(at, 16, NEXT, 1), Descriptor::new(at, 1, NEXT, 0)], 0),
        (&[Descriptor::new(MEMORY - 8, 16, NEXT, 1), Descriptor::new(at, 1, WRITE, 0)], 0),
        (&[Descriptor::new(at, 0, INDIRECT, 0)], 0),
    ];
    for (chain, len) in chains {
        disk.device.reset();
        let mut guest = Guest::new(&QUEUE_SIZES);
        guest.activate(&mut disk.device, 0);
        guest.push_raw(0, chain);
        guest.kick(0);
        assert_eq!(guest.wait_used(0).len, len, "{chain:?}");
    }
}

/// What a disk should hold, and a request to it.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u32, bool),
    Read(u64, u32),
}

fn change() -> impl Strategy<Value = Change> {
    let sector = 0..SECTORS + 4;
    prop_oneof![
        (sector.clone(), 1..6usize, any::<u8>())
            .prop_map(|(sector, count, byte)| Change::Write(sector, vec![byte; count * 512])),
        (sector.clone(), 0..20u32, any::<bool>())
            .prop_map(|(at, count, unmap)| Change::Zero(at, count, unmap)),
        (sector, 1..6u32).prop_map(|(sector, count)| Change::Read(sector, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_disk_holds_what_was_written(changes in prop::collection::vec(change(), 1..40), cut in 1..511usize) {
        let mut disk = Fixture::new(false);
        let mut model = disk.bytes(0, (SECTORS * SECTOR) as usize);
        for change in changes {
            let (sector, len) = match &change {
                Change::Write(sector, data) => (*sector, data.len()),
                Change::Zero(sector, count, _) => (*sector, *count as usize * 512),
                Change::Read(sector, count) => (*sector, *count as usize * 512),
            };
            let start = (sector * SECTOR) as usize;
            let place = model.get_mut(start..start + len);
            let expected = if place.is_some() { OK } else { ERROR };
            let (status, data) = match change {
                Change::Write(_, data) => {
                    let parts = [Part::Out(data[..cut].to_vec()), Part::Out(data[cut..].to_vec())];
                    place.into_iter().for_each(|place| place.copy_from_slice(&data));
                    disk.request(VIRTIO_BLK_T_OUT, sector, &parts)
                }
                Change::Zero(_, count, unmap) => {
                    place.into_iter().for_each(|place| place.fill(0));
                    let range = range(sector, count, unmap.into());
                    disk.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[Part::Out(range)])
                }
                Change::Read(..) => disk.request(VIRTIO_BLK_T_IN, sector, &[Part::In(len as u32)]),
            };
            prop_assert_eq!(status, expected);
            if status == OK && !data.is_empty() {
                prop_assert_eq!(&data[..], &model[start..start + len]);
            }
        }
        prop_assert_eq!(disk.bytes(0, model.len()), model);
    }

    #[test]
    fn no_request_harms_the_disk(
        requests in prop::collection::vec(
            (0..16u32, any::<u64>(), prop::collection::vec(any::<u8>(), 0..1200), 0..1200u32),
            1..40,
        ),
    ) {
        let mut disk = Fixture::new(true);
        let before = disk.bytes(0, (SECTORS * SECTOR) as usize);
        for (kind, sector, data, room) in requests {
            let sector = if sector % 2 == 0 { sector % 300 } else { sector };
            let (status, _) = disk.request(kind, sector, &[Part::Out(data), Part::In(room)]);
            prop_assert!(status <= UNSUPPORTED);
        }
        prop_assert_eq!(disk.bytes(0, before.len()), before);
    }
}
