//! The container's root, made by the child in its new namespaces.
//!
//! Everything is arranged below a mount point of the agent's, with every path looked up inside the new root,
//! and entered last: so that the agent's own `/proc` and `/dev` are at hand to the end, and nothing is ever
//! looked up by way of files of the image.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{self, AtFlags, OFlag};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::{self, CloneFlags};
use nix::sys::stat::{self, Mode, SFlag};
use nix::unistd;
use oci_spec::runtime::{Linux, Spec};

use super::mounts::{Mounter, reopen_directory};
use super::options::propagation_flag;
use super::tree::{self, Tree};
use super::{Container, devices, sysctl};
use crate::error::{Context, Result, other};
use crate::process::terminal::Terminal;
use crate::sys::mount::{self, Change, FileSystem, attribute};
use crate::sys::process::set_domain_name;

/// Makes the root and enters it. Where the process wants a terminal, returns it.
pub fn build(container: &Container, wants_terminal: bool) -> Result<Option<Terminal>> {
    let spec = &container.spec;
    sched::unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "making the cgroup namespace")?;
    set_names(spec)?;
    let linux = spec.linux().as_ref();
    if let Some(values) = linux.and_then(|linux| linux.sysctl().as_ref()) {
        sysctl::write_others(values)?;
    }
    let root = attach_root(container)?;
    let terminal = furnish(container, &root, wants_terminal)?;
    if let Some(linux) = linux {
        protect(linux, &root)?;
    }
    if spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) {
        mount::change(&root, Change::attributes(attribute::RDONLY, 0), false)
            .context(|| "making the root file system read-only")?;
    }
    enter(&root)?;
    if let Some(propagation) = linux.and_then(|linux| linux.rootfs_propagation().as_deref()) {
        set_root_propagation(propagation)?;
    }
    Ok(terminal)
}

fn set_names(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname() {
        unistd::sethostname(name).context(|| format!("setting the host name {name:?}"))?;
    }
    if let Some(name) = spec.domainname() {
        set_domain_name(name).context(|| format!("setting the domain name {name:?}"))?;
    }
    Ok(())
}

/// Puts a copy of the pristine mount at the place of the root.
fn attach_root(container: &Container) -> Result<Tree> {
    let settings = container.settings();
    let none = None::<&str>;
    // Nothing that is mounted from here on may reach the agent's namespace.
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context(|| "making the mounts private")?;
    let what = || "mounting the container's root";
    let pristine = Tree::open(&settings.pristine).context(what)?;
    let copy = mount::clone_mount(&pristine, true).context(what)?;
    let place = Tree::open(&settings.root).context(what)?;
    mount::attach(&copy, &place).context(what)?;
    Ok(Tree::of(copy))
}

fn furnish(container: &Container, root: &Tree, wants_terminal: bool) -> Result<Option<Terminal>> {
    let spec = &container.spec;
    let pristine = Tree::open(&container.settings().pristine).context(|| "opening the served root")?;
    let umask = stat::umask(Mode::empty());
    let sysfs = container.sysfs.as_ref().map(OwnedFd::try_clone).transpose();
    let sysfs = sysfs.context(|| "taking the container's sysfs")?;
    // To look is to mount: a copy of a volume has those with it that are there. One may have gone since. All of them come
    // first, for what is mounted below a restricted one later is restricted as well.
    let host_mounts = container.host_mounts.iter();
    let found: Vec<_> =
        host_mounts.filter_map(|mount| Some((mount, pristine.find(Path::new(&mount.path)).ok()?))).collect();
    for (mount, found) in &found {
        restrict(found, mount.attributes).context(|| format!("restricting the mount {:?}", mount.path))?;
    }
    let mut mounter = Mounter::new(&pristine, root, sysfs);
    for entry in spec.mounts().iter().flatten() {
        mounter.mount(entry)?;
    }
    devices::make_all(spec, root)?;
    let terminal = match wants_terminal {
        true => Some(Terminal::open_with_console(root)?),
        false => None,
    };
    stat::umask(umask);
    let directory = container.process()?.cwd();
    root.make_directory(directory)
        .context(|| format!("making the working directory {}", directory.display()))?;
    mounter.finish()?;
    Ok(terminal)
}

/// Restricts a mount of the host as the host has it. A single file is mounted on itself for that.
fn restrict(found: &OwnedFd, attributes: u64) -> nix::Result<()> {
    let change = Change::attributes(attributes, 0);
    if attributes == 0 || tree::is_directory(found)? {
        return mount::change(found, change, false);
    }
    let copy = mount::clone_mount(found, false)?;
    mount::change(&copy, change, false)?;
    mount::attach(&copy, found)
}

fn protect(linux: &Linux, root: &Tree) -> Result<()> {
    for path in linux.readonly_paths().iter().flatten() {
        protect_path(root, Path::new(path)).context(|| format!("write-protecting {path}"))?;
    }
    let null = Tree::open(Path::new("/dev"))
        .and_then(|dev| dev.find(Path::new("null")))
        .context(|| "opening the guest's /dev/null")?;
    for path in linux.masked_paths().iter().flatten() {
        mask_path(root, Path::new(path), &null).context(|| format!("masking {path}"))?;
    }
    Ok(())
}

fn protect_path(root: &Tree, path: &Path) -> nix::Result<()> {
    let Some(place) = existing(root, path)? else { return Ok(()) };
    let mount = mount::clone_mount(&place, true)?;
    mount::change(&mount, Change::attributes(attribute::RDONLY, 0), true)?;
    mount::attach(mount, place)
}

/// Covers a directory with an empty one, anything else with the guest's own `/dev/null`. The container's
/// `/dev/null` is never used: who controls the image could have put something else in its place.
fn mask_path(root: &Tree, path: &Path, null: &OwnedFd) -> nix::Result<()> {
    let Some(place) = existing(root, path)? else { return Ok(()) };
    let cover = if tree::is_directory(&place)? {
        let empty = FileSystem::open("tmpfs")?;
        empty.set("mode", Some("755"))?;
        empty.set("nr_inodes", Some("1"))?;
        let mount = empty.mount()?;
        mount::change(&mount, Change::attributes(attribute::RDONLY, 0), false)?;
        mount
    } else {
        mount::clone_mount(null, false)?
    };
    mount::attach(cover, place)
}

/// Not every kernel has every file that engines name.
fn existing(root: &Tree, path: &Path) -> nix::Result<Option<OwnedFd>> {
    match root.find(path) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Exchanges the root of the mount namespace and lets go of the old one with all that is mounted in it.
fn enter(root: &Tree) -> Result<()> {
    let what = || "entering the container's root";
    unistd::fchdir(root).context(what)?;
    // The old root comes to lie on top of the new one, from where it is taken off at once (pivot_root(2)).
    unistd::pivot_root(".", ".").context(what)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).context(|| "letting go of the guest's root")?;
    unistd::chdir("/").context(what)
}

fn set_root_propagation(name: &str) -> Result<()> {
    let (flag, recursive) = match name.strip_prefix('r') {
        Some(flag) => (flag, true),
        None => (name, false),
    };
    let flag = propagation_flag(flag)
        .ok_or_else(|| other(format!("the root propagation {name:?} is none that exists")))?;
    let root = Tree::open(Path::new("/")).context(|| "opening the root")?;
    mount::change(root, Change::propagation(flag.bits()), recursive)
        .context(|| format!("setting the root propagation {name:?}"))
}

/// Copies what is at `path` of the root into the file system that will cover it.
pub fn copy_up(root: &Tree, path: &Path, target: &OwnedFd) -> Result<()> {
    let what = || "copying the covered directory";
    let source = reopen_directory(root, path).context(what)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let target = fcntl::openat(target, ".", flags, Mode::empty()).context(what)?;
    copy_directory(&source, &target).context(what)
}

fn copy_directory(source: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let mut directory = nix::dir::Dir::openat(
        source,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    for entry in directory.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(source, target, name)?;
        }
    }
    Ok(())
}

fn copy_entry(source: &OwnedFd, target: &OwnedFd, name: &std::ffi::CStr) -> io::Result<()> {
    let found = stat::fstatat(source, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_bits_truncate(found.st_mode);
    let kind = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits());
    let nofollow = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if kind == SFlag::S_IFDIR {
        stat::mkdirat(target, name, mode)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | nofollow;
        let (from, to) = (
            fcntl::openat(source, name, flags, Mode::empty())?,
            fcntl::openat(target, name, flags, Mode::empty())?,
        );
        copy_directory(&from, &to)?;
    } else if kind == SFlag::S_IFREG {
        let mut from = File::from(fcntl::openat(source, name, OFlag::O_RDONLY | nofollow, Mode::empty())?);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | nofollow;
        let mut to = File::from(fcntl::openat(target, name, flags, mode)?);
        io::copy(&mut from, &mut to)?;
    } else if kind == SFlag::S_IFLNK {
        let link = fcntl::readlinkat(source, name)?;
        unistd::symlinkat(link.as_os_str(), target, name)?;
    } else {
        stat::mknodat(target, name, kind, mode, found.st_rdev)?;
    }
    let (user, group) = (found.st_uid.into(), found.st_gid.into());
    unistd::fchownat(target, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        // After the owner: changing that takes set-user-ID bits away.
        stat::fchmodat(target, name, mode, stat::FchmodatFlags::FollowSymlink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_copied_directory_keeps_kinds_and_modes() {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(source.path().join("sub")).unwrap();
        std::fs::write(source.path().join("sub/file"), "content").unwrap();
        std::fs::set_permissions(source.path().join("sub/file"), PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("sub/file", source.path().join("link")).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let open = |path: &Path| fcntl::open(path, flags, Mode::empty()).unwrap();
        copy_directory(&open(source.path()), &open(target.path())).unwrap();
        assert_eq!(std::fs::read_to_string(target.path().join("link")).unwrap(), "content");
        let copied = std::fs::metadata(target.path().join("sub/file")).unwrap();
        assert_eq!(copied.mode() & 0o7777, 0o640);
    }
}
