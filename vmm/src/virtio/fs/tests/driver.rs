//! A virtiofs driver of few words: it sends requests and takes replies apart.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, ReadIn, WriteIn, WriteOut,
};
use nix::errno::Errno;
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::super::wire::opcode;
use super::*;
use crate::confine::{self, Duty};
use crate::virtio::testing::{Guest, Part};

/// Options that the driver offers, which includes all that the device could want.
const OPTIONS: u32 = u32::MAX;

pub(super) struct Driver {
    pub(super) guest: Guest,
    pub(super) device: FsDevice,
    pub(super) options: u32,
    /// Who the requests are from.
    pub(super) user: (u32, u32),
    root: TempDir,
    unique: u64,
}

impl Driver {
    /// A device that serves a new directory, with a driver that has said hello.
    pub(super) fn new() -> Driver {
        Self::with(|_| ())
    }

    /// The same with a server that is prepared in some way.
    pub(super) fn with(prepare: impl FnOnce(&mut FileServer)) -> Driver {
        Self::prepared(|_| (), prepare)
    }

    /// The same with a directory that is prepared in some way.
    pub(super) fn over(prepare: impl FnOnce(&Path)) -> Driver {
        Self::prepared(prepare, |_| ())
    }

    fn prepared(prepare_root: impl FnOnce(&Path), prepare: impl FnOnce(&mut FileServer)) -> Driver {
        let root = tempfile::tempdir().unwrap();
        prepare_root(root.path());
        let mut server = FileServer::prepare().unwrap().serve_root(root.path()).unwrap();
        // A machine with much else to do answers late, too.
        server.patience.long = Duration::MAX;
        prepare(&mut server);
        let mut device = FsDevice::new("rootfs", server).unwrap();
        let guest = Guest::new(&QUEUE_SIZES);
        let features = device.features();
        guest.activate(&mut device, features);
        let user = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let mut driver = Driver { guest, device, options: 0, user, root, unique: 0 };
        let init = InitIn { major: 7, minor: 40, max_readahead: 128 << 10, flags: OPTIONS };
        let reply: InitOut = driver.object(opcode::INIT, 0, &[init.as_slice()]).unwrap();
        assert_eq!((reply.major, reply.max_write, reply.max_pages), (7, 1 << 20, 257));
        driver.options = reply.flags;
        driver
    }

    /// Where a path of the served tree is on the host.
    pub(super) fn host(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    /// Sends a request, with its header and arguments as one buffer each; returns the reply's body.
    pub(super) fn call(&mut self, opcode: u32, node: u64, arguments: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        self.call_with_room(opcode, node, arguments, 4096)
    }

    /// The same with this much room for the reply's body.
    pub(super) fn call_with_room(
        &mut self,
        opcode: u32,
        node: u64,
        arguments: &[&[u8]],
        room: u32,
    ) -> Result<Vec<u8>, Errno> {
        self.unique += 2;
        let len = size_of::<InHeader>() + arguments.iter().map(|part| part.len()).sum::<usize>();
        let header = InHeader {
            len: len as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.user.0,
            gid: self.user.1,
            pid: 1,
            padding: 0,
        };
        let mut parts = vec![Part::Out(header.as_slice().to_vec())];
        parts.extend(arguments.iter().map(|part| Part::Out(part.to_vec())));
        parts.extend([Part::In(size_of::<OutHeader>() as u32), Part::In(room)]);
        self.guest.push_indirect(usize::from(REQUEST_QUEUE), &parts);
        // By turns, so that each test is one of both ways.
        match self.unique % 4 {
            0 => self.ring(Duty::VcpuWithFiles),
            _ => self.guest.kick(usize::from(REQUEST_QUEUE)),
        }
        let used = self.guest.wait_used(usize::from(REQUEST_QUEUE));
        let (reply, body) = used.data.split_at(size_of::<OutHeader>());
        let reply: OutHeader = object(reply);
        assert_eq!((reply.len, reply.unique), (used.len, self.unique));
        match reply.error {
            0 => Ok(body.to_vec()),
            error => Err(Errno::from_raw(-error)),
        }
    }

    /// Has the device serve at once what was pushed, on a thread that is confined as a vCPU's.
    pub(super) fn ring(&self, duty: Duty) {
        let bell = self.device.bell(BELL).unwrap();
        let vcpu = || {
            confine::enter_vcpu(duty).unwrap();
            bell.ring();
        };
        thread::scope(|scope| scope.spawn(vcpu).join().unwrap());
    }

    /// Sends a request whose reply is one structure.
    pub(super) fn object<T: ByteValued + Default>(
        &mut self,
        opcode: u32,
        node: u64,
        arguments: &[&[u8]],
    ) -> Result<T, Errno> {
        let body = self.call(opcode, node, arguments)?;
        assert_eq!(body.len(), size_of::<T>());
        Ok(object(&body))
    }

    /// Sends a request that has no answer, with its arguments.
    pub(super) fn forget(&mut self, opcode: u32, nodeid: u64, arguments: &[u8]) {
        let len = (size_of::<InHeader>() + arguments.len()) as u32;
        let header = InHeader { len, opcode, nodeid, ..Default::default() };
        let queue = usize::from(HIGH_PRIORITY_QUEUE);
        self.guest.push(queue, &[Part::Out([header.as_slice(), arguments].concat())]);
        self.guest.kick(queue);
        assert_eq!(self.guest.wait_used(queue).len, 0);
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        self.object(opcode::LOOKUP, parent, &[name.to_bytes_with_nul()])
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<OpenOut, Errno> {
        let open = OpenIn { flags: flags as u32, fuse_flags: 0 };
        self.object(opcode::OPEN, node, &[open.as_slice()])
    }

    /// Creates a file for reading and writing.
    pub(super) fn create(&mut self, name: &CStr, mode: u32) -> Result<(EntryOut, OpenOut), Errno> {
        let flags = (libc::O_CREAT | libc::O_RDWR) as u32;
        let create = CreateIn { flags, mode, umask: 0o022, fuse_flags: 0 };
        let body = self.call(opcode::CREATE, ROOT, &[create.as_slice(), name.to_bytes_with_nul()])?;
        let (entry, opened) = body.split_at(size_of::<EntryOut>());
        Ok((object(entry), object(opened)))
    }

    pub(super) fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let read = ReadIn { fh, offset, size, ..Default::default() };
        self.call_with_room(opcode::READ, node, &[read.as_slice()], size)
    }

    pub(super) fn write(&mut self, node: u64, mut what: WriteIn, data: &[u8]) -> Result<u32, Errno> {
        what.size = data.len() as u32;
        let reply: WriteOut = self.object(opcode::WRITE, node, &[what.as_slice(), data])?;
        Ok(reply.size)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.device.reset();
    }
}

pub(super) const ROOT: u64 = 1;

/// A structure out of bytes that may lie anywhere.
pub(super) fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}
