//! Requests about attributes: modes, owners, sizes, times, and those of the whole file system.

use std::os::fd::{AsFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::{Attr, AttrOut, Kstatfs, SetattrIn};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmodat, utimensat};
use nix::sys::statvfs::fstatvfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, ftruncate};

use super::pins::Node;
use super::server::{FileServer, descriptor_path};
use super::system;
use super::thread::Unprivileged;
use super::watches::Validity;
use super::wire::StatxOut;
use super::wire::setattr::{ATIME, ATIME_NOW, FH, GID, KILL_SUIDGID, MODE, MTIME, MTIME_NOW, SIZE, UID};

impl FileServer {
    /// GETATTR. The inode is asked, not the open file: they can differ on overlayfs, where a file that was opened
    /// for reading before its first change stays the old one.
    pub(super) fn attributes(&self, id: u64) -> Result<AttrOut, Errno> {
        let node = self.node(id)?;
        attributes_reply(&node, self.watched(&node))
    }

    /// STATX: the same, and when the inode was born.
    pub(super) fn all_attributes(&self, id: u64) -> Result<StatxOut, Errno> {
        let node = self.node(id)?;
        let valid = self.watched(&node);
        let status = system::attributes(node.file.as_fd())?;
        Ok(StatxOut {
            attr_valid: valid.seconds,
            attr_valid_nsec: valid.nanoseconds,
            mask: status.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
            blksize: status.stx_blksize,
            nlink: status.stx_nlink,
            uid: status.stx_uid,
            gid: status.stx_gid,
            mode: status.stx_mode,
            ino: status.stx_ino,
            size: status.stx_size,
            blocks: status.stx_blocks,
            atime: status.stx_atime.into(),
            btime: status.stx_btime.into(),
            ctime: status.stx_ctime.into(),
            mtime: status.stx_mtime.into(),
            rdev: [status.stx_rdev_major, status.stx_rdev_minor],
            dev: [status.stx_dev_major, status.stx_dev_minor],
            ..Default::default()
        })
    }

    /// SETATTR.
    pub(super) fn set_attributes(&self, id: u64, change: &SetattrIn) -> Result<AttrOut, Errno> {
        let node = self.node(id)?;
        let _changing = self.unsynced.changing(&node);
        let has = |bits: u32| change.valid & bits != 0;
        let path = descriptor_path(&node.file);
        if has(MODE) {
            let mode = Mode::from_bits_truncate(change.mode);
            fchmodat(&self.descriptors, path.as_c_str(), mode, FchmodatFlags::FollowSymlink)?;
        }
        if has(UID | GID) {
            let uid = has(UID).then(|| Uid::from_raw(change.uid));
            let gid = has(GID).then(|| Gid::from_raw(change.gid));
            fchownat(&node.file, c"", uid, gid, AtFlags::AT_EMPTY_PATH)?;
        }
        if has(SIZE) {
            self.set_size(&node, change)?;
        }
        if has(ATIME | MTIME) {
            let accessed = time(has(ATIME), has(ATIME_NOW), change.atime, change.atimensec);
            let modified = time(has(MTIME), has(MTIME_NOW), change.mtime, change.mtimensec);
            // By this path a symbolic link is the link itself, since the descriptor refers to the link.
            let flags = UtimensatFlags::FollowSymlink;
            utimensat(&self.descriptors, path.as_c_str(), &accessed, &modified, flags)?;
        }
        self.hear_changes();
        // Of a file, who wants to know more asks again.
        let valid = if node.inode.kind() == libc::S_IFDIR { self.watched(&node) } else { Validity::SHORT };
        attributes_reply(&node, valid)
    }

    fn set_size(&self, node: &Node, change: &SetattrIn) -> Result<(), Errno> {
        let size = i64::try_from(change.size).map_err(|_| Errno::EINVAL)?;
        let _unprivileged = match change.valid & KILL_SUIDGID != 0 {
            true => self.unprivileged(&node.file)?,
            false => None,
        };
        match change.valid & FH != 0 {
            true => ftruncate(&self.handles.get(change.fh, node.inode.id)?.file, size),
            false => ftruncate(self.open_inode(node, OFlag::O_WRONLY)?, size),
        }
    }

    /// Gives up the privilege to keep set-user-ID and set-group-ID bits, if a file has any to lose.
    pub(super) fn unprivileged(&self, file: &OwnedFd) -> Result<Option<Unprivileged>, Errno> {
        let mode = u32::from(system::attributes(file.as_fd())?.stx_mode);
        match mode & (libc::S_ISUID | libc::S_ISGID) {
            0 => Ok(None),
            _ => Unprivileged::assume().map(Some),
        }
    }

    /// STATFS.
    pub(super) fn statistics(&self, id: u64) -> Result<Kstatfs, Errno> {
        let statistics = fstatvfs(&self.node(id)?.file)?;
        Ok(Kstatfs {
            blocks: statistics.blocks(),
            bfree: statistics.blocks_free(),
            bavail: statistics.blocks_available(),
            files: statistics.files(),
            ffree: statistics.files_free(),
            bsize: statistics.block_size() as u32,
            namelen: statistics.name_max() as u32,
            frsize: statistics.fragment_size() as u32,
            ..Default::default()
        })
    }
}

/// The attributes of an inode, whose validity began before.
pub(super) fn attributes_reply(node: &Node, valid: Validity) -> Result<AttrOut, Errno> {
    let attr = attributes_on_wire(&system::attributes(node.file.as_fd())?);
    Ok(AttrOut { attr_valid: valid.seconds, attr_valid_nsec: valid.nanoseconds, dummy: 0, attr })
}

fn time(given: bool, now: bool, seconds: u64, nanoseconds: u32) -> TimeSpec {
    match (given, now) {
        (false, _) => TimeSpec::UTIME_OMIT,
        (true, true) => TimeSpec::UTIME_NOW,
        // Times before 1970 are negative, and travel as two's complement.
        (true, false) => TimeSpec::new(seconds as i64, i64::from(nanoseconds)),
    }
}

/// Attributes as the protocol has them.
pub(super) fn attributes_on_wire(status: &libc::statx) -> Attr {
    Attr {
        ino: status.stx_ino,
        size: status.stx_size,
        blocks: status.stx_blocks,
        atime: status.stx_atime.tv_sec as u64,
        mtime: status.stx_mtime.tv_sec as u64,
        ctime: status.stx_ctime.tv_sec as u64,
        atimensec: status.stx_atime.tv_nsec,
        mtimensec: status.stx_mtime.tv_nsec,
        ctimensec: status.stx_ctime.tv_nsec,
        mode: u32::from(status.stx_mode),
        nlink: status.stx_nlink,
        uid: status.stx_uid,
        gid: status.stx_gid,
        rdev: device_on_wire(status.stx_rdev_major, status.stx_rdev_minor),
        blksize: status.stx_blksize,
        flags: 0,
    }
}

/// A device number in the 32 bits that the kernel uses towards file systems (`new_encode_dev`).
fn device_on_wire(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_those_of_the_c_library() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (259, 256), (4095, 0xf_ffff)] {
            assert_eq!(u64::from(device_on_wire(major, minor)), libc::makedev(major, minor));
        }
    }
}
