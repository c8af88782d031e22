//! Finding, and making, places in the container's file tree without ever leaving it.
//!
//! The tree belongs to the container: its symlinks are hostile, and another container may rename directories of a
//! shared volume at the same time. So each step opens one name below a directory that is held open, never follows
//! a link in the kernel, and `..` goes back to the descriptor one came from.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};

/// As many as the kernel follows in one lookup.
const MAX_LINKS: usize = 40;

/// What a missing last component is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaf {
    /// A directory.
    Directory,
    /// An empty file, for a file to be mounted on.
    File,
}

/// Opens (`O_PATH`) what the container would find at a path, and makes what is missing on the way.
pub(super) fn find_or_make(root: BorrowedFd<'_>, path: &Path, leaf: Leaf) -> Result<OwnedFd, Errno> {
    let mut walk = Walk::new(root, path);
    while walk.advance(Some(leaf))? {}
    walk.opened.pop().map_or_else(|| dup(root), |opened| Ok(opened.descriptor))
}

/// A lookup, step by step.
pub(super) struct Walk<'a> {
    root: BorrowedFd<'a>,
    // The way from the root to here; what is nearest is last.
    opened: Vec<Opened>,
    left: VecDeque<OsString>,
    links: usize,
}

struct Opened {
    name: OsString,
    descriptor: OwnedFd,
}

impl<'a> Walk<'a> {
    /// A lookup that is about to begin.
    pub(super) fn new(root: BorrowedFd<'a>, path: &Path) -> Self {
        let mut walk = Walk { root, opened: Vec::new(), left: VecDeque::new(), links: 0 };
        walk.queue(path.as_os_str());
        walk
    }

    /// Takes one step, if one is left. What is missing is made, or without `leaf` an error.
    pub(super) fn advance(&mut self, leaf: Option<Leaf>) -> Result<bool, Errno> {
        let Some(name) = self.left.pop_front() else { return Ok(false) };
        if name == ".." {
            self.opened.pop();
            return Ok(true);
        }
        let next = match leaf {
            None => self.open(&name)?,
            Some(leaf) if self.left.is_empty() => self.open_or_make(&name, leaf)?,
            Some(_) => self.open_or_make(&name, Leaf::Directory)?,
        };
        self.step(next, name)?;
        Ok(true)
    }

    /// What was reached (`O_PATH`).
    pub(super) fn here(&self) -> BorrowedFd<'_> {
        self.opened.last().map_or(self.root, |opened| opened.descriptor.as_fd())
    }

    /// Whether the way that is left turns back somewhere.
    pub(super) fn turns_back(&self) -> bool {
        self.left.iter().any(|name| name == "..")
    }

    /// Where in the tree the next step leads, unless to a link: a path without links.
    pub(super) fn next_path(&self) -> PathBuf {
        let way = self.opened.iter().map(|opened| &opened.name);
        let next = self.left.front().filter(|name| *name != "..");
        way.chain(next).fold(PathBuf::from("/"), |path, name| path.join(name))
    }

    /// Puts the components of a path, or of a link's target, before what is left to do.
    fn queue(&mut self, path: &OsStr) {
        for component in Path::new(path).components().rev() {
            match component {
                Component::Normal(name) => self.left.push_front(name.into()),
                Component::ParentDir => self.left.push_front("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
    }

    fn step(&mut self, next: OwnedFd, name: OsString) -> Result<(), Errno> {
        match SFlag::from_bits_truncate(fstat(&next)?.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFLNK => {
                self.links += 1;
                if self.links > MAX_LINKS {
                    return Err(Errno::ELOOP);
                }
                let target = readlinkat(self.here(), name.as_os_str())?;
                if Path::new(&target).is_absolute() {
                    self.opened.clear();
                }
                self.queue(&target);
            }
            SFlag::S_IFDIR => self.opened.push(Opened { name, descriptor: next }),
            _ if self.left.is_empty() => self.opened.push(Opened { name, descriptor: next }),
            _ => return Err(Errno::ENOTDIR),
        }
        Ok(())
    }

    fn open_or_make(&self, name: &OsStr, made_as: Leaf) -> Result<OwnedFd, Errno> {
        match self.open(name) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let made = match made_as {
            Leaf::Directory => mkdirat(self.here(), name, Mode::from_bits_truncate(0o755)),
            Leaf::File => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
                openat(self.here(), name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
        };
        match made {
            // Somebody was faster, with whatever it is: the next step looks.
            Ok(()) | Err(Errno::EEXIST) => self.open(name),
            Err(errno) => Err(errno),
        }
    }

    fn open(&self, name: &OsStr) -> Result<OwnedFd, Errno> {
        openat(self.here(), name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
    }
}

/// The type of the file at a path below `root`; links of the tree are followed by the kernel, which stays inside.
pub(super) fn look(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<SFlag, Errno> {
    let flags = flags | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let found = openat2(root, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT))?;
    Ok(SFlag::from_bits_truncate(fstat(found)?.st_mode) & SFlag::S_IFMT)
}

/// Whether the last component of a path below `root` is a link.
pub(super) fn is_link(root: BorrowedFd<'_>, path: &Path) -> bool {
    look(root, path, OFlag::O_NOFOLLOW) == Ok(SFlag::S_IFLNK)
}

fn dup(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    descriptor
        .try_clone_to_owned()
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A container's root with a file outside that nothing may reach.
    struct Tree {
        directory: tempfile::TempDir,
        root: OwnedFd,
    }

    impl Tree {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("root");
            fs::create_dir(&path).unwrap();
            let root = fs::File::open(&path).unwrap().into();
            Self { directory, root }
        }

        fn path(&self, below: &str) -> PathBuf {
            self.directory.path().join("root").join(below)
        }

        fn find(&self, path: &str, leaf: Leaf) -> Result<PathBuf, Errno> {
            let found = find_or_make(self.root.as_fd(), Path::new(path), leaf)?;
            Ok(fs::read_link(super::super::sys::through(found.as_fd())).unwrap())
        }
    }

    #[test]
    fn what_is_missing_is_made() {
        let tree = Tree::new();
        assert_eq!(tree.find("/a/b/c", Leaf::Directory).unwrap(), tree.path("a/b/c"));
        assert!(tree.path("a/b/c").is_dir());
        assert_eq!(tree.find("/a/f", Leaf::File).unwrap(), tree.path("a/f"));
        assert!(tree.path("a/f").is_file());
        assert_eq!(tree.find("/", Leaf::Directory).unwrap(), tree.path("").canonicalize().unwrap());
    }

    #[test]
    fn links_stay_inside() {
        let tree = Tree::new();
        symlink("/etc", tree.path("absolute")).unwrap();
        symlink("../../../../etc", tree.path("relative")).unwrap();
        for link in ["absolute", "relative"] {
            let found = tree.find(&format!("/{link}/passwd"), Leaf::File).unwrap();
            assert_eq!(found, tree.path("etc/passwd"));
        }
        assert_eq!(fs::read(tree.path("etc/passwd")).unwrap(), b"");
    }

    #[test]
    fn dots_stay_inside() {
        let tree = Tree::new();
        assert_eq!(tree.find("/../../x", Leaf::Directory).unwrap(), tree.path("x"));
        fs::create_dir_all(tree.path("deep/er")).unwrap();
        symlink("deep/er", tree.path("link")).unwrap();
        assert_eq!(tree.find("/link/../y", Leaf::Directory).unwrap(), tree.path("deep/y"));
    }

    #[test]
    fn the_target_of_a_dangling_link_is_made() {
        let tree = Tree::new();
        fs::create_dir(tree.path("var")).unwrap();
        symlink("/run", tree.path("var/run")).unwrap();
        assert_eq!(tree.find("/var/run/secrets", Leaf::Directory).unwrap(), tree.path("run/secrets"));
        symlink("stub/resolv.conf", tree.path("resolv.conf")).unwrap();
        assert_eq!(tree.find("/resolv.conf", Leaf::File).unwrap(), tree.path("stub/resolv.conf"));
    }

    #[test]
    fn loops_and_files_in_the_way_are_refused() {
        let tree = Tree::new();
        symlink("loop", tree.path("loop")).unwrap();
        assert_eq!(tree.find("/loop/x", Leaf::Directory), Err(Errno::ELOOP));
        fs::write(tree.path("file"), "").unwrap();
        assert_eq!(tree.find("/file/x", Leaf::Directory), Err(Errno::ENOTDIR));
    }
}
