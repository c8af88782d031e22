//! More inodes than may be pinned.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, symlink};

use fuse_backend_rs::abi::fuse_abi::{AttrOut, ForgetIn, ReleaseIn, RenameIn, WriteIn};
use nix::errno::Errno;
use vm_memory::ByteValued;

use super::driver::ROOT;
use super::*;
use crate::virtio::fs::inodes::{Inodes, Limits};
use crate::virtio::fs::sync::Unsynced;
use crate::virtio::fs::wire::opcode;

/// A driver whose server keeps to these limits, over a tree of 10 directories with 20 files each.
fn driver(idle: usize, in_use: usize) -> Driver {
    let driver = Driver::with(|server| {
        let root = server.node(ROOT).unwrap();
        let status = system::attributes(root.file.as_fd()).unwrap();
        let file = root.file.as_fd().try_clone_to_owned().unwrap();
        let identity = server.mounts.identify_file(root.file.as_fd(), &status);
        server.unsynced = Unsynced::new(0);
        server.inodes = Inodes::new(file, identity, Limits { known: 250, idle, in_use });
    });
    for directory in 0..10 {
        fs::create_dir(driver.host(&format!("d{directory}"))).unwrap();
        for file in 0..20 {
            fs::write(driver.host(&format!("d{directory}/f{file}")), format!("{directory} {file}")).unwrap();
        }
    }
    driver
}

/// Looks everything up; returns the numbers of the files.
fn walk(driver: &mut Driver) -> Vec<Vec<u64>> {
    let walk_directory = |directory| {
        let name = CString::new(format!("d{directory}")).unwrap();
        let parent = driver.lookup(ROOT, &name).unwrap().nodeid;
        let mut file =
            |file| driver.lookup(parent, &CString::new(format!("f{file}")).unwrap()).unwrap().nodeid;
        (0..20).map(&mut file).collect()
    };
    (0..10).map(walk_directory).collect()
}

fn attributes(driver: &mut Driver, node: u64) -> Result<AttrOut, Errno> {
    driver.object(opcode::GETATTR, node, &[&[0; 16]])
}

fn counts(driver: &Driver) -> (usize, usize) {
    driver.device.server.inodes.counts()
}

#[test]
fn inodes_are_released_and_found_again() {
    let mut driver = driver(12, 8);
    let nodes = walk(&mut driver);
    assert_eq!(counts(&driver).0, 211);
    assert!(counts(&driver).1 <= 20, "{:?}", counts(&driver));
    for (directory, files) in nodes.iter().enumerate() {
        for (file, &node) in files.iter().enumerate() {
            let host = fs::metadata(driver.host(&format!("d{directory}/f{file}"))).unwrap();
            assert_eq!(attributes(&mut driver, node).unwrap().attr.ino, host.ino());
            let fh = driver.open(node, libc::O_RDONLY).unwrap().fh;
            let expected = format!("{directory} {file}");
            assert_eq!(driver.read(node, fh, 0, 100).unwrap(), expected.as_bytes());
            driver.call(opcode::RELEASE, node, &[ReleaseIn { fh, ..Default::default() }.as_slice()]).unwrap();
        }
    }
    assert!(counts(&driver).1 <= 20, "{:?}", counts(&driver));
    assert_eq!(walk(&mut driver), nodes, "they have the same numbers as before");
}

#[test]
fn a_released_inode_that_is_elsewhere_is_stale_until_it_is_seen() {
    let mut driver = driver(12, 8);
    let first = walk(&mut driver)[0][0];
    fs::rename(driver.host("d0/f0"), driver.host("elsewhere")).unwrap();
    assert_eq!(attributes(&mut driver, first).unwrap_err(), Errno::ESTALE);
    // Another file is in its place, which is not mistaken for it.
    fs::rename(driver.host("d0/f1"), driver.host("d0/f0")).unwrap();
    assert_eq!(attributes(&mut driver, first).unwrap_err(), Errno::ESTALE);
    assert_eq!(driver.lookup(ROOT, c"elsewhere").unwrap().nodeid, first);
    assert_eq!(attributes(&mut driver, first).unwrap().attr.size, 3);
}

#[test]
fn a_file_with_the_number_of_another_is_another() {
    let mut driver = driver(12, 8);
    let make: [fn(&Driver, &str); 2] = [
        |driver, content| symlink(content, driver.host("it")).unwrap(),
        |driver, content| fs::write(driver.host("it"), content).unwrap(),
    ];
    for make in make {
        make(&driver, "one");
        let first = driver.lookup(ROOT, c"it").unwrap();
        assert_eq!(driver.lookup(ROOT, c"it").unwrap().nodeid, first.nodeid);
        // It is released, so that the host may give the number out again, as some file systems do at once. The
        // host's clock has to advance in between.
        walk(&mut driver);
        std::thread::sleep(Duration::from_millis(20));
        fs::remove_file(driver.host("it")).unwrap();
        make(&driver, "two");
        let second = driver.lookup(ROOT, c"it").unwrap();
        assert_ne!(second.nodeid, first.nodeid);
        if second.attr.ino != first.attr.ino {
            eprintln!("not tested: this file system did not give the number out again");
        }
        fs::remove_file(driver.host("it")).unwrap();
    }
}

#[test]
fn what_the_guest_moves_is_found_where_it_is() {
    let mut driver = driver(12, 8);
    let nodes = walk(&mut driver);
    let from = driver.lookup(ROOT, c"d0").unwrap().nodeid;
    let rename = RenameIn { newdir: ROOT };
    driver.call(opcode::RENAME, from, &[rename.as_slice(), b"f0\0moved\0"]).unwrap();
    driver.call(opcode::RENAME, ROOT, &[rename.as_slice(), b"d1\0directory\0"]).unwrap();
    walk_others(&mut driver);
    assert_eq!(attributes(&mut driver, nodes[0][0]).unwrap().attr.size, 3);
    assert_eq!(attributes(&mut driver, nodes[1][7]).unwrap().attr.size, 3);
}

#[test]
fn what_is_replaced_while_it_is_not_pinned_is_not_mistaken_for_what_replaced_it() {
    let mut driver = driver(12, 8);
    let nodes = walk(&mut driver);
    let directory = driver.lookup(ROOT, c"d0").unwrap().nodeid;
    walk_others(&mut driver);
    fs::rename(driver.host("d0/f1"), driver.host("d0/f2")).unwrap();
    walk_others(&mut driver);
    assert_eq!(attributes(&mut driver, nodes[0][2]).unwrap_err(), Errno::ESTALE);
    assert_eq!(driver.lookup(directory, c"f2").unwrap().nodeid, nodes[0][1]);
    assert_eq!(attributes(&mut driver, nodes[0][1]).unwrap().attr.size, 3);
}

#[test]
fn what_the_guest_removes_or_replaces_itself_can_be_read_on_without_having_been_opened() {
    let mut driver = driver(12, 8);
    let nodes = walk(&mut driver);
    let directory = driver.lookup(ROOT, c"d0").unwrap().nodeid;
    let rename = RenameIn { newdir: directory };
    fs::hard_link(driver.host("d0/f3"), driver.host("second")).unwrap();
    walk_others(&mut driver);
    driver.call(opcode::UNLINK, directory, &[b"f0\0"]).unwrap();
    driver.call(opcode::RENAME, directory, &[rename.as_slice(), b"f1\0f2\0"]).unwrap();
    driver.call(opcode::UNLINK, directory, &[b"f3\0"]).unwrap();
    // What is in nobody's way is removed without more ado.
    driver.call(opcode::RMDIR, ROOT, &[b"none\0"]).unwrap_err();
    for _ in 0..2 {
        walk_others(&mut driver);
        for (file, names) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
            let node = nodes[0][file];
            assert_eq!(driver.read(node, 0, 0, 100).unwrap(), format!("0 {file}").as_bytes());
            assert_eq!(attributes(&mut driver, node).unwrap().attr.nlink, names);
        }
    }
    assert_eq!(driver.lookup(directory, c"f2").unwrap().nodeid, nodes[0][1]);
    let pinned = counts(&driver).1;
    for file in [0, 2] {
        driver.forget(opcode::FORGET, nodes[0][file], ForgetIn { nlookup: 1 }.as_slice());
    }
    assert_eq!(counts(&driver).1, pinned - 2);
}

#[test]
fn a_guest_that_forgets_nothing_has_no_more_pinned_than_it_may() {
    let mut driver = driver(12, 8);
    walk(&mut driver);
    for directory in 0..10 {
        let parent = driver.lookup(ROOT, &CString::new(format!("d{directory}")).unwrap()).unwrap().nodeid;
        for file in 0..20 {
            let name = format!("f{file}\0");
            driver.call(opcode::UNLINK, parent, &[name.as_bytes()]).unwrap();
        }
    }
    // The root, and a directory on the way to a file, can come on top.
    assert!(counts(&driver).1 <= 20 + 2, "{:?}", counts(&driver));
}

fn walk_others(driver: &mut Driver) {
    for directory in 2..10 {
        let parent = driver.lookup(ROOT, &CString::new(format!("d{directory}")).unwrap()).unwrap().nodeid;
        for file in 0..20 {
            driver.lookup(parent, &CString::new(format!("f{file}")).unwrap()).unwrap();
        }
    }
}

#[test]
fn open_files_stay_reachable_without_a_name() {
    let mut driver = driver(12, 8);
    let (entry, opened) = driver.create(c"open", 0o644).unwrap();
    driver.call(opcode::UNLINK, ROOT, &[b"open\0"]).unwrap();
    walk(&mut driver);
    driver.write(entry.nodeid, WriteIn { fh: opened.fh, ..Default::default() }, b"x").unwrap();
    let attr = attributes(&mut driver, entry.nodeid).unwrap().attr;
    assert_eq!((attr.nlink, attr.size), (0, 1));
}

#[test]
fn too_many_open_files_are_an_error_until_some_are_closed() {
    let mut driver = driver(12, 8);
    let mut open = Vec::new();
    let refused = loop {
        match driver.create(&CString::new(format!("n{}", open.len())).unwrap(), 0o644) {
            Ok((entry, opened)) => open.push((entry.nodeid, opened.fh)),
            Err(errno) => break errno,
        }
        assert!(open.len() < 100);
    };
    assert_eq!(refused, Errno::ENFILE);
    for (node, fh) in open {
        driver.call(opcode::RELEASE, node, &[ReleaseIn { fh, ..Default::default() }.as_slice()]).unwrap();
    }
    driver.create(c"room-again", 0o644).unwrap();
}

#[test]
fn too_many_known_inodes_are_an_error_until_some_are_forgotten() {
    let mut driver = driver(12, 8);
    let nodes = walk(&mut driver);
    let mut numbers = 0..;
    let mut make = |driver: &mut Driver| {
        let name = CString::new(format!("n{}", numbers.next().unwrap())).unwrap();
        fs::write(driver.host(name.to_str().unwrap()), "").unwrap();
        driver.lookup(ROOT, &name)
    };
    let known = counts(&driver).0;
    (known..250).for_each(|_| assert!(make(&mut driver).is_ok()));
    assert_eq!(make(&mut driver).unwrap_err(), Errno::ENFILE);
    // What is known goes on.
    assert_eq!(attributes(&mut driver, nodes[3][4]).unwrap().attr.size, 3);
    assert_eq!(walk(&mut driver), nodes);
    driver.device.server.inodes.forget(nodes[0][0], 2);
    make(&mut driver).unwrap();
}

#[test]
fn an_inode_that_is_forgotten_while_a_request_uses_it_counts_no_more() {
    let mut driver = driver(12, 8);
    let id = driver.lookup(ROOT, c"d0").unwrap().nodeid;
    let before = counts(&driver);
    let inodes = &driver.device.server.inodes;
    let inode = inodes.get(id).unwrap();
    inodes.forget(id, 1);
    let file = || fs::File::open(driver.host("d0")).unwrap().into();
    // It is pinned and released by requests that knew it before.
    inodes.pin(&inode, file());
    inodes.release(&inode, true);
    inodes.release(&inode, false);
    assert_eq!(counts(&driver), (before.0 - 1, before.1 - 1));
    assert!(inode.pinned().is_none());
}

#[test]
fn an_inode_that_comes_to_use_is_not_released() {
    let mut driver = driver(0, 8);
    let id = driver.lookup(ROOT, c"d0").unwrap().nodeid;
    let server = &driver.device.server;
    let inode = server.inodes.get(id).unwrap();
    let in_use = inode.pinned().unwrap();
    // It was chosen just before that.
    server.inodes.release(&inode, true);
    assert!(inode.pinned().is_some());
    drop(in_use);
    server.inodes.release(&inode, true);
    assert!(inode.pinned().is_none());
}
