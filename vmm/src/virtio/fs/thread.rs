//! What is particular to a thread that serves files: where its paths start, and as whom it creates files.
//!
//! The kernel keeps working directory, umask, user IDs and capabilities for each thread, though POSIX and the C
//! library pretend otherwise. A serving thread
//! - has left the others' `fs_struct`: its umask is the requester's while it creates a file, since it depends on the
//!   directory's access control list whether that counts, and its working directory is /proc/self/fd, so that a bare
//!   descriptor number is a path to the file behind it. Extended attributes of something opened with `O_PATH` can be
//!   reached no other way;
//! - keeps its capabilities when its user ID changes. It creates a file under the requester's *file system* IDs
//!   (`setfsuid(2)`), so that the owner is right from the first moment, in directories that the requester may
//!   write to by a supplementary group or a capability which the host knows nothing of.

use std::cell::Cell;

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, fchdir, getegid, geteuid, setfsgid, setfsuid};

use super::server::FileServer;
use super::system;

/// Makes the calling thread one that serves files. It is good for nothing else afterwards.
pub(super) fn enter(server: &FileServer) -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_FS)?;
    fchdir(&server.descriptors)?;
    umask(Mode::empty());
    // A thread that cannot become another user has no capabilities to lose by that: all files belong to its own.
    // One that can must not lose them, or it could create nothing where only its capabilities let it.
    let changes_users = caps::has_cap(None, CapSet::Permitted, Capability::CAP_SETUID).unwrap_or(true);
    if changes_users && !system::keeps_capabilities() {
        system::keep_capabilities()?;
    }
    Ok(())
}

thread_local! {
    /// How it went when this thread was to become one that serves files.
    static ENTERED: Cell<Option<Result<(), Errno>>> = const { Cell::new(None) };
}

/// The same for a thread that may be one already, or may not become one. It serves one file system after another, since
/// /proc/self/fd is the same for all.
pub(super) fn enter_once(server: &FileServer) -> Result<(), Errno> {
    let entered = ENTERED.get().unwrap_or_else(|| enter(server));
    ENTERED.set(Some(entered));
    entered
}

/// As long as it lives, files that this thread creates belong to someone else.
#[must_use]
pub(super) struct Owner {
    previous: Option<(Uid, Gid)>,
}

impl Owner {
    /// Files belong to this user and group, and are made with this umask.
    pub(super) fn assume(uid: u32, gid: u32, mask: u32) -> Result<Owner, Errno> {
        // It stays until the next file is created.
        umask(Mode::from_bits_truncate(mask));
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        if uid == geteuid() && gid == getegid() {
            return Ok(Owner { previous: None });
        }
        let owner = Owner { previous: Some((geteuid(), getegid())) };
        setfsgid(gid);
        setfsuid(uid);
        // These calls report no errors. One with an ID that cannot be set returns the present one.
        let none = u32::MAX;
        if setfsuid(Uid::from_raw(none)) != uid || setfsgid(Gid::from_raw(none)) != gid {
            return Err(Errno::EPERM);
        }
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.previous {
            setfsuid(uid);
            setfsgid(gid);
        }
    }
}

/// As long as it lives, this thread's changes of a file clear its set-user-ID and set-group-ID bits, as those of
/// an ordinary user do.
#[must_use]
pub(super) struct Unprivileged(());

impl Unprivileged {
    /// Gives the privilege up.
    pub(super) fn assume() -> Result<Unprivileged, Errno> {
        caps::drop(None, CapSet::Effective, Capability::CAP_FSETID).map_err(|_| Errno::EPERM)?;
        Ok(Unprivileged(()))
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        // It fails where the capability was not permitted in the first place.
        let _ = caps::raise(None, CapSet::Effective, Capability::CAP_FSETID);
    }
}
