//! Guests that mean harm to a file server: bytes, in property tests arbitrary and in fuzzing chosen, become requests.
//!
//! Most of them are nearly right, because a server refuses the rest after the first look: structures have their lengths,
//! numbers are small ones that inodes and open files have, names exist or lead elsewhere. Each keeps a chance to be wild.
//! The tree that is served lies beside a secret, with links that lead there; the server may neither follow nor reach it.

use std::ffi::CStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::pace::Pace;
use super::server::FileServer;
use super::thread::enter;
use super::wire::opcode::*;
use crate::GuestMemory;
use crate::virtio::ActiveQueue;
use crate::virtio::hostile::Input;
use crate::virtio::virtqueue::Virtqueue;

const MEMORY: usize = 4 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where the request lies, and behind it the room for its reply.
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x20_0000;
const ROOM: u32 = 1 << 20;
const QUEUE_SIZE: u16 = 16;
/// The most requests of one attack.
const MAX_REQUESTS: usize = 64;
/// What no reply may hold.
const SECRET: &[u8] = b"what lies outside of the tree";
/// Names that are there, that could be, and that lead elsewhere.
const NAMES: [&CStr; 16] = [
    c"file",
    c"folder",
    c"inner",
    c"out",
    c"up",
    c"away",
    c"new",
    c"other",
    c"..",
    c".",
    c"",
    c"a/b",
    c"/etc",
    c"../secret",
    c"user.a",
    c"system.posix_acl_access",
];

/// A kind of request: its operation, the widths of its structure's fields, and how many names follow.
type Kind = (u32, &'static [usize], usize);

const READ_FIELDS: &[usize] = &[8, 8, 4, 4, 8, 4, 4];
const KINDS: &[Kind] = &[
    (LOOKUP, &[], 1),
    (FORGET, &[8], 0),
    (GETATTR, &[4, 4, 8], 0),
    (SETATTR, &[4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4], 0),
    (READLINK, &[], 0),
    (SYMLINK, &[], 2),
    (MKNOD, &[4, 4, 4, 4], 1),
    (MKDIR, &[4, 4], 1),
    (UNLINK, &[], 1),
    (RMDIR, &[], 1),
    (RENAME, &[8], 2),
    (LINK, &[8], 1),
    (OPEN, &[4, 4], 0),
    (READ, READ_FIELDS, 0),
    (WRITE, READ_FIELDS, 1),
    (STATFS, &[], 0),
    (RELEASE, &[8, 4, 4, 8], 0),
    (FSYNC, &[8, 4, 4], 0),
    (SETXATTR, &[4, 4, 4, 4], 2),
    (GETXATTR, &[4, 4], 1),
    (LISTXATTR, &[4, 4], 0),
    (REMOVEXATTR, &[], 1),
    (INIT, &[4, 4, 4, 4], 0),
    (OPENDIR, &[4, 4], 0),
    (READDIR, READ_FIELDS, 0),
    (RELEASEDIR, &[8, 4, 4, 8], 0),
    (FSYNCDIR, &[8, 4, 4], 0),
    (CREATE, &[4, 4, 4, 4], 1),
    (INTERRUPT, &[8], 0),
    (DESTROY, &[], 0),
    (IOCTL, &[8, 4, 4, 8, 4, 4], 0),
    (BATCH_FORGET, &[4, 4, 8, 8], 0),
    (FALLOCATE, &[8, 8, 8, 4, 4], 0),
    (READDIRPLUS, READ_FIELDS, 0),
    (RENAME2, &[8, 4, 4], 2),
    (LSEEK, &[8, 8, 4, 4], 0),
    (COPY_FILE_RANGE, &[8, 8, 8, 8, 8, 8, 8], 0),
    (SYNCFS, &[8], 0),
    (TMPFILE, &[4, 4, 4, 4], 1),
    (STATX, &[4, 4, 8, 4, 4], 0),
];

/// Has a hostile guest use a file server. Panics where the server does, or where it leaves its tree.
pub fn attack(input: &[u8]) {
    let place = Place::new();
    // The server's threads are good for nothing else.
    thread::scope(|scope| {
        let attacked = scope.spawn(|| send_all(&place.tree(), input)).join();
        attacked.expect("the server does not panic");
    });
    place.is_untouched();
}

fn send_all(tree: &Path, input: &[u8]) {
    let server = FileServer::prepare().and_then(|server| server.serve_root(tree)).expect("it is a directory");
    enter(&server).expect("a thread may have a directory of its own");
    let mut guest = Guest::new();
    let hello = InitIn { major: 7, minor: 40, max_readahead: 0, flags: u32::MAX };
    let header = InHeader { opcode: INIT, ..Default::default() };
    guest.send(&server, header, hello.as_slice());
    let mut input = Input(input);
    // Memory for notices, which may lie anywhere behind the replies, or nowhere.
    if input.byte() % 4 != 0 {
        let address = (REPLY + u64::from(ROOM)).saturating_add(input.number());
        server.notices.lend(guest.memory.clone(), GuestAddress(address));
    }
    for _ in 0..MAX_REQUESTS {
        if input.0.is_empty() {
            break;
        }
        let (header, arguments) = input.request();
        guest.send(&server, header, &arguments);
    }
}

/// A tree to be served, and what lies beside it.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        let template = std::env::temp_dir().join("rvm-hostile-XXXXXX");
        let place = Place(nix::unistd::mkdtemp(&template).expect("there is a directory for temporary files"));
        let tree = place.tree();
        fs::create_dir_all(tree.join("folder/inner")).expect("it is a new directory");
        fs::write(tree.join("file"), "contents").expect("it is a new directory");
        fs::write(place.secret(), SECRET).expect("it is a new directory");
        fs::set_permissions(place.secret(), Permissions::from_mode(0o640)).expect("it is there");
        for (name, target) in [("out", Path::new("../secret")), ("up", Path::new("..")), ("away", &place.0)] {
            symlink(target, tree.join(name)).expect("it is a new directory");
        }
        place
    }

    fn tree(&self) -> PathBuf {
        self.0.join("tree")
    }

    fn secret(&self) -> PathBuf {
        self.0.join("secret")
    }

    fn is_untouched(&self) {
        assert_eq!(fs::read(self.secret()).ok().as_deref(), Some(SECRET));
        let secret = self.secret().metadata().expect("it is there");
        assert_eq!((secret.mode() & 0o7777, secret.nlink()), (0o640, 1));
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .expect("it is there")
            .map(|entry| entry.expect("it can be read").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["secret", "tree"]);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes a tree in which directories may be closed to everybody.
fn remove(directory: &Path) {
    let _ = fs::set_permissions(directory, Permissions::from_mode(0o700));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => remove(&entry.path()),
            _ => drop(fs::remove_file(entry.path())),
        }
    }
    let _ = fs::remove_dir(directory);
}

/// Memory with one queue in it.
struct Guest {
    memory: GuestMemory,
    queue: Virtqueue,
    sent: u16,
}

impl Guest {
    fn new() -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("there is memory");
        let mut queue = Queue::new(QUEUE_SIZE).expect("it is a power of two");
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        let kick = EventFd::new(libc::EFD_NONBLOCK).expect("there are descriptors");
        Guest { memory: Arc::new(memory), queue: ActiveQueue { index: 0, queue, kick }.into(), sent: 0 }
    }

    /// Has the server answer one request.
    fn send(&mut self, server: &FileServer, header: InHeader, arguments: &[u8]) {
        let memory = &self.memory;
        let put =
            |bytes: &[u8], at: u64| memory.write_slice(bytes, GuestAddress(at)).expect("it is in memory");
        let len = size_of::<InHeader>() + arguments.len();
        let header = InHeader { len: len as u32, ..header };
        put(header.as_slice(), REQUEST);
        put(arguments, REQUEST + size_of::<InHeader>() as u64);
        put(&[0; 4096], REPLY);
        let request = Descriptor::new(REQUEST, len as u32, 1, 1);
        let reply = Descriptor::new(REPLY, ROOM, 2, 0);
        for (slot, descriptor) in (0..).zip([request, reply]) {
            put(RawDescriptor::from(descriptor).as_slice(), DESCRIPTORS + 16 * slot);
        }
        put(&0_u16.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE_SIZE));
        self.sent = self.sent.wrapping_add(1);
        put(&self.sent.to_le_bytes(), AVAILABLE + 2);
        let chain = self.queue.pop_kept(memory).expect("the queue is sound").expect("there is a request");
        let head = chain.head_index();
        let written = server.serve(memory, chain.clone(), Pace::AtOnce);
        let written = written.or_else(|| server.serve(memory, chain, Pace::Any)).unwrap_or(0);
        assert!(written <= ROOM, "a reply of {written} bytes");
        self.queue.push_used(memory, head, written).expect("the queue is sound");
        let mut answer = vec![0; written as usize];
        memory.read_slice(&mut answer, GuestAddress(REPLY)).expect("it is in memory");
        assert!(!answer.windows(SECRET.len()).any(|part| part == SECRET), "it read outside of its tree");
    }
}

impl Input<'_> {
    /// A field's value: mostly a number that something has, a set of flags, or a size.
    fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..160 => u64::from(small % 40),
            160..200 => u64::from(self.word()),
            200..230 => 1 << (self.byte() % 64),
            230..250 => 4096,
            _ => u64::from_le_bytes(self.array()),
        }
    }

    fn name(&mut self, into: &mut Vec<u8>) {
        match self.byte() {
            known @ 0..230 => into.extend(NAMES[usize::from(known) % NAMES.len()].to_bytes_with_nul()),
            wild => {
                let bytes = self.array::<24>();
                into.extend(&bytes[..usize::from(wild) % 24]);
            }
        }
    }

    fn request(&mut self) -> (InHeader, Vec<u8>) {
        let choice = usize::from(self.byte());
        let (mut opcode, fields, names) = KINDS[choice % KINDS.len()];
        let mut arguments = Vec::new();
        for (field, width) in fields.iter().enumerate() {
            let mut value = self.number();
            // The disk is not to be filled.
            if opcode == FALLOCATE && field == 2 {
                value %= 1 << 20;
            }
            arguments.extend(&value.to_le_bytes()[..*width]);
        }
        let fixed = arguments.len();
        (0..names).for_each(|_| self.name(&mut arguments));
        match self.byte() {
            // A value or data of the length that is promised.
            0..100 if opcode == WRITE => {
                let len = (arguments.len() - fixed) as u32;
                arguments[16..20].copy_from_slice(&len.to_le_bytes());
            }
            0..100 if opcode == SETXATTR => {
                let name = arguments[fixed..].iter().position(|byte| *byte == 0).map_or(0, |end| end + 1);
                let len = (arguments.len() - fixed - name) as u32;
                arguments[..4].copy_from_slice(&len.to_le_bytes());
            }
            230..240 => arguments.truncate(arguments.len() / 2),
            240..250 => arguments.extend(self.array::<16>()),
            250.. => opcode = self.word(),
            _ => {}
        }
        let user = [0, 1000][usize::from(self.byte() % 2)];
        let nodeid = self.number();
        (InHeader { opcode, nodeid, uid: user, gid: user, unique: 1, ..Default::default() }, arguments)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_guest_leads_the_server_out_of_its_tree(input in prop::collection::vec(any::<u8>(), 0..1200)) {
            attack(&input);
        }
    }
}
