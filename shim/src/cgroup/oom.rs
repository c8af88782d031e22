//! How engines hear of a kill for want of memory in the guest.
//!
//! They watch the counter of kills (`memory.events`) of the cgroup that they found the monitor in after `create`. The kills
//! of the guest's kernel are in no counter of the host. So each is told by one here: of a process that lives only to be
//! killed, in a cgroup that may use no memory, below the container's; a kill counts in every cgroup above it. A cgroup
//! whose children have limits of memory can have no processes itself, so the monitor moves into a child too.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::{CgroupError, HostCgroup, PROCESSES, Version, failed, write};

/// The child with the monitor and all else of the container.
const MEMBERS: &str = "vm";
/// The child without memory.
const VICTIMS: &str = "oom";

impl HostCgroup {
    /// Makes the two children and moves the monitor into one. Whoever writes `0` to the file that is returned, and then
    /// needs any memory, is killed for want of it. None with version 1, where a kill is told below its cgroup only.
    pub fn prepare_oom_reports(&self) -> Result<Option<File>, CgroupError> {
        match (self.version, self.directories.first()) {
            (Version::V2, Some(directory)) => {
                let path = &directory.path;
                let file = split(path).inspect_err(|_| join(path));
                file.map(Some).map_err(|error| failed("make children of", path, error))
            }
            _ => Ok(None),
        }
    }

    /// Where a further process of the container belongs.
    pub(super) fn members(&self, directory: &Path) -> PathBuf {
        let child = directory.join(MEMBERS);
        match self.version {
            Version::V2 if child.is_dir() => child,
            _ => directory.into(),
        }
    }
}

fn split(cgroup: &Path) -> io::Result<File> {
    let (members, victims) = (cgroup.join(MEMBERS), cgroup.join(VICTIMS));
    fs::create_dir(&members)?;
    move_all(cgroup, &members)?;
    write(&cgroup.join("cgroup.subtree_control"), "+memory")?;
    fs::create_dir(&victims)?;
    write(&victims.join("memory.max"), "0")?;
    OpenOptions::new().write(true).open(victims.join(PROCESSES))
}

/// Takes back what [`split`] has made.
fn join(cgroup: &Path) {
    let _ = fs::remove_dir(cgroup.join(VICTIMS));
    let _ = write(&cgroup.join("cgroup.subtree_control"), "-memory");
    let _ = move_all(&cgroup.join(MEMBERS), cgroup);
    let _ = fs::remove_dir(cgroup.join(MEMBERS));
}

fn move_all(from: &Path, to: &Path) -> io::Result<()> {
    for pid in fs::read_to_string(from.join(PROCESSES))?.lines() {
        match write(&to.join(PROCESSES), pid) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => result?,
        }
    }
    Ok(())
}
