//! What makes two sights of an inode the same one.
//!
//! That is its number on its device and mount, and where that can tell, when it came to be: numbers are given out
//! again. A symbolic link is another one whenever it changed in any way, since the guest never reads one twice.
//!
//! On overlayfs files of a lower layer are different. One that is written to is copied, and then has another time
//! of birth, so that says nothing there. And where several names lead to one such file, each of them gets a copy of
//! its own (without the option `index=on`). Until then they have the same number, but must not be the same inode to
//! the guest: what it writes to one of them would end up in the other. There the name is a part of the identity.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};

use super::inodes::lock;

/// Longer than the period of any kernel's timer.
const TIMER: Duration = Duration::from_millis(20);
/// How many mounts are remembered at a time.
const MAX_MOUNTS: usize = 1024;

/// A number, which may be in use for something else later.
type Number = (u64, (u32, u32), u64);

/// What tells one inode of the host from another. The mount is part of it: where the same directory is mounted at
/// two places, it has two parents, and may be read-only at one of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) mount: u64,
    device: (u32, u32),
    number: u64,
    /// A file of another type under the same number is certainly another file.
    pub(super) kind: u32,
    /// When it was born, or for a symbolic link, changed.
    since: (i64, u32),
    /// The name, where each name has to be an inode.
    pub(super) link: Option<Arc<Link>>,
}

/// One name of several that a file has.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    parent: Number,
    name: CString,
}

impl Link {
    /// The name in a directory.
    pub(super) fn new(parent: &Identity, name: &CStr) -> Link {
        Link { parent: parent.number(), name: name.to_owned() }
    }
}

impl Identity {
    fn new(status: &libc::statx, on_overlay: bool) -> Identity {
        let kind = u32::from(status.stx_mode) & libc::S_IFMT;
        let since = match kind {
            libc::S_IFLNK => status.stx_ctime,
            _ => status.stx_btime,
        };
        let is_known = kind == libc::S_IFLNK || !on_overlay && status.stx_mask & libc::STATX_BTIME != 0;
        Identity {
            mount: status.stx_mnt_id,
            device: (status.stx_dev_major, status.stx_dev_minor),
            number: status.stx_ino,
            kind,
            since: if is_known { (since.tv_sec, since.tv_nsec) } else { (0, 0) },
            link: None,
        }
    }

    /// The same file, if each of its names is to be one.
    pub(super) fn with_link(self, link: Link) -> Identity {
        Identity { link: Some(Arc::new(link)), ..self }
    }

    /// Whether `other` is the same, whatever its name.
    pub(super) fn is_same_file(&self, other: &Identity) -> bool {
        (self.number(), self.kind, self.since) == (other.number(), other.kind, other.since)
    }

    fn number(&self) -> Number {
        (self.mount, self.device, self.number)
    }
}

/// File systems that nobody changes but this host's kernel, so that it can tell of each change. ext2 and ext3 have the
/// number of ext4.
const LOCAL: [FsType; 5] =
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC];

/// What is known of the mounts' file systems.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    systems: Mutex<HashMap<u64, System>>,
}

/// What is known of a file system.
#[derive(Debug, Clone, Copy)]
struct System {
    /// It is an overlay.
    is_overlay: bool,
    /// Nobody changes it but this host's kernel.
    is_local: bool,
}

impl Mounts {
    /// What these attributes are of, apart from its name; nothing if the mount was not seen before.
    pub(super) fn identify(&self, status: &libc::statx) -> Option<Identity> {
        let system = *lock(&self.systems).get(&status.stx_mnt_id)?;
        Some(Identity::new(status, system.is_overlay))
    }

    /// What an open file of these attributes is, apart from its name.
    pub(super) fn identify_file(&self, file: BorrowedFd<'_>, status: &libc::statx) -> Identity {
        if let Some(identity) = self.identify(status) {
            return identity;
        }
        // Where it cannot be told the worst is assumed.
        let kind = fstatfs(file).map(|status| status.filesystem_type()).ok();
        let is_overlay = kind.is_none_or(|kind| kind == OVERLAYFS_SUPER_MAGIC);
        let is_local = kind.is_some_and(|kind| LOCAL.contains(&kind));
        let mut systems = lock(&self.systems);
        if systems.len() >= MAX_MOUNTS {
            systems.clear();
        }
        systems.insert(status.stx_mnt_id, System { is_overlay, is_local });
        Identity::new(status, is_overlay)
    }

    /// Whether this host's kernel knows of each change on a mount. Of one that was not seen before nobody can say.
    pub(super) fn is_local(&self, mount: u64) -> bool {
        lock(&self.systems).get(&mount).is_some_and(|system| system.is_local)
    }

    /// Whether this host's kernel tells of each change of a file's contents on a mount. Of an overlay it does not: who has
    /// mapped a file there counts as a user of the layer's file.
    pub(super) fn tells_of_contents(&self, mount: u64) -> bool {
        lock(&self.systems).get(&mount).is_some_and(|system| system.is_local && !system.is_overlay)
    }

    /// Whether these attributes are of a file whose names may become files of their own.
    pub(super) fn may_part(&self, status: &libc::statx) -> bool {
        let is_directory = u32::from(status.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        status.stx_nlink > 1
            && !is_directory
            && lock(&self.systems).get(&status.stx_mnt_id).is_none_or(|system| system.is_overlay)
    }
}

/// Values that differ when the contents of a file do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Version {
    /// What tells this version of a file from others. Nothing does where the last change was only just now: the
    /// host's kernel may count time by its timer, and give the next change the same one.
    pub(super) fn of(status: &libc::statx, now: SystemTime) -> Option<Version> {
        let changed = (status.stx_ctime.tv_sec, status.stx_ctime.tv_nsec);
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let then = Duration::new(u64::try_from(changed.0).unwrap_or(0), changed.1);
        since_epoch.checked_sub(then).filter(|age| *age >= TIMER)?;
        let modified = (status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec);
        Some(Version { size: status.stx_size, modified, changed })
    }
}
