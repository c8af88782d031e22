//! A directory of the host as a root file system whose changes are thrown away (`rvm do`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, mkdirat};

use super::walk::{self, Leaf};
use super::{RootfsError, isolate, kind, sys};
use crate::bundle::options::Attributes;
use crate::cause::Cause;
use crate::mountinfo::{self, MountEntry};

/// File systems below the directory that hold a user's files. All others (proc, devices, run-time state of daemons,
/// layers of other containers) appear as empty directories.
const REAL_FILE_SYSTEMS: [&str; 15] = [
    "9p", "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "nfs4",
    "squashfs", "vfat", "xfs", "zfs",
];

/// The throw-away layer. It lasts as long as the mount namespace in which it was made.
#[derive(Debug)]
pub struct Overlay {
    /// Where the merged tree is.
    pub path: PathBuf,
}

impl Overlay {
    /// Mounts `lower` with a layer in memory over it on the existing directory `at`.
    ///
    /// To be called in the monitor, which has a mount namespace of its own and one thread, before
    /// [`Rootfs::prepare`](super::Rootfs::prepare) with `at` as the root file system.
    pub fn mount(lower: &Path, at: &Path) -> Result<Overlay, RootfsError> {
        isolate()?;
        let failed = |cause: Cause| RootfsError::Overlay { path: lower.into(), cause };
        let lower = lower.canonicalize().map_err(|error| failed(error.into()))?;
        // Read before mounts of our own are among them.
        let below = submounts(&lower).map_err(failed)?;
        mount(&lower, at, &below).map_err(|errno| failed(errno.into()))?;
        Ok(Overlay { path: at.into() })
    }
}

fn mount(lower: &Path, at: &Path, below: &[MountEntry]) -> Result<(), Errno> {
    let lower_root = directory(lower)?;
    sys::mount_on(directory(at)?.as_fd(), "tmpfs", MsFlags::MS_NODEV, "mode=755")?;
    let scratch = directory(at)?;
    layer(lower_root.as_fd(), scratch.as_fd(), "0", scratch.as_fd())?;
    let merged = directory(at)?;
    for (number, entry) in below.iter().enumerate() {
        let Ok(place) = entry.mount_point.strip_prefix(lower) else { continue };
        // A mount that cannot be shown leaves an empty directory, like those that are not shown on purpose.
        let _ = submount(entry, merged.as_fd(), place, scratch.as_fd(), &format!("{}", number + 1));
    }
    Ok(())
}

fn submount(
    entry: &MountEntry,
    merged: BorrowedFd<'_>,
    place: &Path,
    scratch: BorrowedFd<'_>,
    name: &str,
) -> Result<(), Errno> {
    let tree = sys::clone_tree(&entry.mount_point, false)?;
    let leaf = kind(&tree)?;
    let target = walk::find_or_make(merged, place, leaf)?;
    if leaf == Leaf::Directory && !entry.super_options.iter().any(|option| option == "ro") {
        let lower = directory(&entry.mount_point)?;
        if layer(lower.as_fd(), scratch, name, target.as_fd()).is_ok() {
            return Ok(());
        }
    }
    // A single file, or a file system that cannot lie under another: not to be written to, then.
    sys::set_attributes(tree.as_fd(), Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 }, false)?;
    sys::attach(tree.as_fd(), target.as_fd())
}

/// Mounts an overlay on `target`, with the layer's directories under a name in `scratch`.
fn layer(
    lower: BorrowedFd<'_>,
    scratch: BorrowedFd<'_>,
    name: &str,
    target: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let upper = make(scratch, &format!("upper-{name}"))?;
    let work = make(scratch, &format!("work-{name}"))?;
    // Descriptors in place of paths, which would need escapes.
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        sys::through(lower).display(),
        sys::through(upper.as_fd()).display(),
        sys::through(work.as_fd()).display()
    );
    sys::mount_on(target, "overlay", MsFlags::empty(), &options)
}

fn make(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    mkdirat(parent, name, Mode::from_bits_truncate(0o755))?;
    openat(parent, name, path_flags(), Mode::empty())
}

fn directory(path: &Path) -> Result<OwnedFd, Errno> {
    open(path, path_flags(), Mode::empty())
}

fn path_flags() -> OFlag {
    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC
}

/// The mounts below a directory that are to be shown, outer ones first.
fn submounts(lower: &Path) -> Result<Vec<MountEntry>, Cause> {
    let mut shown: Vec<MountEntry> = Vec::new();
    for entry in mountinfo::read()? {
        let is_below = entry.mount_point != lower && entry.mount_point.starts_with(lower);
        if is_below && REAL_FILE_SYSTEMS.contains(&entry.file_system.as_str()) {
            // Of two mounts at one place only the later is seen.
            shown.retain(|earlier| earlier.mount_point != entry.mount_point);
            shown.push(entry);
        }
    }
    Ok(shown)
}
