//! Names, what is created under them, and directories.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, BatchForgetIn, CreateIn, Dirent, EntryOut, ForgetIn, ForgetOne, LinkIn, MkdirIn, MknodIn,
    OpenOut, ReadIn, Rename2In, RenameIn, SetattrIn, WriteIn,
};
use nix::errno::Errno;
use vm_memory::ByteValued;

use super::driver::{ROOT, object};
use super::*;
use crate::virtio::fs::wire::{opcode, setattr};

fn make_directory(driver: &mut Driver, parent: u64, name: &str, mode: u32) -> Result<EntryOut, Errno> {
    let how = MkdirIn { mode, umask: 0o022 };
    driver.object(opcode::MKDIR, parent, &[how.as_slice(), name.as_bytes(), b"\0"])
}

fn make_node(driver: &mut Driver, name: &str, mode: u32) -> Result<EntryOut, Errno> {
    let how = MknodIn { mode, rdev: 0x103, umask: 0, padding: 0 };
    driver.object(opcode::MKNOD, ROOT, &[how.as_slice(), name.as_bytes(), b"\0"])
}

#[test]
fn a_name_leads_to_the_same_inode_each_time() {
    let mut driver = Driver::new();
    fs::write(driver.host("a"), "x").unwrap();
    fs::hard_link(driver.host("a"), driver.host("b")).unwrap();
    let first = driver.lookup(ROOT, c"a").unwrap();
    assert_eq!(first.attr.ino, fs::metadata(driver.host("a")).unwrap().ino());
    assert_eq!(first.attr.nlink, 2);
    assert_eq!(driver.lookup(ROOT, c"b").unwrap().nodeid, first.nodeid);
    assert!(Duration::from_nanos(first.attr_valid_nsec.into()) <= Duration::from_millis(100));
}

#[test]
fn that_nothing_is_there_is_told_with_a_validity() {
    let mut driver = Driver::new();
    let nothing = driver.lookup(ROOT, c"nothing").unwrap();
    assert_eq!((nothing.nodeid, nothing.entry_valid), (0, 0));
    assert!(nothing.entry_valid_nsec > 0);
    fs::write(driver.host("nothing"), "").unwrap();
    assert_ne!(driver.lookup(ROOT, c"nothing").unwrap().nodeid, 0);
    assert_eq!(driver.lookup(4711, c"nothing").unwrap_err(), Errno::ESTALE);
}

#[test]
fn forgotten_inodes_are_gone_and_the_root_stays() {
    let mut driver = Driver::new();
    fs::write(driver.host("a"), "x").unwrap();
    let node = driver.lookup(ROOT, c"a").unwrap().nodeid;
    driver.lookup(ROOT, c"a").unwrap();
    driver.forget(opcode::FORGET, node, ForgetIn { nlookup: 1 }.as_slice());
    driver.open(node, libc::O_RDONLY).unwrap();
    let batch = BatchForgetIn { count: 3, dummy: 0 };
    let ones = [(node, 1), (ROOT, 100), (999, 1)].map(|(nodeid, nlookup)| ForgetOne { nodeid, nlookup });
    let mut body = batch.as_slice().to_vec();
    ones.iter().for_each(|one| body.extend_from_slice(one.as_slice()));
    driver.forget(opcode::BATCH_FORGET, 0, &body);
    assert_eq!(driver.open(node, libc::O_RDONLY).unwrap_err(), Errno::ESTALE);
    assert_ne!(driver.lookup(ROOT, c"a").unwrap().nodeid, node, "numbers are not used again");
}

#[test]
fn symbolic_links_are_told_and_never_followed() {
    let mut driver = Driver::new();
    let link: EntryOut = driver.object(opcode::SYMLINK, ROOT, &[b"link\0", b"/etc/passwd\0"]).unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(driver.call(opcode::READLINK, link.nodeid, &[]).unwrap(), b"/etc/passwd");
    assert_eq!(fs::read_link(driver.host("link")).unwrap().to_str(), Some("/etc/passwd"));
    assert_eq!(driver.open(link.nodeid, libc::O_RDONLY).unwrap_err(), Errno::EPERM);
    assert_eq!(driver.lookup(link.nodeid, c"x").unwrap_err(), Errno::ENOTDIR);
    // Times and owners are the link's own.
    let valid = setattr::MTIME | setattr::UID;
    let change = SetattrIn { valid, mtime: 77, uid: driver.user.0, ..Default::default() };
    let changed: AttrOut = driver.object(opcode::SETATTR, link.nodeid, &[change.as_slice()]).unwrap();
    assert_eq!(changed.attr.mtime, 77);
    assert_eq!(fs::symlink_metadata(driver.host("link")).unwrap().mtime(), 77);
    // Nor is a link followed where a file is to be created.
    symlink(driver.host("target"), driver.host("dangling")).unwrap();
    assert_eq!(driver.create(c"dangling", 0o644).unwrap_err(), Errno::EPERM);
    assert!(!driver.host("target").exists());
}

#[test]
fn special_files_are_made_but_never_opened() {
    let mut driver = Driver::new();
    let fifo = make_node(&mut driver, "fifo", libc::S_IFIFO | 0o600).unwrap();
    assert!(fs::symlink_metadata(driver.host("fifo")).unwrap().file_type().is_fifo());
    // Would block for ever.
    assert_eq!(driver.open(fifo.nodeid, libc::O_RDONLY).unwrap_err(), Errno::EPERM);
    let change = SetattrIn { valid: setattr::SIZE, size: 0, ..Default::default() };
    let refused = driver.call(opcode::SETATTR, fifo.nodeid, &[change.as_slice()]);
    assert_eq!(refused, Err(Errno::EPERM));
    driver.call(opcode::SYNCFS, fifo.nodeid, &[&[0; 8]]).unwrap();
    // The guest did not see it coming, and creates.
    let create =
        CreateIn { flags: (libc::O_CREAT | libc::O_RDONLY) as u32, mode: 0o644, umask: 0, fuse_flags: 0 };
    let refused = driver.call(opcode::CREATE, ROOT, &[create.as_slice(), b"fifo\0"]);
    assert_eq!(refused, Err(Errno::EPERM));

    make_node(&mut driver, "socket", libc::S_IFSOCK | 0o600).unwrap();
    make_node(&mut driver, "plain", libc::S_IFREG | 0o600).unwrap();
    if nix::unistd::geteuid().is_root() {
        let null = make_node(&mut driver, "null", libc::S_IFCHR | 0o666).unwrap();
        assert_eq!(null.attr.rdev, 0x103);
        assert_eq!(driver.open(null.nodeid, libc::O_RDWR).unwrap_err(), Errno::EPERM);
    }
}

/// What the monitor leaves to the thread that starts the device.
fn confine(securebits: i32) -> bool {
    use caps::CapSet::{Effective, Inheritable, Permitted};
    use caps::Capability::*;
    if !nix::unistd::geteuid().is_root() {
        return false;
    }
    let kept = [
        CAP_CHOWN,
        CAP_DAC_OVERRIDE,
        CAP_DAC_READ_SEARCH,
        CAP_FOWNER,
        CAP_FSETID,
        CAP_MKNOD,
        CAP_SETFCAP,
        CAP_SETGID,
        CAP_SETUID,
    ];
    // SAFETY: the call takes integers only, and changes nothing but this thread's securebits.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, securebits, 0, 0, 0) }, 0);
    caps::clear(None, Inheritable).unwrap();
    for set in [Effective, Permitted] {
        caps::set(None, set, &kept.into_iter().collect()).unwrap();
    }
    true
}

#[test]
fn a_thread_that_would_lose_its_capabilities_is_an_error() {
    if !confine(0) {
        return skipped("root");
    }
    let server = FileServer::prepare().unwrap().serve_root("/".as_ref()).unwrap();
    let device = FsDevice::new("rootfs", server);
    assert!(matches!(device, Err(FsError::Thread(error)) if error.raw_os_error() == Some(libc::EPERM)));
}

#[test]
fn what_is_created_belongs_to_who_asked() {
    if !confine(libc::SECBIT_NO_SETUID_FIXUP | libc::SECBIT_NO_SETUID_FIXUP_LOCKED) {
        return skipped("root");
    }
    let mut driver = Driver::new();
    // Only a capability or a group that the host knows nothing of lets this user write to the directory.
    fs::set_permissions(driver.host(""), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    driver.user = (1234, 5678);
    driver.create(c"file", 0o666).unwrap();
    make_directory(&mut driver, ROOT, "directory", 0o777).unwrap();
    make_node(&mut driver, "fifo", libc::S_IFIFO | 0o600).unwrap();
    let _: EntryOut = driver.object(opcode::SYMLINK, ROOT, &[b"link\0", b"x\0"]).unwrap();
    make_node(&mut driver, "null", libc::S_IFCHR | 0o600).unwrap();
    for name in ["file", "directory", "fifo", "link", "null"] {
        let metadata = fs::symlink_metadata(driver.host(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678), "{name}");
    }
    assert_eq!(fs::metadata(driver.host("directory")).unwrap().mode() & 0o777, 0o755);
    driver.user = (0, 0);
    driver.create(c"mine", 0o666).unwrap();
    assert_eq!(fs::metadata(driver.host("mine")).unwrap().uid(), 0);
    driver.user = (u32::MAX, u32::MAX);
    assert_eq!(driver.create(c"nobody's", 0o666).unwrap_err(), Errno::EPERM);
}

#[test]
fn a_file_that_exists_is_opened_unless_it_must_not() {
    let mut driver = Driver::new();
    fs::write(driver.host("file"), "old").unwrap();
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    assert_eq!(driver.read(entry.nodeid, opened.fh, 0, 10).unwrap(), b"old");
    let flags = (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR) as u32;
    let create = CreateIn { flags, mode: 0o644, umask: 0, fuse_flags: 0 };
    let refused = driver.call(opcode::CREATE, ROOT, &[create.as_slice(), b"file\0"]);
    assert_eq!(refused, Err(Errno::EEXIST));
}

#[test]
fn a_file_without_a_name_can_get_one() {
    let mut driver = Driver::new();
    let flags = (libc::O_TMPFILE | libc::O_RDWR) as u32;
    let create = CreateIn { flags, mode: 0o640, umask: 0, fuse_flags: 0 };
    let body = driver.call(opcode::TMPFILE, ROOT, &[create.as_slice(), b"#1\0"]).unwrap();
    let entry: EntryOut = object(&body);
    let opened: OpenOut = object(&body[size_of::<EntryOut>()..]);
    driver.write(entry.nodeid, WriteIn { fh: opened.fh, ..Default::default() }, b"content").unwrap();
    assert_eq!(fs::read_dir(driver.host("")).unwrap().count(), 0);
    let link = LinkIn { oldnodeid: entry.nodeid };
    let linked: EntryOut = driver.object(opcode::LINK, ROOT, &[link.as_slice(), b"named\0"]).unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (entry.nodeid, 1));
    assert_eq!(fs::read(driver.host("named")).unwrap(), b"content");
}

#[test]
fn names_are_linked_moved_and_removed() {
    let mut driver = Driver::new();
    let directory = make_directory(&mut driver, ROOT, "directory", 0o755).unwrap().nodeid;
    let (file, _) = driver.create(c"a", 0o644).unwrap();
    let link = LinkIn { oldnodeid: file.nodeid };
    let linked: EntryOut = driver.object(opcode::LINK, directory, &[link.as_slice(), b"b\0"]).unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));

    let rename = RenameIn { newdir: directory };
    driver.call(opcode::RENAME, ROOT, &[rename.as_slice(), b"a\0c\0"]).unwrap();
    assert!(driver.host("directory/c").exists() && !driver.host("a").exists());
    assert_eq!(driver.lookup(directory, c"c").unwrap().nodeid, file.nodeid);

    fs::write(driver.host("new"), "new").unwrap();
    let exchange = Rename2In { newdir: directory, flags: libc::RENAME_EXCHANGE, padding: 0 };
    driver.call(opcode::RENAME2, ROOT, &[exchange.as_slice(), b"new\0c\0"]).unwrap();
    assert_eq!(fs::read(driver.host("directory/c")).unwrap(), b"new");
    let careful = Rename2In { flags: libc::RENAME_NOREPLACE, ..exchange };
    let refused = driver.call(opcode::RENAME2, ROOT, &[careful.as_slice(), b"new\0c\0"]);
    assert_eq!(refused, Err(Errno::EEXIST));
    let unknown = Rename2In { flags: 1 << 20, ..exchange };
    assert_eq!(driver.call(opcode::RENAME2, ROOT, &[unknown.as_slice(), b"new\0c\0"]), Err(Errno::EINVAL));

    assert_eq!(driver.call(opcode::RMDIR, ROOT, &[b"directory\0"]), Err(Errno::ENOTEMPTY));
    assert_eq!(driver.call(opcode::UNLINK, ROOT, &[b"directory\0"]), Err(Errno::EISDIR));
    for name in [b"b\0", b"c\0"] {
        driver.call(opcode::UNLINK, directory, &[name]).unwrap();
    }
    driver.call(opcode::RMDIR, ROOT, &[b"directory\0"]).unwrap();
    assert_eq!(driver.call(opcode::RMDIR, ROOT, &[b"directory\0"]), Err(Errno::ENOENT));
}

#[test]
fn a_symbolic_link_with_another_name_stays_the_same() {
    let mut driver = Driver::new();
    let link: EntryOut = driver.object(opcode::SYMLINK, ROOT, &[b"s\0", b"target\0"]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let linked: EntryOut = driver.object(opcode::LINK, ROOT, &[&link.nodeid.to_ne_bytes(), b"t\0"]).unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (link.nodeid, 2));
    assert_eq!(driver.lookup(ROOT, c"s").unwrap().nodeid, link.nodeid);
}

#[test]
fn names_that_lead_elsewhere_are_refused_everywhere() {
    let mut driver = Driver::new();
    fs::write(driver.host("file"), "").unwrap();
    let (mkdir, create) = (MkdirIn::default(), CreateIn { flags: libc::O_RDWR as u32, ..Default::default() });
    for name in [&b"..\0"[..], b".\0", b"\0", b"a/b\0", b"/\0", b"../x\0", b"unterminated"] {
        let refused = [
            (opcode::LOOKUP, vec![name]),
            (opcode::UNLINK, vec![name]),
            (opcode::RMDIR, vec![name]),
            (opcode::MKDIR, vec![mkdir.as_slice(), name]),
            (opcode::CREATE, vec![create.as_slice(), name]),
            (opcode::SYMLINK, vec![name, b"target\0"]),
            (opcode::RENAME, vec![&[1, 0, 0, 0, 0, 0, 0, 0], b"file\0", name]),
            (opcode::RENAME, vec![&[1, 0, 0, 0, 0, 0, 0, 0], name, b"file\0"]),
            (opcode::LINK, vec![&[1, 0, 0, 0, 0, 0, 0, 0], name]),
        ];
        for (opcode, arguments) in refused {
            assert_eq!(driver.call(opcode, ROOT, &arguments), Err(Errno::EINVAL), "{opcode} {name:?}");
        }
    }
}

/// Reads a directory to its end, with this much room at a time.
fn read_directory(driver: &mut Driver, opcode: u32, room: u32) -> HashMap<String, (u64, Option<EntryOut>)> {
    let opened: OpenOut = driver.object(opcode::OPENDIR, ROOT, &[&[0; 8]]).unwrap();
    let (mut found, mut offset) = (HashMap::new(), 0);
    loop {
        let read = ReadIn { fh: opened.fh, offset, size: room, ..Default::default() };
        let body = driver.call_with_room(opcode, ROOT, &[read.as_slice()], room).unwrap();
        let mut rest = &body[..];
        if rest.is_empty() {
            return found;
        }
        while !rest.is_empty() {
            let entry = (opcode == opcode::READDIRPLUS).then(|| object::<EntryOut>(rest));
            rest = &rest[entry.map_or(0, |_| size_of::<EntryOut>())..];
            let dirent: Dirent = object(rest);
            let name = &rest[size_of::<Dirent>()..][..dirent.namelen as usize];
            let name = String::from_utf8(name.to_vec()).unwrap();
            assert!(found.insert(name, (dirent.ino, entry)).is_none(), "an entry came twice");
            offset = dirent.off;
            rest = &rest[(size_of::<Dirent>() + dirent.namelen as usize).next_multiple_of(8)..];
        }
    }
}

#[test]
fn directories_are_read_completely() {
    let mut driver = Driver::new();
    let names: Vec<String> = (0..300).map(|i| format!("{i}-{}", "n".repeat(i % 250))).collect();
    names.iter().for_each(|name| fs::write(driver.host(name), "").unwrap());
    for (opcode, room) in [
        (opcode::READDIR, 4096),
        (opcode::READDIR, 300),
        (opcode::READDIRPLUS, 4096),
        (opcode::READDIRPLUS, 420),
        (opcode::READDIRPLUS, 1 << 20),
    ] {
        let found = read_directory(&mut driver, opcode, room);
        assert_eq!(found.len(), names.len() + 2, "with . and ..");
        for name in &names {
            let (number, entry) = &found[name];
            assert_eq!(*number, fs::metadata(driver.host(name)).unwrap().ino());
            assert!(entry.is_none_or(|entry| entry.attr.ino == *number && entry.nodeid > ROOT));
        }
        assert!(found["."].1.is_none_or(|entry| entry.nodeid == 0));
    }
}

#[test]
fn a_reply_without_room_for_one_entry_is_an_error_and_not_the_end() {
    let mut driver = Driver::new();
    let opened: OpenOut = driver.object(opcode::OPENDIR, ROOT, &[&[0; 8]]).unwrap();
    let read = ReadIn { fh: opened.fh, size: 16, ..Default::default() };
    assert_eq!(driver.call(opcode::READDIR, ROOT, &[read.as_slice()]), Err(Errno::EINVAL));
    let (file, _) = driver.create(c"file", 0o644).unwrap();
    assert_eq!(driver.call(opcode::OPENDIR, file.nodeid, &[&[0; 8]]), Err(Errno::ENOTDIR));
}

#[test]
fn a_file_system_mounted_in_the_tree_is_a_submount() {
    // The server must see the mount that this makes, so both live in a mount namespace of their own.
    if !nix::unistd::geteuid().is_root() || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err()
    {
        return skipped("root");
    }
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let mut driver = Driver::new();
    fs::create_dir_all(driver.host("volume/inner")).unwrap();
    fs::create_dir(driver.host("again")).unwrap();
    let plain = driver.lookup(ROOT, c"volume").unwrap();
    assert_eq!(plain.attr.flags, 0);
    let (source, target) = (driver.host("volume"), driver.host("again"));
    mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let bound = driver.lookup(ROOT, c"again").unwrap();
    assert_eq!((bound.attr.ino, bound.attr.flags), (plain.attr.ino, 1));
    assert_ne!(bound.nodeid, plain.nodeid, "the same directory at two places has two parents");
    let inner = driver.lookup(bound.nodeid, c"inner").unwrap();
    assert_eq!(inner.attr.flags, 0);
    umount2(&target, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_mount_that_is_read_only_is_not_changed() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if !nix::unistd::geteuid().is_root() || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err()
    {
        return skipped("root");
    }
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let mut driver = Driver::new();
    let target = driver.host("volume");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("file"), "content").unwrap();
    mount(Some(&target), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &target, None::<&str>, read_only, None::<&str>).unwrap();

    let volume = driver.lookup(ROOT, c"volume").unwrap().nodeid;
    let file = driver.lookup(volume, c"file").unwrap().nodeid;
    let fh = driver.open(file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(driver.read(file, fh, 0, 10).unwrap(), b"content");
    assert_eq!(driver.open(file, libc::O_RDWR).unwrap_err(), Errno::EROFS);
    assert_eq!(driver.open(file, libc::O_WRONLY | libc::O_TRUNC).unwrap_err(), Errno::EROFS);
    assert_eq!(make_directory(&mut driver, volume, "new", 0o755).unwrap_err(), Errno::EROFS);
    let rename = RenameIn { newdir: volume };
    for (opcode, node, arguments) in [
        (opcode::UNLINK, volume, vec![&b"file\0"[..]]),
        (opcode::RENAME, volume, vec![rename.as_slice(), b"file\0moved\0"]),
        (opcode::SYMLINK, volume, vec![b"link\0", b"target\0"]),
        (opcode::SETXATTR, file, vec![&[1, 0, 0, 0, 0, 0, 0, 0], &[0; 8], b"user.key\0v"]),
        (opcode::LINK, volume, vec![&file.to_ne_bytes()[..], b"linked\0"]),
    ] {
        assert_eq!(driver.call(opcode, node, &arguments), Err(Errno::EROFS), "{opcode}");
    }
    for valid in [setattr::MODE, setattr::UID, setattr::SIZE, setattr::MTIME] {
        let change = SetattrIn { valid, mode: 0o600, ..Default::default() };
        assert_eq!(driver.call(opcode::SETATTR, file, &[change.as_slice()]), Err(Errno::EROFS), "{valid}");
    }
    umount2(&target, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_new_driver_starts_from_the_root() {
    let mut driver = Driver::new();
    let (entry, opened) = driver.create(c"file", 0o644).unwrap();
    driver.device.reset();
    driver.device.reset();
    driver.guest = crate::virtio::testing::Guest::new(&QUEUE_SIZES);
    let features = driver.device.features();
    driver.guest.activate(&mut driver.device, features);
    assert_eq!(driver.read(entry.nodeid, opened.fh, 0, 1), Err(Errno::EBADF));
    assert_eq!(driver.open(entry.nodeid, libc::O_RDONLY).unwrap_err(), Errno::ESTALE);
    assert!(driver.lookup(ROOT, c"file").unwrap().nodeid > 1);
    driver.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(driver.device.server.inodes.counts(), (1, 1));
}
