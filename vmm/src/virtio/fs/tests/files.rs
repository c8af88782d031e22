//! Contents, attributes, and extended attributes.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, CopyFileRangeIn, FallocateIn, ForgetOne, FsOptions, FsyncIn, GetxattrIn, GetxattrOut, InHeader,
    Kstatfs, LseekIn, LseekOut, OpenIn, OpenOut, ReleaseIn, SetattrIn, SetxattrIn, WriteIn, WriteOut,
};
use nix::errno::Errno;
use vm_memory::ByteValued;

use super::driver::ROOT;
use super::*;
use crate::virtio::fs::identity::Version;
use crate::virtio::fs::wire::{self, opcode, setattr};
use crate::virtio::testing::Part;

fn set(driver: &mut Driver, node: u64, change: SetattrIn) -> Result<AttrOut, Errno> {
    driver.object(opcode::SETATTR, node, &[change.as_slice()])
}

#[test]
fn the_driver_learns_what_it_may_do() {
    let driver = Driver::new();
    let options = FsOptions::from_bits_truncate(driver.options.into());
    assert!(options.contains(FsOptions::MAX_PAGES | FsOptions::SUBMOUNTS | FsOptions::HANDLE_KILLPRIV_V2));
    let unwanted = FsOptions::WRITEBACK_CACHE | FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS;
    assert!(!options.intersects(unwanted));
}

#[test]
fn the_configuration_tells_tag_and_queues() {
    let driver = Driver::new();
    let mut config = [0xff; 44];
    driver.device.read_config(0, &mut config);
    assert_eq!(&config[..7], b"rootfs\0");
    assert_eq!(&config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let mut past = [0xff; 4];
    driver.device.read_config(u64::MAX, &mut past);
    assert_eq!(past, [0; 4]);
}

#[test]
fn a_tag_has_to_fit() {
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let server = FileServer::prepare().unwrap().serve_root("/".as_ref()).unwrap();
        assert!(matches!(FsDevice::new(tag, server), Err(FsError::Tag(_))));
    }
}

#[test]
fn a_root_that_is_not_there_is_an_error() {
    let missing = FileServer::prepare().unwrap().serve_root("/nonexistent".as_ref());
    assert!(missing.unwrap_err().to_string().contains("/nonexistent"));
}

#[test]
fn what_is_written_is_read() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 7 + i / 256) as u8).collect();
    let at = WriteIn { fh: opened.fh, offset: 5, ..Default::default() };
    assert_eq!(driver.write(entry.nodeid, at, &data).unwrap(), 1 << 20);
    assert_eq!(&fs::read(driver.host("file")).unwrap()[5..], data);
    assert_eq!(driver.read(entry.nodeid, opened.fh, 5, 1 << 20).unwrap(), data);
    assert_eq!(driver.read(entry.nodeid, opened.fh, (1 << 20) + 3, 100).unwrap(), &data[(1 << 20) - 2..]);
    assert_eq!(driver.read(entry.nodeid, opened.fh, 1 << 30, 100).unwrap(), b"");

    let sync = FsyncIn { fh: opened.fh, fsync_flags: 1, padding: 0 };
    driver.call(opcode::FSYNC, entry.nodeid, &[sync.as_slice()]).unwrap();
    let release = ReleaseIn { fh: opened.fh, ..Default::default() };
    driver.call(opcode::RELEASE, entry.nodeid, &[release.as_slice()]).unwrap();
    assert_eq!(driver.read(entry.nodeid, opened.fh, 0, 1), Err(Errno::EBADF));
    assert_eq!(driver.call(opcode::RELEASE, entry.nodeid, &[release.as_slice()]), Err(Errno::EBADF));
}

#[test]
fn a_file_is_read_without_having_been_opened_and_nothing_else_is_done_so() {
    let mut driver = Driver::new();
    fs::write(driver.host("file"), "contents").unwrap();
    fs::create_dir(driver.host("folder")).unwrap();
    let fifo = std::ffi::CString::new(driver.host("fifo").to_str().unwrap()).unwrap();
    nix::unistd::mkfifo(fifo.as_c_str(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let [file, folder, fifo] =
        [c"file", c"folder", c"fifo"].map(|name| driver.lookup(ROOT, name).unwrap().nodeid);

    assert_eq!(driver.read(file, 0, 3, 100).unwrap(), b"tents");
    fs::remove_file(driver.host("file")).unwrap();
    assert_eq!(driver.read(file, 0, 0, 8).unwrap(), b"contents", "the guest still knows it");
    let sync = FsyncIn { fh: 0, fsync_flags: 0, padding: 0 };
    driver.call(opcode::FSYNC, file, &[sync.as_slice()]).unwrap();

    assert_eq!(driver.write(file, WriteIn::default(), b"x"), Err(Errno::EBADF));
    assert_eq!(driver.call(opcode::RELEASE, file, &[ReleaseIn::default().as_slice()]), Err(Errno::EBADF));
    for other in [folder, fifo] {
        assert_eq!(driver.read(other, 0, 0, 8), Err(Errno::EBADF));
    }
    assert!(driver.read(1 << 40, 0, 0, 8).is_err());
}

#[test]
fn appended_data_goes_to_the_end_but_mapped_data_to_its_place() {
    let mut driver = Driver::new();
    fs::write(driver.host("log"), "one\n").unwrap();
    let node = driver.lookup(ROOT, c"log").unwrap().nodeid;
    let flags = libc::O_RDWR | libc::O_APPEND;
    let fh = driver.open(node, flags).unwrap().fh;
    let write = WriteIn { fh, offset: 0, flags: flags as u32, ..Default::default() };
    driver.write(node, write, b"two\n").unwrap();
    driver.write(node, WriteIn { fuse_flags: wire::WRITE_CACHE, ..write }, b"ONE").unwrap();
    assert_eq!(fs::read(driver.host("log")).unwrap(), b"ONE\ntwo\n");
}

#[test]
fn an_open_file_outlives_its_name() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o600).unwrap();
    driver.call(opcode::UNLINK, ROOT, &[b"file\0"]).unwrap();
    let at = WriteIn { fh: opened.fh, ..Default::default() };
    driver.write(entry.nodeid, at, b"still here").unwrap();
    assert_eq!(driver.read(entry.nodeid, opened.fh, 0, 100).unwrap(), b"still here");
    let attributes: AttrOut = driver.object(opcode::GETATTR, entry.nodeid, &[&[0; 16]]).unwrap();
    assert_eq!((attributes.attr.nlink, attributes.attr.size), (0, 10));
    // An inode that the guest knows can be opened again.
    let again = driver.open(entry.nodeid, libc::O_RDONLY).unwrap().fh;
    assert_eq!(driver.read(entry.nodeid, again, 6, 4).unwrap(), b"here");
}

#[test]
fn the_page_cache_is_kept_only_while_the_file_is_unchanged() {
    let mut driver = Driver::new();
    fs::write(driver.host("file"), "1").unwrap();
    let node = driver.lookup(ROOT, c"file").unwrap().nodeid;
    let keeps =
        |driver: &mut Driver| driver.open(node, libc::O_RDONLY).unwrap().open_flags == wire::FOPEN_KEEP_CACHE;
    let wait = || std::thread::sleep(Duration::from_millis(25));
    wait();
    assert!(!keeps(&mut driver));
    assert!(keeps(&mut driver));
    fs::write(driver.host("file"), "22").unwrap();
    wait();
    assert!(!keeps(&mut driver));
    // Contents that changed with size and modification time the same.
    let modified = fs::metadata(driver.host("file")).unwrap().modified().unwrap();
    assert!(keeps(&mut driver));
    let file = fs::OpenOptions::new().write(true).open(driver.host("file")).unwrap();
    file.write_at(b"33", 0).unwrap();
    file.set_modified(modified).unwrap();
    assert!(!keeps(&mut driver));
}

#[test]
fn a_change_of_just_now_may_not_be_the_last_at_its_time() {
    let file = tempfile::tempfile().unwrap();
    let status = system::attributes(file.as_fd()).unwrap();
    let changed = Duration::new(status.stx_ctime.tv_sec as u64, status.stx_ctime.tv_nsec);
    let changed = SystemTime::UNIX_EPOCH + changed;
    assert!(Version::of(&status, changed).is_none());
    assert!(Version::of(&status, changed + Duration::from_millis(10)).is_none());
    assert!(Version::of(&status, changed + Duration::from_millis(30)).is_some());
    assert!(Version::of(&status, changed - Duration::from_secs(30)).is_none(), "a clock was set back");
}

#[test]
fn what_the_guest_changed_is_synced_once() {
    let mut driver = Driver::new();
    let count = |driver: &Driver| driver.device.server.unsynced.count();
    assert_eq!(count(&driver), 0);
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    let at = WriteIn { fh: opened.fh, ..Default::default() };
    driver.write(entry.nodeid, at, b"x").unwrap();
    assert_eq!(count(&driver), 2, "the file and its directory");
    driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    assert_eq!(count(&driver), 0);
    // Reading changes nothing.
    driver.read(entry.nodeid, opened.fh, 0, 1).unwrap();
    assert_eq!(count(&driver), 0);
    // Also what has no name and no open file any more.
    driver.write(entry.nodeid, at, b"x").unwrap();
    driver.call(opcode::UNLINK, ROOT, &[b"file\0"]).unwrap();
    let release = ReleaseIn { fh: opened.fh, ..Default::default() };
    driver.call(opcode::RELEASE, entry.nodeid, &[release.as_slice()]).unwrap();
    driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    assert_eq!(count(&driver), 0);
    // Nor is what is gone kept until then, which would take space on the disk.
    let forget = |driver: &Driver, nodeid| driver.device.server.forget(ForgetOne { nodeid, nlookup: 1 });
    let (entry, opened) = driver.create(c"gone", 0o644).unwrap();
    let (kept, _) = driver.create(c"kept", 0o644).unwrap();
    driver.call(opcode::UNLINK, ROOT, &[b"gone\0"]).unwrap();
    let release = ReleaseIn { fh: opened.fh, ..Default::default() };
    driver.call(opcode::RELEASE, entry.nodeid, &[release.as_slice()]).unwrap();
    assert_eq!(count(&driver), 3);
    forget(&driver, entry.nodeid);
    forget(&driver, kept.nodeid);
    assert_eq!(count(&driver), 2, "the directory and what is kept");
    driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    // More than are remembered.
    for number in 0..200 {
        driver.create(&std::ffi::CString::new(format!("{number}")).unwrap(), 0o644).unwrap();
    }
    assert_eq!(count(&driver), 65);
    driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    assert_eq!(count(&driver), 0);
}

#[test]
fn attributes_can_be_set() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o666).unwrap();
    let node = entry.nodeid;
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o644, "the umask is applied");

    let change = SetattrIn { valid: setattr::MODE, mode: libc::S_IFREG | 0o4751, ..Default::default() };
    assert_eq!(set(&mut driver, node, change).unwrap().attr.mode & 0o7777, 0o4751);
    let change =
        SetattrIn { valid: setattr::SIZE | setattr::FH, fh: opened.fh, size: 100, ..Default::default() };
    assert_eq!(set(&mut driver, node, change).unwrap().attr.size, 100);
    let change = SetattrIn { valid: setattr::SIZE, size: 7, ..Default::default() };
    assert_eq!(set(&mut driver, node, change).unwrap().attr.size, 7);
    let change = SetattrIn { valid: setattr::SIZE, size: u64::MAX, ..Default::default() };
    assert_eq!(set(&mut driver, node, change).unwrap_err(), Errno::EINVAL);

    let valid = setattr::ATIME | setattr::MTIME;
    let change =
        SetattrIn { valid, atime: 5, atimensec: 6, mtime: -7i64 as u64, mtimensec: 8, ..Default::default() };
    let attr = set(&mut driver, node, change).unwrap().attr;
    assert_eq!((attr.atime, attr.atimensec, attr.mtime as i64, attr.mtimensec), (5, 6, -7, 8));
    let change = SetattrIn { valid: setattr::MTIME | setattr::MTIME_NOW, ..Default::default() };
    let attr = set(&mut driver, node, change).unwrap().attr;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(attr.mtime.abs_diff(now) < 60 && attr.atime == 5);
}

#[test]
fn an_inode_tells_when_it_was_born() {
    let mut driver = Driver::new();
    let (entry, _) = driver.create(c"file", 0o644).unwrap();
    let all: wire::StatxOut = driver.object(opcode::STATX, entry.nodeid, &[&[0; 24]]).unwrap();
    assert_eq!((all.ino, u32::from(all.mode), all.nlink), (entry.attr.ino, entry.attr.mode, 1));
    let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    // Not every file system knows.
    match fs::metadata(driver.host("file")).unwrap().created() {
        Ok(born) => {
            assert_eq!(Duration::new(all.btime.seconds as u64, all.btime.nanoseconds), since_epoch(born))
        }
        Err(_) => assert_eq!(all.mask & libc::STATX_BTIME, 0),
    }
    assert_eq!(driver.call(opcode::STATX, entry.nodeid, &[&[0; 8]]), Err(Errno::EINVAL));
}

#[test]
fn a_reset_waits_for_the_request_that_is_served() {
    let mut driver = Driver::new();
    fs::write(driver.host("file"), "").unwrap();
    let node = driver.lookup(ROOT, c"file").unwrap().nodeid;
    // To open for writing what someone has a lease of blocks until it is given up. The signal of that is not needed.
    let holder = fs::File::open(driver.host("file")).unwrap();
    let lease = |operation, argument: i32| {
        // SAFETY: both operations take integers only.
        unsafe { libc::fcntl(holder.as_raw_fd(), operation, argument) }
    };
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    if lease(libc::F_SETLEASE, libc::F_RDLCK) != 0 {
        return skipped("a file system with leases");
    }
    let open = OpenIn { flags: libc::O_WRONLY as u32, fuse_flags: 0 };
    let len = (size_of::<InHeader>() + size_of::<OpenIn>()) as u32;
    let header = InHeader { len, opcode: opcode::OPEN, unique: 77, nodeid: node, ..Default::default() };
    let queue = usize::from(REQUEST_QUEUE);
    let request = [header.as_slice(), open.as_slice()].concat();
    driver.guest.push(queue, &[Part::Out(request), Part::In(100)]);
    driver.guest.kick(queue);
    // It says what it is to become while somebody waits.
    while lease(libc::F_GETLEASE, 0) != libc::F_UNLCK {
        std::thread::yield_now();
    }
    let given_up = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = &mut driver.device;
        let reset = scope.spawn(|| {
            device.reset();
            given_up.load(Ordering::SeqCst)
        });
        // Time to get it wrong.
        std::thread::sleep(Duration::from_millis(50));
        given_up.store(true, Ordering::SeqCst);
        assert_eq!(lease(libc::F_SETLEASE, libc::F_UNLCK), 0);
        assert!(reset.join().unwrap(), "the rings are not touched any more when a reset is done");
    });
    assert_eq!((driver.device.server.inodes.counts(), driver.device.server.handles.count()), ((1, 1), 0));
}

#[test]
fn privileged_bits_are_cleared_for_ordinary_writers_only() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o755).unwrap();
    let node = entry.nodeid;
    let host = driver.host("file");
    let mode = || fs::metadata(&host).unwrap().mode() & 0o7777;
    let raise = || fs::set_permissions(&host, fs::Permissions::from_mode(0o6755)).unwrap();
    let write = WriteIn { fh: opened.fh, ..Default::default() };

    raise();
    driver.write(node, WriteIn { fuse_flags: wire::WRITE_KILL_SUIDGID, ..write }, b"x").unwrap();
    assert_eq!(mode(), 0o755);
    raise();
    let valid = setattr::SIZE | setattr::KILL_SUIDGID;
    set(&mut driver, node, SetattrIn { valid, size: 3, ..Default::default() }).unwrap();
    assert_eq!(mode(), 0o755);
    raise();
    let open = OpenIn { flags: (libc::O_WRONLY | libc::O_TRUNC) as u32, fuse_flags: wire::OPEN_KILL_SUIDGID };
    let _: OpenOut = driver.object(opcode::OPEN, node, &[open.as_slice()]).unwrap();
    assert_eq!(mode(), 0o755);
    raise();
    let allocate = FallocateIn { fh: opened.fh, length: 10, ..Default::default() };
    driver.call(opcode::FALLOCATE, node, &[allocate.as_slice()]).unwrap();
    assert_eq!(mode(), 0o755);
    let (from, source) = driver.create(c"from", 0o644).unwrap();
    driver.write(from.nodeid, WriteIn { fh: source.fh, ..Default::default() }, b"data").unwrap();
    raise();
    let (fh_in, nodeid_out, fh_out) = (source.fh, node, opened.fh);
    let copy = CopyFileRangeIn { fh_in, nodeid_out, fh_out, len: 4, ..Default::default() };
    driver.call(opcode::COPY_FILE_RANGE, from.nodeid, &[copy.as_slice()]).unwrap();
    assert_eq!(mode(), 0o755);
    if nix::unistd::geteuid().is_root() {
        raise();
        driver.write(node, write, b"y").unwrap();
        assert_eq!(mode(), 0o6755, "the superuser's write keeps them");
    }
}

#[test]
fn space_can_be_allocated_and_holes_be_found() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    let (node, fh) = (entry.nodeid, opened.fh);
    let allocate = FallocateIn { fh, offset: 0, length: 1 << 20, ..Default::default() };
    driver.call(opcode::FALLOCATE, node, &[allocate.as_slice()]).unwrap();
    assert_eq!(fs::metadata(driver.host("file")).unwrap().len(), 1 << 20);
    driver.write(node, WriteIn { fh, offset: 512 << 10, ..Default::default() }, b"data").unwrap();
    let mut seek = |offset, whence| -> Result<u64, Errno> {
        let seek = LseekIn { fh, offset, whence: whence as u32, padding: 0 };
        driver.object::<LseekOut>(opcode::LSEEK, node, &[seek.as_slice()]).map(|found| found.offset)
    };
    assert_eq!(seek((512 << 10) + 1, libc::SEEK_DATA), Ok((512 << 10) + 1));
    // Whether allocated space counts as a hole is for the file system to say, but it starts or ends at the data.
    let hole = seek(512 << 10, libc::SEEK_HOLE).unwrap();
    assert!(((512 << 10) + 4..=1 << 20).contains(&hole), "{hole}");
    assert_eq!(seek(1 << 20, libc::SEEK_DATA), Err(Errno::ENXIO));
    let seek = LseekIn { fh, offset: 0, whence: libc::SEEK_HOLE as u32, padding: 0 };
    let seek = LseekIn { whence: libc::SEEK_SET as u32, ..seek };
    assert_eq!(driver.call(opcode::LSEEK, node, &[seek.as_slice()]), Err(Errno::EINVAL));
}

#[test]
fn ranges_are_copied_on_the_host() {
    let mut driver = Driver::new();
    fs::write(driver.host("from"), "0123456789").unwrap();
    let from = driver.lookup(ROOT, c"from").unwrap().nodeid;
    let fh_in = driver.open(from, libc::O_RDONLY).unwrap().fh;
    let (to, opened) = driver.create(c"to", 0o644).unwrap();
    let copy = CopyFileRangeIn {
        fh_in,
        offset_in: 2,
        nodeid_out: to.nodeid,
        fh_out: opened.fh,
        offset_out: 1,
        len: 5,
        flags: 0,
    };
    let copied: WriteOut = driver.object(opcode::COPY_FILE_RANGE, from, &[copy.as_slice()]).unwrap();
    assert_eq!((copied.size, fs::read(driver.host("to")).unwrap()), (5, b"\x0023456".to_vec()));
}

#[test]
fn the_file_system_has_statistics() {
    let mut driver = Driver::new();
    let statistics: Kstatfs = driver.object(opcode::STATFS, ROOT, &[]).unwrap();
    assert!(statistics.blocks > 0 && statistics.bsize > 0 && statistics.namelen > 0);
    driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
}

#[test]
fn extended_attributes_pass_but_the_hosts_own_do_not() {
    let mut driver = Driver::new();
    let (entry, _) = driver.create(c"file", 0o644).unwrap();
    let node = entry.nodeid;
    let set = SetxattrIn { size: 5, flags: 0 };
    driver.call(opcode::SETXATTR, node, &[set.as_slice(), &[0; 8], b"user.key\0value"]).unwrap();
    let get = |size| GetxattrIn { size, padding: 0 };
    let body = driver.call(opcode::GETXATTR, node, &[get(100).as_slice(), b"user.key\0"]).unwrap();
    assert_eq!(body, b"value");
    let len: GetxattrOut =
        driver.object(opcode::GETXATTR, node, &[get(0).as_slice(), b"user.key\0"]).unwrap();
    assert_eq!(len.size, 5);
    let short = driver.call(opcode::GETXATTR, node, &[get(2).as_slice(), b"user.key\0"]);
    assert_eq!(short, Err(Errno::ERANGE));
    // Far more than an attribute can have, and than the reply has room for: nothing of that size is allocated.
    let body = driver.call(opcode::GETXATTR, node, &[get(u32::MAX).as_slice(), b"user.key\0"]).unwrap();
    assert_eq!(body, b"value");

    assert_eq!(driver.call(opcode::LISTXATTR, node, &[get(100).as_slice()]).unwrap(), b"user.key\0");
    let len: GetxattrOut = driver.object(opcode::LISTXATTR, node, &[get(0).as_slice()]).unwrap();
    assert_eq!(len.size, 9);
    assert_eq!(driver.call(opcode::LISTXATTR, node, &[get(3).as_slice()]), Err(Errno::ERANGE));

    let unwanted = [&b"trusted.overlay.opaque\0"[..], b"security.selinux\0", b"system.nfs4_acl\0", b"\0"];
    for name in unwanted {
        let value: &[u8] = b"value";
        let refused = driver.call(opcode::SETXATTR, node, &[set.as_slice(), &[0; 8], name, value]);
        assert_eq!(refused, Err(Errno::EOPNOTSUPP));
        let refused = driver.call(opcode::GETXATTR, node, &[get(100).as_slice(), name]);
        assert_eq!(refused, Err(Errno::EOPNOTSUPP));
        assert_eq!(driver.call(opcode::REMOVEXATTR, node, &[name]), Err(Errno::EOPNOTSUPP));
    }
    driver.call(opcode::REMOVEXATTR, node, &[b"user.key\0"]).unwrap();
    let gone = driver.call(opcode::GETXATTR, node, &[get(100).as_slice(), b"user.key\0"]);
    assert_eq!(gone, Err(Errno::ENODATA));
    let wrong = SetxattrIn { size: 4, flags: 0 };
    let refused = driver.call(opcode::SETXATTR, node, &[wrong.as_slice(), &[0; 8], b"user.key\0value"]);
    assert_eq!(refused, Err(Errno::EINVAL));
}
