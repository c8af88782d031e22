//! Paths inside a directory tree that is not trusted.
//!
//! An image may hold symbolic links that point anywhere. Every lookup here treats the tree's root as `/`
//! (`RESOLVE_IN_ROOT` of `openat2(2)`), so no path can leave it, whatever the links say. What has to be made is
//! made step by step ([`Walk`]), for the kernel does not tell where a link that dangles leads.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{self, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{self, Mode, SFlag};

/// A directory that is the root of all lookups.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// The tree below the directory at `path`.
    pub fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { root: fcntl::open(path, flags, Mode::empty())? })
    }

    /// The tree below a directory that is open already.
    pub fn of(root: OwnedFd) -> Self {
        Self { root }
    }

    /// Finds what lies at `path`, following symbolic links.
    pub fn find(&self, path: &Path) -> nix::Result<OwnedFd> {
        // A mount of the host below the served root is an automount in the guest. Opening its place does not
        // trigger it, unless as a directory.
        match self.open_with(path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOTDIR) => self.open_with(path, OFlag::O_PATH),
            found => found,
        }
    }

    /// Finds what lies at `path`; where that is a symbolic link, the link itself.
    pub fn find_no_follow(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_with(path, OFlag::O_PATH | OFlag::O_NOFOLLOW)
    }

    /// Opens what lies at `path`.
    pub fn open_with(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        self.open_how(path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC))
    }

    /// The directory at `path`, made with its parents where it is missing.
    pub fn make_directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.find_or_make(path, Leaf::Directory)
    }

    /// The file at `path`, made empty, with its parent directories, where it is missing.
    pub fn make_file(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.find_or_make(path, Leaf::File)
    }

    fn find_or_make(&self, path: &Path, leaf: Leaf) -> nix::Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::ENOENT) => Walk::new(self.root.as_fd(), path).finish(leaf),
            found => found,
        }
    }

    fn open_how(&self, path: &Path, how: OpenHow) -> nix::Result<OwnedFd> {
        fcntl::openat2(&self.root, path, how.resolve(ResolveFlag::RESOLVE_IN_ROOT))
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// What a missing last component is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaf {
    Directory,
    File,
}

/// As many links as the kernel follows in one lookup.
const MAX_LINKS: usize = 40;

/// A way from the root of a tree, one name at a time. No link is followed by the kernel, and `..` goes back to the
/// descriptor that the way came from.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    /// What was opened on the way; the nearest is last.
    opened: Vec<OwnedFd>,
    left: VecDeque<OsString>,
    links: usize,
}

impl<'a> Walk<'a> {
    fn new(root: BorrowedFd<'a>, path: &Path) -> Self {
        let mut walk = Self { root, opened: Vec::new(), left: VecDeque::new(), links: 0 };
        walk.queue(path);
        walk
    }

    /// Goes to the end, and makes what is missing on the way.
    fn finish(mut self, leaf: Leaf) -> nix::Result<OwnedFd> {
        while let Some(name) = self.left.pop_front() {
            if name == ".." {
                self.opened.pop();
                continue;
            }
            let made_as = if self.left.is_empty() { leaf } else { Leaf::Directory };
            let next = self.open_or_make(&name, made_as)?;
            self.step(next, &name)?;
        }
        match self.opened.pop() {
            Some(found) => Ok(found),
            None => open(self.root, OsStr::new("."), OFlag::O_DIRECTORY),
        }
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.opened.last().map_or(self.root, AsFd::as_fd)
    }

    /// Puts the components of a path, or of a link's target, before what is left to do.
    fn queue(&mut self, path: &Path) {
        for component in path.components().rev() {
            match component {
                Component::Normal(name) => self.left.push_front(name.into()),
                Component::ParentDir => self.left.push_front("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
    }

    fn step(&mut self, next: OwnedFd, name: &OsStr) -> nix::Result<()> {
        match kind(&next)? {
            SFlag::S_IFLNK => {
                self.links += 1;
                if self.links > MAX_LINKS {
                    return Err(Errno::ELOOP);
                }
                let target = fcntl::readlinkat(self.here(), name)?;
                let target = Path::new(&target);
                if target.is_absolute() {
                    self.opened.clear();
                }
                self.queue(target);
            }
            SFlag::S_IFDIR => self.opened.push(next),
            _ if self.left.is_empty() => self.opened.push(next),
            _ => return Err(Errno::ENOTDIR),
        }
        Ok(())
    }

    fn open_or_make(&self, name: &OsStr, made_as: Leaf) -> nix::Result<OwnedFd> {
        match self.open(name) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let made = match made_as {
            Leaf::Directory => stat::mkdirat(self.here(), name, Mode::from_bits_truncate(0o755)),
            Leaf::File => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
                fcntl::openat(self.here(), name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
        };
        match made {
            // Somebody was faster, with whatever it is: the next step looks.
            Ok(()) | Err(Errno::EEXIST) => self.open(name),
            Err(errno) => Err(errno),
        }
    }

    /// As [`Tree::find`]: as a directory first, which triggers an automount.
    fn open(&self, name: &OsStr) -> nix::Result<OwnedFd> {
        match open(self.here(), name, OFlag::O_DIRECTORY) {
            Err(Errno::ENOTDIR | Errno::ELOOP) => open(self.here(), name, OFlag::empty()),
            found => found,
        }
    }
}

fn open(parent: BorrowedFd<'_>, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    let flags = flags | OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    fcntl::openat(parent, name, flags, Mode::empty())
}

/// Whether a descriptor is one of a directory.
pub fn is_directory(descriptor: impl AsFd) -> nix::Result<bool> {
    Ok(kind(descriptor)? == SFlag::S_IFDIR)
}

/// The type of the file behind a descriptor.
pub fn kind(descriptor: impl AsFd) -> nix::Result<SFlag> {
    let mode = stat::fstat(descriptor)?.st_mode;
    Ok(SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::open(directory.path()).unwrap();
        (directory, tree)
    }

    #[test]
    fn absolute_links_stay_inside() {
        let (directory, tree) = tree();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::fs::write(directory.path().join("etc/inside"), "").unwrap();
        symlink("/etc", directory.path().join("link")).unwrap();
        assert!(tree.find(Path::new("/link/inside")).is_ok());
        // On the machine that runs this test there is such a file, but not in the tree.
        assert_eq!(tree.find(Path::new("/link/passwd")).unwrap_err(), Errno::ENOENT);
    }

    #[test]
    fn parents_stay_inside() {
        let (directory, tree) = tree();
        tree.make_directory(Path::new("/../../a/./b/../c")).unwrap();
        assert!(directory.path().join("a/c").is_dir());
    }

    #[test]
    fn missing_files_are_made_with_their_parents() {
        let (directory, tree) = tree();
        tree.make_file(Path::new("/run/deep/socket")).unwrap();
        tree.make_file(Path::new("/run/deep/socket")).unwrap();
        assert!(directory.path().join("run/deep/socket").is_file());
        assert!(is_directory(tree.find(Path::new("/run/deep")).unwrap()).unwrap());
    }

    #[test]
    fn the_target_of_a_dangling_link_is_made() {
        let (directory, tree) = tree();
        std::fs::create_dir(directory.path().join("var")).unwrap();
        symlink("/run", directory.path().join("var/run")).unwrap();
        tree.make_directory(Path::new("/var/run/secrets")).unwrap();
        assert!(directory.path().join("run/secrets").is_dir());
        symlink("../../../stub/resolv.conf", directory.path().join("resolv.conf")).unwrap();
        tree.make_file(Path::new("/resolv.conf")).unwrap();
        assert!(directory.path().join("stub/resolv.conf").is_file());
    }

    #[test]
    fn loops_and_files_in_the_way_are_refused() {
        let (directory, tree) = tree();
        symlink("loop", directory.path().join("loop")).unwrap();
        assert_eq!(tree.make_directory(Path::new("/loop/x")).unwrap_err(), Errno::ELOOP);
        // One that only making a directory on the way leads into.
        symlink("new/../again", directory.path().join("again")).unwrap();
        assert_eq!(tree.make_directory(Path::new("/again")).unwrap_err(), Errno::ELOOP);
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert_eq!(tree.make_directory(Path::new("/file/x")).unwrap_err(), Errno::ENOTDIR);
    }

    #[test]
    fn a_link_itself_can_be_told() {
        let (directory, tree) = tree();
        symlink("/", directory.path().join("proc")).unwrap();
        let found = tree.find_no_follow(Path::new("/proc")).unwrap();
        assert_eq!(kind(found).unwrap(), SFlag::S_IFLNK);
    }
}
