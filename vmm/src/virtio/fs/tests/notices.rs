//! Validity until a notice: what a driver that lends memory for notices may believe, and when it hears that it may not
//! any more.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{AttrOut, EntryOut, ForgetIn, GetattrIn, MkdirIn, RenameIn};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::driver::ROOT;
use super::*;
use crate::virtio::fs::notices::{LEN, Subject};
use crate::virtio::fs::watches::{Validity, Watches};
use crate::virtio::fs::wire::opcode;
use crate::virtio::testing::{Descriptor, WRITE};

const QUEUE: usize = NOTICES_QUEUE as usize;
/// How long a notice may take before a test counts it as lost.
const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: (u64, u32) = (0, 50_000_000);

/// A driver with the memory that it lent.
struct Listening {
    driver: Driver,
    memory: GuestAddress,
}

impl Listening {
    fn new() -> Listening {
        Self::with(|_| ())
    }

    fn with(prepare: impl FnOnce(&mut FileServer)) -> Listening {
        let mut driver = Driver::with(prepare);
        let memory = driver.guest.alloc(LEN as u32);
        lend(&mut driver, Descriptor::new(memory.0, LEN as u32, WRITE, 0));
        let mut listening = Listening { driver, memory };
        // The device takes it when it comes to it.
        listening.until(|listening| listening.attributes(ROOT).0 != SHORT);
        listening
    }

    /// One whose server hears of nothing by itself: the thread that listens may wake up late. Also a file, of which the guest
    /// knows the attributes.
    fn deaf() -> (Listening, (u64, u32), u64) {
        let mut guest = Listening::new();
        guest.driver.device._listening = EventLoop::spawn("deaf").unwrap();
        let (valid, id) = guest.file("file");
        (guest, valid, id)
    }

    fn until(&mut self, mut is_so: impl FnMut(&mut Listening) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it did not come");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether what came with this validity may still be believed, as the guest's kernel sees it.
    fn is_valid(&self, valid: (u64, u32), subjects: &[Subject<'_>]) -> bool {
        assert_ne!(valid, SHORT, "it is valid for a time");
        let version = valid.0 & !(1 << 63);
        subjects.iter().chain(&[Subject::Everything]).all(|subject| {
            let word: u64 =
                self.driver.guest.memory.read_obj(GuestAddress(self.memory.0 + 8 * subject.word())).unwrap();
            word <= version
        })
    }

    fn until_invalid(&mut self, valid: (u64, u32), subjects: &[Subject<'_>]) {
        self.until(|listening| !listening.is_valid(valid, subjects));
    }

    fn attributes(&mut self, id: u64) -> ((u64, u32), AttrOut) {
        let reply: AttrOut =
            self.driver.object(opcode::GETATTR, id, &[GetattrIn::default().as_slice()]).unwrap();
        ((reply.attr_valid, reply.attr_valid_nsec), reply)
    }

    fn lookup(&mut self, parent: u64, name: &CStr) -> ((u64, u32), EntryOut) {
        let entry = self.driver.lookup(parent, name).unwrap();
        ((entry.entry_valid, entry.entry_valid_nsec), entry)
    }

    /// A file of the host that the guest knows, and the validity of its attributes.
    fn file(&mut self, name: &str) -> ((u64, u32), u64) {
        fs::write(self.driver.host(name), "contents").unwrap();
        let name = CString::new(name).unwrap();
        let id = self.lookup(ROOT, &name).1.nodeid;
        (self.attributes(id).0, id)
    }
}

fn lend(driver: &mut Driver, descriptor: Descriptor) {
    driver.guest.write_descriptor(QUEUE, 0, descriptor);
    driver.guest.offer(QUEUE, 0);
    driver.guest.kick(QUEUE);
}

/// Whether the folder of temporary files is on a file system where contents can be watched.
fn is_plain() -> bool {
    let kind = nix::sys::statfs::statfs(&std::env::temp_dir()).unwrap().filesystem_type();
    kind != nix::sys::statfs::OVERLAYFS_SUPER_MAGIC
}

#[test]
fn who_sees_a_change_has_heard_of_all_before_it() {
    if !is_plain() {
        return;
    }
    let (mut guest, valid, id) = Listening::deaf();
    let subjects = [Subject::Access(id), Subject::Contents(id)];
    fs::write(guest.driver.host("file"), "CONTENTS").unwrap();
    assert!(guest.is_valid(valid, &subjects), "there is nobody to tell");
    fs::write(guest.driver.host("changed"), "").unwrap();
    assert_ne!(guest.lookup(ROOT, c"changed").1.nodeid, 0);
    assert!(!guest.is_valid(valid, &subjects));
}

#[test]
fn to_read_what_was_not_opened_is_no_change() {
    if !is_plain() {
        return;
    }
    let mut guest = Listening::new();
    let (valid, id) = guest.file("file");
    let subjects = [Subject::Access(id), Subject::Contents(id)];
    for _ in 0..3 {
        assert_eq!(guest.driver.read(id, 0, 0, 100).unwrap(), b"contents");
    }
    guest.lookup(ROOT, c"file");
    assert!(guest.is_valid(valid, &subjects));
    fs::write(guest.driver.host("file"), "CONTENTS").unwrap();
    guest.until_invalid(valid, &subjects);
    assert_eq!(guest.driver.read(id, 0, 0, 100).unwrap(), b"CONTENTS");
}

#[test]
fn who_changes_much_at_once_is_heard_of_altogether() {
    if !is_plain() {
        return;
    }
    let (mut guest, valid, id) = Listening::deaf();
    let subjects = [Subject::Access(id), Subject::Contents(id)];
    // More events than are read before an answer.
    for number in 0..4000 {
        let name = guest.driver.host(&format!("a-name-as-long-as-they-mostly-are-{number}"));
        fs::write(&name, "").unwrap();
        fs::remove_file(&name).unwrap();
    }
    fs::write(guest.driver.host("file"), "CONTENTS").unwrap();
    guest.lookup(ROOT, c"file");
    assert!(!guest.is_valid(valid, &subjects));
}

#[test]
fn nobody_is_woken_up_for_what_the_guest_changes_itself() {
    let (guest, ..) = Listening::deaf();
    let server = &guest.driver.device.server;
    let make = |name| fs::write(guest.driver.host(name), "").unwrap();
    let change = server.begin_change();
    make("first");
    // Another one begins and ends meanwhile.
    drop(server.begin_change());
    make("second");
    assert!(!server.watches.wake());
    server.hear_changes();
    drop(change);
    assert!(!server.watches.wake(), "all was heard");

    let change = server.begin_change();
    make("third");
    drop(change);
    assert!(server.watches.wake(), "what is left unheard has to be heard by somebody");
    server.hear_changes();
    assert!(!server.watches.wake());
    make("the-hosts");
    assert!(server.watches.wake());
}

#[test]
fn who_waits_for_a_lease_holds_up_nobody() {
    if !is_plain() {
        return;
    }
    let mut guest = Listening::new();
    let (_, id) = guest.file("file");
    let server = guest.driver.device.server.clone();
    let opened = server.watches.open_to_read(id, &server.notices, |flags| {
        if flags.contains(OFlag::O_NONBLOCK) {
            return Err(Errno::EAGAIN);
        }
        // It would wait for this very thread.
        server.hear_changes();
        Ok(File::open(guest.driver.host("file")).unwrap().into())
    });
    assert!(opened.is_ok());
}

#[test]
fn names_are_valid_until_the_host_changes_them() {
    let mut guest = Listening::new();
    fs::write(guest.driver.host("file"), "").unwrap();
    type Change = fn(&Path);
    let names: [(&CStr, &str, Change); 3] = [
        (c"none", "none", |path| fs::write(path, "").unwrap()),
        (c"file", "file", |path| fs::remove_file(path).unwrap()),
        (c"new", "new", |path| fs::rename(path.with_file_name("none"), path).unwrap()),
    ];
    for (name, path, change) in names {
        let valid = guest.lookup(ROOT, name).0;
        let subjects = [Subject::Names(ROOT), Subject::Name(ROOT, name.to_bytes())];
        assert!(guest.is_valid(valid, &subjects), "{name:?}");
        let listing = guest.attributes(ROOT).0;
        change(&guest.driver.host(path));
        guest.until_invalid(valid, &subjects);
        guest.until_invalid(listing, &[Subject::Contents(ROOT)]);
        assert!(guest.is_valid(listing, &[Subject::Access(ROOT), Subject::Names(ROOT)]), "{name:?}");
    }
}

#[test]
fn a_directorys_mode_is_valid_until_the_host_changes_it() {
    let mut guest = Listening::new();
    fs::create_dir(guest.driver.host("inner")).unwrap();
    let entry = guest.lookup(ROOT, c"inner").1;
    let valid = (entry.attr_valid, entry.attr_valid_nsec);
    assert!(guest.is_valid(valid, &[Subject::Access(entry.nodeid)]));
    fs::set_permissions(guest.driver.host("inner"), Permissions::from_mode(0o711)).unwrap();
    guest.until_invalid(valid, &[Subject::Access(entry.nodeid)]);
    // That is the notice before.
    guest.until_invalid(valid, &[Subject::Contents(entry.nodeid)]);
    let (valid, attributes) = guest.attributes(entry.nodeid);
    assert_eq!(attributes.attr.mode & 0o777, 0o711);
    assert!(guest.is_valid(valid, &[Subject::Access(entry.nodeid), Subject::Contents(entry.nodeid)]));
}

#[test]
fn a_files_attributes_are_valid_until_anybody_changes_it_by_any_name() {
    if !is_plain() {
        return skipped("temporary files beside an overlay");
    }
    let mut guest = Listening::new();
    let elsewhere = tempfile::tempdir_in(guest.driver.host("..")).unwrap();
    let other = elsewhere.path().join("other");
    let (valid, id) = guest.file("file");
    fs::hard_link(guest.driver.host("file"), &other).unwrap();
    guest.until_invalid(valid, &[Subject::Contents(id)]);
    let changes: [&dyn Fn(); 5] = [
        &|| fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap(),
        &|| OpenOptions::new().append(true).open(&other).unwrap().write_all(b"more").unwrap(),
        &|| nix::unistd::truncate(&other, 3).unwrap(),
        &|| fs::hard_link(&other, other.with_extension("third")).unwrap(),
        &|| fs::remove_file(&other).unwrap(),
    ];
    for change in changes {
        let valid = guest.attributes(id).0;
        let subjects = [Subject::Access(id), Subject::Contents(id)];
        assert!(guest.is_valid(valid, &subjects));
        change();
        guest.until_invalid(valid, &subjects);
    }
    assert_eq!(guest.attributes(id).1.attr.size, 3);
}

#[test]
fn a_file_that_somebody_may_write_to_is_valid_for_a_short_time() {
    if !is_plain() {
        return skipped("temporary files beside an overlay");
    }
    let mut guest = Listening::new();
    let (valid, id) = guest.file("file");
    assert!(guest.is_valid(valid, &[Subject::Contents(id)]));
    let path = guest.driver.host("file");
    let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    guest.until_invalid(valid, &[Subject::Contents(id)]);
    assert_eq!(guest.attributes(id).0, SHORT, "it is open");
    // SAFETY: a new mapping where there is none touches no other memory.
    let mapping = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 8, protection, libc::MAP_SHARED, writer.as_raw_fd(), 0)
    };
    drop(writer);
    assert_eq!(guest.attributes(id).0, SHORT, "it is mapped");
    // SAFETY: it is the mapping that was made above, and nothing refers to it.
    unsafe { libc::munmap(mapping, 8) };
    assert_ne!(guest.attributes(id).0, SHORT);
}

#[test]
fn what_the_guest_does_itself_ends_no_answer_to_it() {
    if !is_plain() {
        return skipped("temporary files beside an overlay");
    }
    let mut guest = Listening::new();
    let (entry, _) = guest.driver.create(c"own", 0o644).unwrap();
    let make = MkdirIn { mode: 0o755, umask: 0 };
    let folder: EntryOut = guest.driver.object(opcode::MKDIR, ROOT, &[make.as_slice(), b"folder\0"]).unwrap();
    let (opened, id) = guest.file("file");
    guest.driver.open(id, libc::O_RDONLY).unwrap();
    // What has been heard by the time that another change is, has been heard.
    let last = guest.lookup(ROOT, c"last").0;
    fs::write(guest.driver.host("last"), "").unwrap();
    guest.until_invalid(last, &[Subject::Name(ROOT, b"last")]);
    for (entry, name) in [(entry, &b"own"[..]), (folder, b"folder")] {
        let valid = (entry.entry_valid, entry.entry_valid_nsec);
        assert!(guest.is_valid(valid, &[Subject::Name(ROOT, name), Subject::Names(ROOT)]));
    }
    assert!(
        guest.is_valid(opened, &[Subject::Access(id), Subject::Contents(id)]),
        "it was opened to be read"
    );
    // Somebody else may have written to it.
    drop(File::open(guest.driver.host("file")).unwrap());
    guest.until_invalid(opened, &[Subject::Contents(id)]);
}

#[test]
fn a_name_that_the_guest_moves_is_believed_no_more() {
    let mut guest = Listening::new();
    fs::create_dir(guest.driver.host("to")).unwrap();
    fs::write(guest.driver.host("file"), "").unwrap();
    let valid = guest.lookup(ROOT, c"file").0;
    let to = guest.lookup(ROOT, c"to").1.nodeid;
    let rename = RenameIn { newdir: to };
    guest.driver.call(opcode::RENAME, ROOT, &[rename.as_slice(), b"file\0", b"file\0"]).unwrap();
    // The guest's kernel has moved what it knew, with its validity.
    assert!(!guest.is_valid(valid, &[Subject::Name(to, b"file")]));
}

#[test]
fn the_directory_that_was_watched_longest_gives_its_watch_up() {
    let mut guest = Listening::with(|server| server.watches = Watches::new(&server.descriptors, 2));
    let mut known = Vec::new();
    for name in [c"a", c"b", c"c"] {
        fs::create_dir(guest.driver.host(name.to_str().unwrap())).unwrap();
        let entry = guest.lookup(ROOT, name).1;
        known.push((entry.nodeid, (entry.attr_valid, entry.attr_valid_nsec)));
    }
    let everything = |id| [Subject::Names(id), Subject::Access(id), Subject::Contents(id)];
    let [(first, valid), .., (last, still)] = known[..] else { unreachable!("three directories") };
    assert!(everything(first).iter().all(|subject| !guest.is_valid(valid, &[*subject])));
    assert!(guest.is_valid(still, &everything(last)));
    // Files take nobody's place.
    assert_eq!(guest.file("file").0, SHORT);
}

#[test]
fn what_the_guest_forgets_is_not_watched() {
    let mut guest = Listening::new();
    fs::create_dir(guest.driver.host("inner")).unwrap();
    let inner = guest.lookup(ROOT, c"inner").1.nodeid;
    assert_eq!(guest.driver.device.server.watches.count(), 2);
    guest.driver.forget(opcode::FORGET, inner, ForgetIn { nlookup: 1 }.as_slice());
    guest.until(|guest| guest.driver.device.server.watches.count() == 1);
}

#[test]
fn memory_that_cannot_be_lent_is_not() {
    let len = LEN as u32;
    let wrong = [
        Descriptor::new(0x100_0000, len, 0, 0),
        Descriptor::new(0x100_0000, len - 1, WRITE, 0),
        Descriptor::new(0x100_0004, len, WRITE, 0),
        Descriptor::new(crate::virtio::testing::MEMORY - 8, len, WRITE, 0),
        Descriptor::new(u64::MAX - 7, len, WRITE, 0),
    ];
    let mut driver = Driver::new();
    for descriptor in wrong {
        lend(&mut driver, descriptor);
        let entry = driver.lookup(ROOT, c"none").unwrap();
        assert_eq!((entry.entry_valid, entry.entry_valid_nsec), SHORT);
    }
    assert_eq!(driver.device.server.notices.validity(), None);
    assert_eq!(driver.device.server.watches.count(), 0, "nothing is watched for who hears nothing");
}

#[test]
fn a_device_that_was_reset_leaves_the_memory_alone() {
    let mut guest = Listening::new();
    guest.driver.device.reset();
    assert_eq!(guest.driver.device.server.notices.validity(), None);
    assert_eq!(guest.driver.device.server.watches.count(), 0);
}

#[test]
fn a_driver_that_did_not_agree_lends_nothing() {
    let root = tempfile::tempdir().unwrap();
    let server = FileServer::prepare().unwrap().serve_root(root.path()).unwrap();
    let mut device = FsDevice::new("rootfs", server).unwrap();
    let mut guest = crate::virtio::testing::Guest::new(&QUEUE_SIZES);
    let features = device.features() & !(1 << FEATURE_NOTICES);
    guest.activate(&mut device, features);
    let memory = guest.alloc(LEN as u32);
    guest.write_descriptor(QUEUE, 0, Descriptor::new(memory.0, LEN as u32, WRITE, 0));
    guest.offer(QUEUE, 0);
    guest.kick(QUEUE);
    device.reset();
    assert_eq!(device.server.notices.validity(), None);
}

#[test]
fn the_validity_without_notices_is_that_of_the_constant() {
    assert_eq!((Validity::SHORT.seconds, Validity::SHORT.nanoseconds), SHORT);
}
