//! What is particular to a root on overlayfs, where containers have theirs. These tests need root, and a kernel that
//! mounts overlayfs.

use std::fs;
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{AttrOut, LinkIn, RenameIn, WriteIn};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::driver::ROOT;
use super::*;
use crate::virtio::fs::wire::opcode;

/// A driver over an overlay, whose lower layer has the file `a` with a second name `b`, and `alone`.
struct Overlay {
    driver: Driver,
    lower: TempDir,
}

impl Overlay {
    fn new() -> Option<Overlay> {
        if !nix::unistd::geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
            return None;
        }
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).ok()?;
        let lower = tempfile::tempdir().unwrap();
        for directory in ["lower", "upper", "work"] {
            fs::create_dir(lower.path().join(directory)).unwrap();
        }
        fs::write(lower.path().join("lower/a"), "old").unwrap();
        fs::write(lower.path().join("lower/alone"), "old").unwrap();
        fs::hard_link(lower.path().join("lower/a"), lower.path().join("lower/b")).unwrap();
        let path = lower.path().display();
        let options = format!("lowerdir={path}/lower,upperdir={path}/upper,workdir={path}/work,index=off");
        let mut mounted = false;
        let driver = Driver::over(|root| {
            let options = Some(options.as_str());
            mounted = mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), options).is_ok();
        });
        mounted.then_some(Overlay { driver, lower })
    }

    fn node(&mut self, name: &std::ffi::CStr) -> u64 {
        self.driver.lookup(ROOT, name).unwrap().nodeid
    }

    fn write(&mut self, node: u64, data: &[u8]) {
        let fh = self.driver.open(node, libc::O_RDWR).unwrap().fh;
        self.driver.write(node, WriteIn { fh, ..Default::default() }, data).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.driver.host(name)).unwrap()
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let root: &Path = &self.driver.host("");
        let _ = umount2(root, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(self.lower.path().join("work"));
    }
}

#[test]
fn names_of_one_lower_file_are_files_of_their_own() {
    let Some(mut overlay) = Overlay::new() else { return skipped("root and overlayfs") };
    let (a, b) = (overlay.node(c"a"), overlay.node(c"b"));
    assert_ne!(a, b);
    overlay.write(a, b"new");
    assert_eq!((overlay.read("a"), overlay.read("b")), ("new".into(), "old".into()));
    overlay.write(b, b"NEW");
    assert_eq!((overlay.read("a"), overlay.read("b")), ("new".into(), "NEW".into()));
    assert_eq!((overlay.node(c"a"), overlay.node(c"b")), (a, b), "they stay what they are");
    let attributes: AttrOut = overlay.driver.object(opcode::GETATTR, a, &[&[0; 16]]).unwrap();
    assert_eq!(attributes.attr.nlink, 1);
}

#[test]
fn a_lower_file_is_the_same_one_after_its_first_change() {
    let Some(mut overlay) = Overlay::new() else { return skipped("root and overlayfs") };
    let alone = overlay.node(c"alone");
    overlay.write(alone, b"new");
    assert_eq!(overlay.node(c"alone"), alone);
    // By its new name too, also where it had several.
    let a = overlay.node(c"a");
    let rename = RenameIn { newdir: ROOT };
    overlay.driver.call(opcode::RENAME, ROOT, &[rename.as_slice(), b"a\0c\0"]).unwrap();
    assert_eq!(overlay.node(c"c"), a);
    overlay.driver.call(opcode::RENAME, ROOT, &[rename.as_slice(), b"alone\0d\0"]).unwrap();
    assert_eq!(overlay.node(c"d"), alone);
}

#[test]
fn names_that_the_guest_gives_lead_to_one_file() {
    let Some(mut overlay) = Overlay::new() else { return skipped("root and overlayfs") };
    for name in [c"alone", c"a"] {
        let node = overlay.node(name);
        let target = [name.to_bytes(), b"-linked\0"].concat();
        let link = LinkIn { oldnodeid: node };
        let linked: fuse_backend_rs::abi::fuse_abi::EntryOut =
            overlay.driver.object(opcode::LINK, ROOT, &[link.as_slice(), &target]).unwrap();
        assert_eq!((linked.nodeid, linked.attr.nlink), (node, 2), "{name:?}");
        assert_eq!(overlay.node(name), node);
        overlay.write(node, b"new");
        assert_eq!(overlay.node(name), node);
    }
    assert_eq!((overlay.read("a-linked"), overlay.read("b")), ("new".into(), "old".into()));
}
