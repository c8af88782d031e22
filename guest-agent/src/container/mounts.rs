//! The mounts of the configuration, in its order.
//!
//! Each is made detached, given its attributes, and then attached. File systems (`proc`, `tmpfs`, ...) are
//! the guest's own. A bind mount's source lies on the host, which has mounted it at its destination in the
//! served tree already: here the destination is copied out of the pristine tree, over which nothing is ever
//! mounted, and put on top of whatever earlier mounts made of that place.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::MntFlags;
use nix::sys::stat::{self, SFlag};
use oci_spec::runtime::Mount;

use super::options::{Bind, Options};
use super::tree::{self, Tree};
use crate::error::{Context, Result, errno_text, other};
use crate::sys::mount::{self, Change, FileSystem, attribute};

/// Makes the mounts of a container.
pub struct Mounter<'a> {
    /// The container's root as the host serves it.
    pub pristine: &'a Tree,
    /// The container's root as it is being made.
    pub root: &'a Tree,
    /// Mounts that become read-only last, when the devices have been made in them.
    read_only_later: Vec<OwnedFd>,
    /// A sysfs that the agent has made, where the child may not.
    sysfs: Option<OwnedFd>,
    /// In a user namespace how access times are kept cannot be changed in copies of mounts that were there before
    /// (mount_namespaces(7)). For served files the host decides that anyway, whose mounts have the options.
    fixed_access_times: bool,
}

impl<'a> Mounter<'a> {
    /// A mounter for this root.
    pub fn new(pristine: &'a Tree, root: &'a Tree, sysfs: Option<OwnedFd>) -> Self {
        let fixed_access_times = sysfs.is_some();
        Self { pristine, root, read_only_later: Vec::new(), sysfs, fixed_access_times }
    }

    /// Makes one mount.
    pub fn mount(&mut self, entry: &Mount) -> Result<()> {
        let kind = entry.typ().as_deref().unwrap_or_default();
        let destination = entry.destination().display();
        self.try_mount(entry, kind).map_err(|mut error| {
            error.message = format!("mounting {kind:?} at {destination}: {}", error.message);
            error
        })
    }

    /// Makes those mounts read-only that had to be written to first.
    pub fn finish(self) -> Result<()> {
        for mount in self.read_only_later {
            mount::change(&mount, Change::attributes(attribute::RDONLY, 0), false)
                .context(|| "making a mount read-only")?;
        }
        Ok(())
    }

    fn try_mount(&mut self, entry: &Mount, kind: &str) -> Result<()> {
        let options = entry.options().as_deref().unwrap_or_default();
        let mut options =
            Options::parse(options.iter().map(String::as_str)).map_err(|error| other(error.to_string()))?;
        let destination = entry.destination();
        let place;
        let detached;
        if let Some(bind) = bind_of(kind, &options) {
            detached = self.clone_pristine(destination, bind)?;
            place = self.place_like(&detached, destination)?;
            if self.fixed_access_times {
                options.keep_access_times();
            }
        } else {
            place = self.directory(kind, destination)?;
            detached = match self.sysfs.take_if(|_| kind == "sysfs") {
                Some(sysfs) => made_here(&sysfs, &place)?,
                None => make_file_system(kind, entry.source().as_deref(), &options, &place)?,
            };
            if options.copy_up {
                super::rootfs::copy_up(self.root, destination, &detached)?;
            }
            if kind == "tmpfs" && options.is_read_only() {
                options.attributes.set &= !attribute::RDONLY;
                options.recursive_attributes.set &= !attribute::RDONLY;
                mount_attributes(&detached, &options)?;
                attach(&detached, &place, &options)?;
                self.read_only_later.push(detached);
                return Ok(());
            }
        }
        mount_attributes(&detached, &options)?;
        attach(&detached, &place, &options)
    }

    fn clone_pristine(&self, destination: &Path, bind: Bind) -> Result<OwnedFd> {
        let source = self.pristine.find(destination).context(|| "finding what the host mounted there")?;
        mount::clone_mount(&source, bind == Bind::Recursive).context(|| "copying the mount")
    }

    /// The mount point for a bind mount: a directory or a file, as what is mounted there.
    fn place_like(&self, mount: &OwnedFd, destination: &Path) -> Result<OwnedFd> {
        let place = match tree::is_directory(mount).context(|| "looking at the source")? {
            true => self.root.make_directory(destination),
            false => self.root.make_file(destination),
        };
        place.context(|| "making the mount point")
    }

    fn directory(&self, kind: &str, destination: &Path) -> Result<OwnedFd> {
        // Through a link, the masks and write protections of /proc and /sys could be led elsewhere.
        if matches!(kind, "proc" | "sysfs")
            && let Ok(found) = self.root.find_no_follow(destination)
            && tree::kind(&found).is_ok_and(|kind| kind != SFlag::S_IFDIR)
        {
            return Err(other("the mount point must be an ordinary directory"));
        }
        self.root.make_directory(destination).context(|| "making the mount point")
    }
}

/// A copy of a mount that the agent has made: mount tables show mounts in the order in which they were made, and programs
/// look for that of the configuration. Only what is attached can be copied, so the original is, for a moment.
fn made_here(mount: &OwnedFd, place: &OwnedFd) -> Result<OwnedFd> {
    let what = || "copying the mount";
    mount::attach(mount, place).context(what)?;
    let copy = mount::clone_mount(mount, false).context(what)?;
    nix::unistd::fchdir(mount).context(what)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).context(what)?;
    nix::unistd::chdir("/").context(what)?;
    Ok(copy)
}

/// Whether an entry is a bind mount. These file systems are always the guest's own, whatever the options say: the
/// host has told the mounts apart by their types, and has put nothing of its own at such a place.
fn bind_of(kind: &str, options: &Options) -> Option<Bind> {
    match kind {
        "proc" | "sysfs" | "cgroup" | "mqueue" => None,
        "bind" => options.bind.or(Some(Bind::Single)),
        _ => options.bind,
    }
}

/// Attaches a mount. The kernel changes one kind of propagation a call; `slave` and then `shared` is both.
fn attach(detached: &OwnedFd, place: &OwnedFd, options: &Options) -> Result<()> {
    mount::attach(detached, place).context(|| "attaching the mount")?;
    options.propagation.iter().try_for_each(|&(propagation, recursive)| {
        mount::change(detached, Change::propagation(propagation), recursive)
            .context(|| "setting the propagation")
    })
}

fn mount_attributes(mount: &OwnedFd, options: &Options) -> Result<()> {
    mount::change(mount, options.recursive_attributes, true).context(|| "setting the mount's attributes")?;
    mount::change(mount, options.attributes, false).context(|| "setting the mount's attributes")
}

fn make_file_system(
    kind: &str,
    source: Option<&Path>,
    options: &Options,
    place: impl AsFd,
) -> Result<OwnedFd> {
    // The guest has version 2 only, whatever the host's engine thought of; its options are of version 1.
    let (kind, settings) = match kind {
        "cgroup" => ("cgroup2", &[][..]),
        _ => (kind, &options.file_system[..]),
    };
    let file_system = FileSystem::open(kind).context(|| "opening the file system type")?;
    let fail = |what: String| {
        let file_system = &file_system;
        move |errno| {
            let said = file_system.complaint().map(|text| format!(" ({text})")).unwrap_or_default();
            other(format!("{what}: {}{said}", errno_text(errno)))
        }
    };
    if let Some(source) = source.and_then(Path::to_str) {
        file_system.set("source", Some(source)).map_err(fail(format!("setting the source {source:?}")))?;
    }
    if kind == "tmpfs" && options.value("mode").is_none() {
        // As runc does: a tmpfs is as accessible as the directory that it covers.
        let mode = stat::fstat(place).context(|| "looking at the mount point")?.st_mode & 0o7777;
        let mode = format!("{mode:o}");
        file_system.set("mode", Some(&mode)).map_err(fail(format!("setting the mode {mode}")))?;
    }
    for (key, value) in settings {
        file_system.set(key, value.as_deref()).map_err(fail(format!("setting the option {key:?}")))?;
    }
    file_system.mount().map_err(fail("making the file system".to_owned()))
}

/// Opens a directory that was found with `O_PATH`, to read it.
pub fn reopen_directory(tree: &Tree, path: &Path) -> nix::Result<OwnedFd> {
    tree.open_with(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
}
