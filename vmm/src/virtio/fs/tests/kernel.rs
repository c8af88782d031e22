//! The server under the kernel's own FUSE client, the one that virtiofs is made of: what comes out of /dev/fuse goes
//! through the virtqueues. These tests need root and /dev/fuse, and say elsewhere that they did nothing; with
//! RVM_TESTS_NEED_ROOT set they fail there.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{InHeader, ReadIn};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use super::driver::object;
use super::*;
use crate::virtio::fs::system;
use crate::virtio::fs::wire::opcode;
use crate::virtio::testing::{Guest, Part};

/// A directory as it is, and as it is seen through the file system.
struct Mounted {
    host: PathBuf,
    seen: TempDir,
    /// Removes the host's directory, where it was made for this.
    temporary: Option<TempDir>,
}

impl Mounted {
    /// Mounts a new directory in a mount namespace of this thread's own.
    fn new() -> Option<Mounted> {
        let host = tempfile::tempdir().unwrap();
        fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut mounted = Self::over(host.path())?;
        mounted.temporary = Some(host);
        Some(mounted)
    }

    /// Mounts what is there.
    fn over(host: &Path) -> Option<Mounted> {
        if !nix::unistd::geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
            return None;
        }
        let mut fuse = OpenOptions::new();
        let fuse = fuse.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse").ok()?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).ok()?;
        let seen = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40755,user_id=0,group_id=0,default_permissions,allow_other",
            fuse.as_raw_fd()
        );
        mount(Some("rvm"), seen.path(), Some("fuse"), MsFlags::empty(), Some(options.as_str())).ok()?;
        let server = FileServer::prepare().unwrap().serve_root(host).unwrap();
        thread::spawn(move || forward(fuse, FsDevice::new("rootfs", server).unwrap()));
        Some(Mounted { host: host.to_owned(), seen, temporary: None })
    }

    fn host(&self, name: &str) -> PathBuf {
        self.host.join(name)
    }

    fn seen(&self, name: &str) -> PathBuf {
        self.seen.path().join(name)
    }

    /// Runs a shell command in the mounted directory.
    fn run(&self, command: &str) -> String {
        let output =
            Command::new("sh").args(["-euc", command]).current_dir(self.seen.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{command}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(self.seen.path(), MntFlags::MNT_DETACH);
    }
}

/// How many requests are with the device at a time.
const IN_FLIGHT: usize = 16;

/// Carries requests from the kernel to the device and replies back, until the file system is unmounted.
fn forward(mut fuse: File, mut device: FsDevice) {
    let mut guest = Guest::new(&QUEUE_SIZES);
    let features = device.features();
    guest.activate(&mut device, features);
    let mut buffer = vec![0; (1 << 20) + 8192];
    let mut in_flight = 0;
    loop {
        while in_flight < IN_FLIGHT {
            match fuse.read(&mut buffer) {
                Ok(len) => push(&mut guest, &buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // A request that was given up before it was read.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                Err(_) => return,
            }
            in_flight += 1;
        }
        let used = [HIGH_PRIORITY_QUEUE, REQUEST_QUEUE].map(|queue| guest.pop_used(queue.into()));
        if used.iter().all(Option::is_none) {
            thread::yield_now();
        }
        for reply in used.into_iter().flatten() {
            in_flight -= 1;
            if reply.len > 0 {
                // A request that was given up in the meantime takes no reply.
                let _ = fuse.write(&reply.data);
            }
        }
    }
}

/// Offers a request to the device as the virtiofs driver does.
fn push(guest: &mut Guest, request: &[u8]) {
    let (header, arguments) = request.split_at(size_of::<InHeader>());
    let mut parts = vec![Part::Out(header.to_vec()), Part::Out(arguments.to_vec())];
    let (queue, room) = match object::<InHeader>(header).opcode {
        opcode::FORGET | opcode::BATCH_FORGET => (HIGH_PRIORITY_QUEUE, None),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => {
            (REQUEST_QUEUE, Some(object::<ReadIn>(arguments).size))
        }
        _ => (REQUEST_QUEUE, Some(80 << 10)),
    };
    parts.extend(room.into_iter().flat_map(|room| [Part::In(16), Part::In(room)]));
    guest.push(queue.into(), &parts);
    guest.kick(queue.into());
}

#[test]
fn programs_find_a_file_system_as_they_know_it() {
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    mounted.run(
        "for i in $(seq 200); do mkdir -p tree/$((i % 7))/$((i % 3)) && seq $i > tree/$((i % 7))/$((i % 3))/$i; done && \
         cp -a tree copy && diff -r tree copy && rm -r copy",
    );
    mounted.run(
        "mkdir d && cd d && touch a && ln a b && ln -s a c && mkfifo f && mv b e && ls -la && rm -r ../d",
    );
    mounted.run(
        "dd if=/dev/urandom of=big bs=1M count=20 && sync && cp big copy && cmp big copy && rm big copy",
    );
    mounted.run("seq 100000 > n && tail -c 3000 n | wc -c && sort -R n | sort -n | cmp - n && truncate -s 5 n && cat n");
    mounted.run("mkdir out && tar cf - tree | tar xf - -C out && diff -r tree out/tree && rm -r tree out");
    mounted.run("printf '#!/bin/sh\\necho ran' > x; chmod +x x; test \"$(./x)\" = ran");
    mounted.run("touch -d @77 t && test \"$(stat -c %Y t)\" = 77 && ln -s t s && touch -h -d @55 s && test \"$(stat -c %Y s)\" = 55");
    // Birth, of clients that ask for it (Linux 6.6).
    let born = mounted.host("born").display().to_string();
    let birth =
        format!("touch born; case $(stat -c %W born) in 0|-|$(stat -c %W {born})) ;; *) false;; esac");
    mounted.run(&birth);
    mounted.run("df . && test \"$(ls -a | head -2 | tr -d '\\n')\" = ...");
}

#[test]
fn many_programs_work_at_once() {
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    mounted.run(
        "for i in 1 2 3 4 5 6 7 8; do (
            mkdir $i; seq 20000 > $i/a; cp $i/a $i/b; cmp $i/a $i/b; sync $i/b
            for j in 1 2 3 4 5; do echo $j > $i/$j; mv $i/$j $i/n$j; cat $i/n$j; done; rm -r $i
        ) & pids=\"${pids-} $!\"; done; for pid in $pids; do wait $pid; done",
    );
    assert_eq!(fs::read_dir(&mounted.host).unwrap().count(), 0);
}

#[test]
fn changes_on_the_host_are_seen() {
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    let validity = VALIDITY + Duration::from_millis(50);
    let read = |name: &str| fs::read_to_string(mounted.seen(name)).unwrap_or_default();
    for round in 0..3 {
        // A file that grows, one that another replaces, a directory made anew.
        fs::write(mounted.host("file"), "x".repeat(round + 1)).unwrap();
        fs::write(mounted.host("new"), round.to_string()).unwrap();
        fs::rename(mounted.host("new"), mounted.host("replaced")).unwrap();
        let _ = fs::remove_dir_all(mounted.host("directory"));
        fs::create_dir(mounted.host("directory")).unwrap();
        fs::write(mounted.host(&format!("directory/{round}")), round.to_string()).unwrap();
        thread::sleep(validity);
        assert_eq!(read("file").len(), round + 1);
        assert_eq!(read("replaced"), round.to_string());
        assert_eq!(read(&format!("directory/{round}")), round.to_string());
        assert_eq!(fs::read_dir(mounted.seen("directory")).unwrap().count(), 1);
    }
    // Same length, and opened before: the cache holds it.
    let mut open = File::open(mounted.seen("file")).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    fs::write(mounted.host("file"), "yyy").unwrap();
    thread::sleep(validity);
    text.clear();
    open.seek(SeekFrom::Start(0)).unwrap();
    open.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), read("file").as_str()), ("yyy", "yyy"));
}

#[test]
fn the_finer_points_hold() {
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    let path = mounted.seen("file");
    let append = || OpenOptions::new().create(true).append(true).open(&path).unwrap();
    let (mut first, mut second) = (append(), append());
    for round in 0..100 {
        writeln!(first, "{round}").unwrap();
        writeln!(second, "{round}").unwrap();
    }
    let expected: String = (0..100).map(|round| format!("{round}\n{round}\n")).collect();
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);

    // Unlinked and still in use, also for a truncation and another look.
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file.set_len(3).unwrap();
    file.write_all_at(b"0123456789", 3).unwrap();
    assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().nlink()), (13, 0));

    // Shared memory of two mappings reaches the file, and the host.
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(8192).unwrap();
    let length = std::num::NonZeroUsize::new(8192).unwrap();
    let protection = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let map = || unsafe {
        nix::sys::mman::mmap(None, length, protection, nix::sys::mman::MapFlags::MAP_SHARED, &file, 0)
            .unwrap()
    };
    let (one, other) = (map(), map());
    // SAFETY: the mapping is writable, and the kernel gave it whole pages.
    unsafe { one.cast::<u8>().write_volatile(b'!') };
    // SAFETY: the mapping is readable, and the kernel gave it whole pages.
    assert_eq!(unsafe { other.cast::<u8>().read_volatile() }, b'!');
    file.sync_all().unwrap();
    assert_eq!(fs::read(mounted.host("file")).unwrap()[0], b'!');

    // A file without a name.
    let unnamed =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(mounted.seen(""));
    unnamed.unwrap().write_all(b"x").unwrap();
    // Locks are the guest's own, and work there.
    mounted.run("flock file true && flock -n file sh -c '! flock -n file true'");
    // Descriptors are given back.
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for round in 0..300 {
        fs::write(mounted.seen(&format!("many{round}")), "x").unwrap();
    }
    // What was used before is given back at the same time.
    assert!(open() >= before + 200, "an inode that the guest knows is held open");
    mounted.run("rm many*");
    wait_for(|| open() <= before + 100);
}

#[test]
fn users_get_their_files_and_no_others() {
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    fs::set_permissions(mounted.seen.path(), fs::Permissions::from_mode(0o755)).unwrap();
    mounted.run("mkdir shared open && chgrp 3000 shared && chmod 2770 shared && chmod 1777 open && echo s > secret && chmod 600 secret");
    let run = |user: &str, command: &str| {
        let all = format!("setpriv --reuid {user} --regid {user} --groups 3000 sh -euc '{command}'");
        mounted.run(&all)
    };
    run("1000", "echo x > shared/a && echo y > open/b && mkdir shared/d");
    let host = |name: &str| fs::metadata(mounted.host(name)).unwrap();
    assert_eq!((host("shared/a").uid(), host("shared/a").gid()), (1000, 3000), "the directory's group");
    assert_eq!((host("open/b").uid(), host("open/b").gid()), (1000, 1000));
    assert_eq!(host("shared/d").mode() & 0o7777, 0o2755);
    run("1001", "! cat secret && ! rm -f open/b && ! mkdir x && rm -f shared/a");
    mounted.run("setpriv --reuid 1002 --regid 1002 --clear-groups sh -c '! ls shared'");
    // Set-user-ID is lost to a write of someone without privilege.
    mounted.run("touch open/suid && chown 1000 open/suid && chmod 4777 open/suid");
    run("1001", "echo z >> open/suid");
    assert_eq!(host("open/suid").mode() & 0o7777, 0o777);
}

/// An access control list (`linux/posix_acl_xattr.h`) of tags, permissions and IDs.
fn access_control_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn access_control_lists_are_kept_and_obeyed() {
    let [owner, user, group, mask, others]: [u16; 5] = [1, 2, 4, 0x10, 0x20];
    let nobody = u32::MAX;
    let Some(mounted) = Mounted::new() else { return skipped("root and /dev/fuse") };
    fs::set_permissions(mounted.seen.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = |path: PathBuf| CString::new(path.into_os_string().into_vec()).unwrap();
    let set = |name: &str, kind: &CStr, entries: &[(u16, u16, u32)]| {
        system::set_attribute(&path(mounted.seen(name)), kind, &access_control_list(entries), 0).unwrap();
    };
    let list = |place: PathBuf, kind: &CStr| {
        let mut buffer = [0; 200];
        let len = system::attribute(&path(place), kind, &mut buffer).unwrap();
        buffer[..len].to_vec()
    };
    let (access, default) = (c"system.posix_acl_access", c"system.posix_acl_default");
    mounted.run("echo s > secret && chmod 600 secret && mkdir plain shared && chmod 777 plain shared");
    let mode = |name: &str| fs::metadata(mounted.host(name)).unwrap().mode() & 0o7777;

    let one_reads =
        [(owner, 6, nobody), (user, 4, 1000), (group, 0, nobody), (mask, 4, nobody), (others, 0, nobody)];
    set("secret", access, &one_reads);
    assert_eq!(list(mounted.seen("secret"), access), access_control_list(&one_reads));
    assert_eq!(
        list(mounted.host("secret"), access),
        access_control_list(&one_reads),
        "it is a list of the host"
    );
    assert_eq!(
        (mode("secret"), fs::metadata(mounted.seen("secret")).unwrap().mode() & 0o7777),
        (0o640, 0o640)
    );
    let run = |user: u32, command: &str| {
        mounted.run(&format!("setpriv --reuid {user} --regid {user} --clear-groups sh -euc '{command}'"))
    };
    assert_eq!(run(1000, "! echo x >> secret; cat secret"), "s\n");
    run(1001, "! cat secret");
    mounted.run("chmod 600 secret");
    run(1000, "! cat secret");

    // What a directory hands on counts instead of the umask.
    let inherited =
        [(owner, 7, nobody), (user, 7, 1000), (group, 5, nobody), (mask, 7, nobody), (others, 0, nobody)];
    set("shared", default, &inherited);
    mounted.run("umask 077; for d in plain shared; do touch $d/file; mkdir $d/folder; mkfifo $d/pipe; done");
    assert_eq!(["plain/file", "plain/folder", "plain/pipe"].map(mode), [0o600, 0o700, 0o600]);
    assert_eq!(["shared/file", "shared/folder", "shared/pipe"].map(mode), [0o660, 0o770, 0o660]);
    assert_eq!(list(mounted.host("shared/folder"), default), access_control_list(&inherited));
    run(1000, "echo x > shared/file; touch shared/folder/of-1000; ! touch plain/folder/x");
    run(1001, "! cat shared/file");

    // Set-group-ID is lost to an owner who is not of the group.
    mounted.run("echo > tool && chown 1000:3000 tool && chmod 2755 tool");
    let tool = path(mounted.seen("tool"));
    thread::spawn(move || {
        // Of this thread alone. The capability that would keep the bit goes with the user ID.
        nix::unistd::setfsgid(1000.into());
        nix::unistd::setfsuid(1000.into());
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_FSETID).unwrap();
        system::set_attribute(&tool, access, &access_control_list(&one_reads), 0).unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(mode("tool"), 0o640);
}

/// For trying programs by hand, in a new directory or in that of RVM_FS_ROOT:
/// `RVM_FS_COMMAND='...' cargo test -p rvm-vmm -- --ignored by_hand --nocapture`.
#[test]
#[ignore = "runs the command of RVM_FS_COMMAND"]
fn by_hand() {
    let Ok(command) = std::env::var("RVM_FS_COMMAND") else { return };
    let root = std::env::var("RVM_FS_ROOT").ok();
    let mounted = root.map_or_else(Mounted::new, |root| Mounted::over(root.as_ref()));
    let Some(mounted) = mounted else { return };
    let directory: &Path = mounted.seen.path();
    let status = Command::new("sh").args(["-c", &command]).current_dir(directory).status().unwrap();
    assert!(status.success());
}

fn wait_for(condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("it never came to be");
}
