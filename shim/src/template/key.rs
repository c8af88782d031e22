//! What a template is for: a machine of one shape, from one kernel and agent, on one host.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::file::VERSION;
use crate::container::shape::Shape;

/// Bytes of a digest that a name consists of.
const LENGTH: usize = 10;

/// The name of a template. Two machines have the same only if one can go on where the other one was captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; LENGTH]);

/// Tells a file from one that was put in its place or changed, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(super) struct FileIdentity {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    pub(super) fn of(metadata: &Metadata) -> FileIdentity {
        FileIdentity {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// All that a captured machine depends on, beside the processor: what that can do is compared when a machine goes on.
#[derive(Serialize)]
struct Parts<'a> {
    version: u32,
    /// What this program was built of.
    commit: &'a str,
    /// This program, the guest's kernel and its agent, with the file systems they are on.
    files: [(u64, FileIdentity); 3],
    vcpus: u8,
    memory: u64,
    slots: u8,
    /// The host's kernel, whose KVM has made the state.
    host: [String; 2],
}

impl Key {
    /// The name of the template for such a machine.
    pub fn of(kernel: &File, agent: &File, shape: Shape, slots: u8) -> io::Result<Key> {
        Key::of_machine(kernel, agent, shape.vcpus, shape.memory, slots)
    }

    /// The name of what machines of all shapes share that boot these. One thing is not the same in all: with several processors
    /// the kernel takes its locks in another way.
    pub fn of_boot(kernel: &File, agent: &File, shape: Shape) -> io::Result<Key> {
        Key::of_machine(kernel, agent, shape.vcpus.min(2), 0, 0)
    }

    fn of_machine(kernel: &File, agent: &File, vcpus: u8, memory: u64, slots: u8) -> io::Result<Key> {
        let program = fs::metadata("/proc/self/exe")?;
        let files = [program, kernel.metadata()?, agent.metadata()?].each_ref().map(identify);
        let host = nix::sys::utsname::uname()?;
        let parts = Parts {
            version: VERSION,
            commit: env!("RVM_COMMIT"),
            files,
            vcpus,
            memory,
            slots,
            host: [host.release(), host.version()].map(|part| part.to_string_lossy().into_owned()),
        };
        let bytes = postcard::to_stdvec(&parts).map_err(io::Error::other)?;
        let digest = Sha256::digest(&bytes);
        let mut key = [0; LENGTH];
        key.copy_from_slice(&digest[..LENGTH]);
        Ok(Key(key))
    }
}

fn identify(metadata: &Metadata) -> (u64, FileIdentity) {
    (metadata.dev(), FileIdentity::of(metadata))
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl FromStr for Key {
    type Err = ();

    fn from_str(text: &str) -> Result<Key, ()> {
        let mut key = [0; LENGTH];
        if text.len() != 2 * LENGTH || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(());
        }
        for (index, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| ())?;
        }
        Ok(Key(key))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const SHAPE: Shape = Shape { vcpus: 2, memory: 256 << 20, memory_limit: None };

    #[test]
    fn whatever_a_machine_depends_on_changes_its_name() {
        let mut files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let key = |files: &[File; 2], shape, slots| Key::of(&files[0], &files[1], shape, slots).unwrap();
        let first = key(&files, SHAPE, 8);
        assert_eq!(key(&files, SHAPE, 8), first);
        assert_eq!(
            key(&files, Shape { memory_limit: Some(1), ..SHAPE }, 8),
            first,
            "that is the guest's business"
        );
        assert_ne!(key(&files, Shape { vcpus: 1, ..SHAPE }, 8), first);
        assert_ne!(key(&files, Shape { memory: 258 << 20, ..SHAPE }, 8), first);
        assert_ne!(key(&files, SHAPE, 9), first);
        files[1].write_all(b"x").unwrap();
        assert_ne!(key(&files, SHAPE, 8), first);
    }

    #[test]
    fn a_boot_has_one_name_in_machines_of_all_sizes() {
        let mut files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let key = |files: &[File; 2], vcpus, memory| {
            Key::of_boot(&files[0], &files[1], Shape { vcpus, memory, memory_limit: None }).unwrap()
        };
        let mut known = vec![key(&files, 2, 1)];
        assert_eq!(key(&files, 3, 2), known[0]);
        known.push(key(&files, 1, 1));
        for changed in 0..2 {
            files[changed].write_all(b"x").unwrap();
            known.push(key(&files, 2, 1));
        }
        let different: std::collections::HashSet<_> = known.iter().collect();
        assert_eq!(different.len(), known.len(), "{known:?}");
    }

    #[test]
    fn names_can_be_read() {
        let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let key = Key::of(&files[0], &files[1], SHAPE, 8).unwrap();
        assert_eq!(key.to_string().parse(), Ok(key));
        for text in ["", "..", "00", &"g".repeat(20), &"A".repeat(20), &"é".repeat(10), &"0".repeat(21)] {
            assert_eq!(text.parse::<Key>(), Err(()), "{text}");
        }
    }
}
