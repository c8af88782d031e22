//! The container's file tree, as a mount namespace of the monitor whose root it becomes.
//!
//! The host's part of the tree, the root file system and the bind mounts, is put together here, so that the kernel
//! cleans all of it up when the monitor ends. What the guest mounts itself (proc, tmpfs and so on) is only prepared
//! a place. The guest takes bind mounts out of this tree wherever they are, below its own mounts too.

mod overlay;
mod program;
mod sys;
mod walk;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{chdir, fchdir, pivot_root};
use oci_spec::runtime::{Mount, Spec};
use rvm_protocol::{AgentError, HostMount};

pub use overlay::Overlay;

use crate::bundle::options::{Attributes, MountOptions};
use crate::bundle::{Bundle, is_bind};
use crate::cause::Cause;
use crate::mountinfo::{self, MountEntry};
use walk::Leaf;

/// Of a volume that is a whole host, the guest is told of no more mounts.
const MOST_HOST_MOUNTS: usize = 256;

/// Why the container's file tree could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The mount namespace could not be cut off from the host's.
    #[error("cannot cut the container's mounts off from the host's: {0}")]
    Isolate(Cause),
    /// The root file system could not be mounted.
    #[error("cannot mount the root file system {path}: {cause}", path = path.display())]
    Root {
        /// The root file system.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The source of a bind mount cannot be used.
    #[error("mounts[{index}]: cannot bind the source {source_path}: {cause}", source_path = source_path.display())]
    Source {
        /// Place in the description's list.
        index: usize,
        /// The source.
        source_path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// There is no place for a mount.
    #[error("mounts[{index}]: cannot make the mount point {destination}: {cause}", destination = destination.display())]
    MountPoint {
        /// Place in the description's list.
        index: usize,
        /// The destination in the container.
        destination: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// A directory would have to be mounted on a file, or the other way round.
    #[error("mounts[{index}]: {source_path} is {source_kind}, but {destination} in the container is {kind}: \
             only a directory can be mounted on a directory, and a file on a file",
            source_path = source_path.display(), destination = destination.display())]
    Kinds {
        /// Place in the description's list.
        index: usize,
        /// The source.
        source_path: PathBuf,
        /// What the source is.
        source_kind: &'static str,
        /// The destination.
        destination: PathBuf,
        /// What the destination is.
        kind: &'static str,
    },
    /// Through a link, the masks and write protections of these file systems could be led elsewhere.
    #[error("mounts[{index}]: {kind} must be mounted on ordinary directory, and {destination} in the container is none",
            destination = destination.display())]
    NoDirectory {
        /// Place in the description's list.
        index: usize,
        /// The file system's type.
        kind: String,
        /// The destination in the container.
        destination: PathBuf,
    },
    /// A path that is to be masked or write-protected leads nowhere.
    #[error("linux.maskedPaths, linux.readonlyPaths: {path} cannot be protected: {cause}", path = path.display())]
    Protect {
        /// The path.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The mount itself failed.
    #[error("mounts[{index}]: cannot mount on {destination}: {cause}", destination = destination.display())]
    Mount {
        /// Place in the description's list.
        index: usize,
        /// The destination in the container.
        destination: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The throw-away layer could not be made.
    #[error("cannot put a throw-away layer over {path}: {cause}", path = path.display())]
    Overlay {
        /// The directory below.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The tree could not become the root.
    #[error("cannot make the container's file tree the monitor's root: {0}")]
    Pivot(Cause),
}

/// A file tree that is put together, and not yet the root.
#[derive(Debug)]
pub struct Rootfs {
    root: OwnedFd,
    read_only: bool,
}

impl Rootfs {
    /// Puts the tree of a bundle together. The process must have a mount namespace of its own and one thread.
    pub fn prepare(bundle: &Bundle) -> Result<Rootfs, RootfsError> {
        Self::prepare_spec(&bundle.rootfs, &bundle.spec)
    }

    /// The same for the parts of a loaded bundle.
    pub fn prepare_spec(path: &Path, spec: &Spec) -> Result<Rootfs, RootfsError> {
        isolate()?;
        let failed = |errno: Errno| RootfsError::Root { path: path.into(), cause: errno.into() };
        let root = bind_on_itself(path).map_err(failed)?;
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let rootfs = Rootfs { root, read_only };
        let mounts = spec.mounts().as_deref().unwrap_or_default();
        for (index, mount) in mounts.iter().enumerate() {
            match is_bind(mount) {
                true => rootfs.bind(index, mount)?,
                false => rootfs.make_room(index, mounts)?,
            }
        }
        rootfs.check_protected(spec)?;
        if read_only {
            rootfs.make_working_directory(spec);
        }
        Ok(rootfs)
    }

    /// Refuses a container whose program cannot be executed by anybody, where that is certain already.
    pub fn check_program(&self, spec: &Spec) -> Result<(), AgentError> {
        program::check(self.root.as_fd(), spec)
    }

    /// Makes the tree the root of this process, and lets go of the host's. From here on a root that is to be read-only is:
    /// before, mount points had to be made in it, and hooks of the container may have written to it.
    pub fn pivot(self) -> Result<(), RootfsError> {
        self.change_root().map_err(RootfsError::Pivot)
    }

    fn change_root(&self) -> Result<(), Cause> {
        if self.read_only {
            let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
            sys::set_attributes(self.root.as_fd(), read_only, false)?;
        }
        let old = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/")?;
        fchdir(&self.root)?;
        // With the same place for both, the old root comes to lie on top of the new one (pivot_root(2)).
        pivot_root(".", ".")?;
        fchdir(&old)?;
        umount2(".", MntFlags::MNT_DETACH)?;
        chdir("/")?;
        Ok(())
    }

    fn bind(&self, index: usize, mount: &Mount) -> Result<(), RootfsError> {
        let destination = mount.destination();
        let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default());
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let from_source =
            |errno: Errno| RootfsError::Source { index, source_path: source.into(), cause: errno.into() };
        let failed =
            |errno: Errno| RootfsError::Mount { index, destination: destination.into(), cause: errno.into() };
        let tree = sys::clone_tree(source, options.bind == Some(true)).map_err(from_source)?;
        let leaf = kind(&tree).map_err(from_source)?;
        let target = self.place(index, destination, leaf)?;
        let found = kind(&target).map_err(failed)?;
        if leaf != found {
            return Err(RootfsError::Kinds {
                index,
                source_path: source.into(),
                source_kind: in_words(leaf),
                destination: destination.into(),
                kind: in_words(found),
            });
        }
        // Before it is attached, so that there is no moment in which a read-only mount can be written to.
        restrict(&tree, &options).map_err(failed)?;
        sys::attach(tree.as_fd(), target.as_fd()).map_err(failed)
    }

    /// Makes the mount point of a mount that the guest makes.
    fn make_room(&self, index: usize, mounts: &[Mount]) -> Result<(), RootfsError> {
        let (earlier, later) = (&mounts[..index], &mounts[index + 1..]);
        let destination = mounts[index].destination();
        let below = |outer: &Path, inner: &Path| inner != outer && inner.starts_with(outer);
        // The guest makes it in that other mount of its own, and nothing needs to be left in the image.
        if earlier.iter().any(|other| !is_bind(other) && below(other.destination(), destination)) {
            return Ok(());
        }
        let kind = mounts[index].typ().as_deref().unwrap_or_default();
        if matches!(kind, "proc" | "sysfs") && walk::is_link(self.root.as_fd(), destination) {
            let destination = destination.to_owned();
            return Err(RootfsError::NoDirectory { index, kind: kind.into(), destination });
        }
        let place = self.place(index, destination, Leaf::Directory)?;
        let holds_bind = later.iter().any(|other| is_bind(other) && below(destination, other.destination()));
        let copies_up = mounts[index].options().iter().flatten().any(|option| option == "tmpcopyup");
        if holds_bind && !copies_up {
            // Their mount points belong into the guest's mount, not into the image: here an empty stand-in.
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            sys::mount_on(place.as_fd(), "tmpfs", flags, "mode=755,size=1m").map_err(|errno| {
                RootfsError::Mount { index, destination: destination.into(), cause: errno.into() }
            })?;
        }
        Ok(())
    }

    /// Links of the image that lead in circles do so in the guest, too: said at once, and not by the start.
    fn check_protected(&self, spec: &Spec) -> Result<(), RootfsError> {
        let Some(linux) = spec.linux() else { return Ok(()) };
        for path in [linux.masked_paths(), linux.readonly_paths()].into_iter().flatten().flatten() {
            if walk::look(self.root.as_fd(), Path::new(path), OFlag::empty()) == Err(Errno::ELOOP) {
                return Err(RootfsError::Protect { path: path.into(), cause: Errno::ELOOP.into() });
            }
        }
        Ok(())
    }

    /// Makes the process's working directory where it is missing, as other runtimes do: the guest cannot, once
    /// the root is read-only. What stands in the way is told when the process starts.
    fn make_working_directory(&self, spec: &Spec) {
        let Some(process) = spec.process() else { return };
        let mounts = spec.mounts().iter().flatten();
        let mut of_the_guest = mounts.filter(|mount| !is_bind(mount)).map(Mount::destination);
        if !of_the_guest.any(|destination| process.cwd().starts_with(destination)) {
            let _ = walk::find_or_make(self.root.as_fd(), process.cwd(), Leaf::Directory);
        }
    }

    fn place(&self, index: usize, destination: &Path, leaf: Leaf) -> Result<OwnedFd, RootfsError> {
        walk::find_or_make(self.root.as_fd(), destination, leaf).map_err(|errno| RootfsError::MountPoint {
            index,
            destination: destination.into(),
            cause: errno.into(),
        })
    }
}

/// The mounts of the tree at `root` that the guest has to know of: those below volumes, and those that are restricted.
/// Of too many, those below volumes are found by the guest when somebody enters them; so are those whose names are no
/// text.
pub fn host_mounts(root: &Path) -> Result<Vec<HostMount>, Cause> {
    Ok(noteworthy(root, &mountinfo::read()?))
}

fn noteworthy(root: &Path, mounts: &[MountEntry]) -> Vec<HostMount> {
    let inside: Vec<(&Path, u64)> = mounts
        .iter()
        .filter_map(|mount| Some((mount.mount_point.strip_prefix(root).ok()?, restrictions(&mount.options))))
        .filter(|(path, _)| !path.as_os_str().is_empty())
        .collect();
    // Of several at one place the last is seen.
    let last: HashMap<&Path, u64> = inside.iter().copied().collect();
    let is_nested = |path: &Path| path.ancestors().skip(1).any(|above| last.contains_key(above));
    let mut places = HashSet::new();
    let mut noteworthy: Vec<_> = inside
        .iter()
        .map(|(path, _)| *path)
        .filter(|path| places.insert(*path))
        .map(|path| (path, last.get(path).copied().unwrap_or(0)))
        .filter(|(path, attributes)| *attributes != 0 || is_nested(path))
        .filter_map(|(path, attributes)| Some(HostMount { path: path.to_str()?.to_owned(), attributes }))
        .collect();
    // What is restricted must not be forgotten.
    noteworthy.sort_by_key(|mount| mount.attributes == 0);
    noteworthy.truncate(MOST_HOST_MOUNTS);
    noteworthy
}

/// What the options of a mount forbid. The host forbids to write by itself; it is for the guest to show.
fn restrictions(options: &[String]) -> u64 {
    let attribute = |option: &String| match option.as_str() {
        "ro" => libc::MOUNT_ATTR_RDONLY,
        "nosuid" => libc::MOUNT_ATTR_NOSUID,
        "nodev" => libc::MOUNT_ATTR_NODEV,
        "noexec" => libc::MOUNT_ATTR_NOEXEC,
        "nosymfollow" => libc::MOUNT_ATTR_NOSYMFOLLOW,
        _ => 0,
    };
    options.iter().map(attribute).fold(0, |all, attribute| all | attribute)
}

/// Stops mounts of this namespace from appearing in the host's; unmounts on the host are still followed, so that
/// no container keeps a disk of the host busy.
fn isolate() -> Result<(), RootfsError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(|errno| RootfsError::Isolate(errno.into()))
}

/// A root must be a mount; this also keeps its flags apart from those of the file system that it lies on.
fn bind_on_itself(path: &Path) -> Result<OwnedFd, Errno> {
    let tree = sys::clone_tree(path, true)?;
    let place = nix::fcntl::open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    sys::attach(tree.as_fd(), place.as_fd())?;
    Ok(tree)
}

fn restrict(tree: &OwnedFd, options: &MountOptions) -> Result<(), Errno> {
    sys::set_attributes(tree.as_fd(), options.recursive_attributes, true)?;
    sys::set_attributes(tree.as_fd(), options.attributes, false)?;
    for propagation in &options.propagation {
        sys::set_propagation(tree.as_fd(), *propagation)?;
    }
    Ok(())
}

fn kind(descriptor: &OwnedFd) -> Result<Leaf, Errno> {
    let mode = SFlag::from_bits_truncate(fstat(descriptor)?.st_mode) & SFlag::S_IFMT;
    Ok(if mode == SFlag::S_IFDIR { Leaf::Directory } else { Leaf::File })
}

fn in_words(leaf: Leaf) -> &'static str {
    match leaf {
        Leaf::Directory => "a directory",
        Leaf::File => "a file",
    }
}
