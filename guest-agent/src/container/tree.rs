//! Paths inside a directory tree that is not trusted.
//!
//! An image may hold symbolic links that point anywhere. Every lookup here treats the tree's root as `/`
//! (`RESOLVE_IN_ROOT` of `openat2(2)`), so no path can leave it, whatever the links say.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

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
        let mut parent = self.find(Path::new("/"))?;
        let mut so_far = PathBuf::from("/");
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
                Component::ParentDir => so_far.push(".."),
                Component::Normal(name) => so_far.push(name),
            }
            parent = match self.find(&so_far) {
                Err(Errno::ENOENT) => {
                    let name = so_far.file_name().ok_or(Errno::ENOENT)?;
                    stat::mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
                    self.find(&so_far)?
                }
                found => found?,
            };
        }
        Ok(parent)
    }

    /// The file at `path`, made empty, with its parent directories, where it is missing.
    pub fn make_file(&self, path: &Path) -> nix::Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        let how = OpenHow::new()
            .flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC)
            .mode(Mode::from_bits_truncate(0o644));
        self.open_how(path, how)?;
        self.find(path)
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
    fn a_link_itself_can_be_told() {
        let (directory, tree) = tree();
        symlink("/", directory.path().join("proc")).unwrap();
        let found = tree.find_no_follow(Path::new("/proc")).unwrap();
        assert_eq!(kind(found).unwrap(), SFlag::S_IFLNK);
    }
}
