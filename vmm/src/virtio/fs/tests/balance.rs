//! Whatever a guest does with inodes and files that it has, in the end nothing is left of it.

use std::ffi::CString;

use fuse_backend_rs::abi::fuse_abi::{
    EntryOut, FallocateIn, FsyncIn, LinkIn, MkdirIn, OpenOut, ReadIn, ReleaseIn, RenameIn, WriteIn,
};
use nix::errno::Errno;
use proptest::prelude::*;
use vm_memory::ByteValued;

use super::driver::{ROOT, object};
use super::*;
use crate::virtio::fs::wire::opcode;

/// What the guest does. Numbers choose among what it has.
#[derive(Debug, Clone)]
enum Step {
    Lookup(usize, u8),
    Create(u8),
    MakeDirectory(usize, u8),
    Link(usize, usize, u8),
    Open(usize),
    List(usize),
    Write(usize, u16),
    Read(usize),
    Sync(usize),
    SyncAll,
    Allocate(usize),
    Rename(usize, u8, usize, u8),
    Remove(usize, u8),
    Release(usize),
    Forget(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (any, name) = (|| 0..16usize, || 0..6u8);
    prop_oneof![
        (any(), name()).prop_map(|(parent, name)| Step::Lookup(parent, name)),
        name().prop_map(Step::Create),
        (any(), name()).prop_map(|(parent, name)| Step::MakeDirectory(parent, name)),
        (any(), any(), name()).prop_map(|(node, parent, name)| Step::Link(node, parent, name)),
        any().prop_map(Step::Open),
        any().prop_map(Step::List),
        (any(), 0..u16::MAX).prop_map(|(file, offset)| Step::Write(file, offset)),
        any().prop_map(Step::Read),
        any().prop_map(Step::Sync),
        Just(Step::SyncAll),
        any().prop_map(Step::Allocate),
        (any(), name(), any(), name()).prop_map(|(from, old, to, new)| Step::Rename(from, old, to, new)),
        (any(), name()).prop_map(|(parent, name)| Step::Remove(parent, name)),
        any().prop_map(Step::Release),
        any().prop_map(Step::Forget),
    ]
}

/// What a guest refers to, each as often as it was told.
struct Tenant {
    driver: Driver,
    nodes: Vec<u64>,
    files: Vec<(u64, u64)>,
}

impl Tenant {
    fn node(&self, choice: usize) -> u64 {
        self.nodes[choice % self.nodes.len()]
    }

    fn file(&self, choice: usize) -> (u64, u64) {
        // One that is not there is an error, and no more.
        *self.files.get(choice % self.files.len().max(1)).unwrap_or(&(ROOT, 99))
    }

    fn told(&mut self, entry: Result<EntryOut, Errno>) {
        self.nodes.extend(entry.ok().map(|entry| entry.nodeid).filter(|&id| id != 0));
    }

    fn run(&mut self, step: Step) {
        let text = |name: u8| CString::new(format!("n{name}")).unwrap();
        let bytes = |name: u8| format!("n{name}\0").into_bytes();
        match step {
            Step::Lookup(parent, name) => {
                let entry = self.driver.lookup(self.node(parent), &text(name));
                self.told(entry);
            }
            Step::Create(name) => {
                if let Ok((entry, opened)) = self.driver.create(&text(name), 0o644) {
                    self.nodes.push(entry.nodeid);
                    self.files.push((entry.nodeid, opened.fh));
                }
            }
            Step::MakeDirectory(parent, name) => {
                let how = MkdirIn { mode: 0o755, umask: 0 };
                let arguments: [&[u8]; 2] = [how.as_slice(), &bytes(name)];
                let entry = self.driver.object(opcode::MKDIR, self.node(parent), &arguments);
                self.told(entry);
            }
            Step::Link(node, parent, name) => {
                let link = LinkIn { oldnodeid: self.node(node) };
                let arguments: [&[u8]; 2] = [link.as_slice(), &bytes(name)];
                let entry = self.driver.object(opcode::LINK, self.node(parent), &arguments);
                self.told(entry);
            }
            Step::Open(node) => {
                let node = self.node(node);
                let opened = self.driver.open(node, libc::O_RDWR);
                self.files.extend(opened.ok().map(|opened| (node, opened.fh)));
            }
            Step::List(node) => self.list(node),
            Step::Write(file, offset) => {
                let (node, fh) = self.file(file);
                let at = WriteIn { fh, offset: offset.into(), ..Default::default() };
                let _ = self.driver.write(node, at, b"data");
            }
            Step::Read(file) => {
                let (node, fh) = self.file(file);
                let _ = self.driver.read(node, fh, 0, 100);
            }
            Step::Sync(file) => {
                let (node, fh) = self.file(file);
                let sync = FsyncIn { fh, fsync_flags: 1, padding: 0 };
                let _ = self.driver.call(opcode::FSYNC, node, &[sync.as_slice()]);
            }
            Step::SyncAll => drop(self.driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]])),
            Step::Allocate(file) => {
                let (node, fh) = self.file(file);
                let allocate = FallocateIn { fh, length: 4096, ..Default::default() };
                let _ = self.driver.call(opcode::FALLOCATE, node, &[allocate.as_slice()]);
            }
            Step::Rename(from, old, to, new) => {
                let rename = RenameIn { newdir: self.node(to) };
                let arguments: [&[u8]; 3] = [rename.as_slice(), &bytes(old), &bytes(new)];
                let _ = self.driver.call(opcode::RENAME, self.node(from), &arguments);
            }
            Step::Remove(parent, name) => {
                for opcode in [opcode::UNLINK, opcode::RMDIR] {
                    let _ = self.driver.call(opcode, self.node(parent), &[&bytes(name)]);
                }
            }
            Step::Release(file) if !self.files.is_empty() => {
                let (node, fh) = self.files.swap_remove(file % self.files.len());
                self.release(node, fh);
            }
            Step::Forget(node) if self.nodes.len() > 1 => {
                let node = self.nodes.swap_remove(1 + node % (self.nodes.len() - 1));
                self.driver.device.server.inodes.forget(node, 1);
            }
            Step::Release(_) | Step::Forget(_) => {}
        }
    }

    /// Lists a directory with attributes, which tells of everything in it.
    fn list(&mut self, node: usize) {
        let node = self.node(node);
        let opened: Result<OpenOut, Errno> = self.driver.object(opcode::OPENDIR, node, &[&[0; 8]]);
        let Ok(OpenOut { fh, .. }) = opened else { return };
        let read = ReadIn { fh, size: 4096, ..Default::default() };
        let body = self.driver.call(opcode::READDIRPLUS, node, &[read.as_slice()]).unwrap_or_default();
        let mut rest = &body[..];
        while !rest.is_empty() {
            let entry: EntryOut = object(rest);
            self.told(Ok(entry));
            let name = u32::from_ne_bytes(rest[size_of::<EntryOut>() + 16..][..4].try_into().unwrap());
            rest = &rest[size_of::<EntryOut>() + (24 + name as usize).next_multiple_of(8)..];
        }
        self.release(node, fh);
    }

    fn release(&mut self, node: u64, fh: u64) {
        let release = ReleaseIn { fh, ..Default::default() };
        self.driver.call(opcode::RELEASE, node, &[release.as_slice()]).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nothing_is_left_of_what_is_forgotten_and_closed(steps in prop::collection::vec(step(), 1..80)) {
        let mut tenant = Tenant { driver: Driver::new(), nodes: vec![ROOT], files: Vec::new() };
        steps.into_iter().for_each(|step| tenant.run(step));
        for (node, fh) in std::mem::take(&mut tenant.files) {
            tenant.release(node, fh);
        }
        let server = tenant.driver.device.server.clone();
        tenant.nodes.drain(..).filter(|&id| id != ROOT).for_each(|id| server.inodes.forget(id, 1));
        prop_assert_eq!(server.inodes.counts(), (1, 1));
        prop_assert_eq!(server.handles.count(), 0);
        tenant.driver.call(opcode::SYNCFS, ROOT, &[&[0; 8]]).unwrap();
        prop_assert_eq!(server.unsynced.count(), 0);
    }
}
