//! A container's folder under the root: its files, their atomic replacement, and the lock.
//!
//! The lock is a `flock` of the folder itself, so that it disappears with the folder and needs no file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What `create` recorded.
pub const RECORD: &str = "state.json";
/// The monitor's [`Step`](super::Step), as one letter.
pub const STEP: &str = "step";
/// Why the monitor failed, in words.
pub const FAILURE: &str = "failure";
/// When each phase of the start was reached.
pub const TIMELINE: &str = "timeline.json";
/// Exists when `start` may have connected interfaces of the engine's network namespace.
pub const NETWORK: &str = "network";
/// Where the monitor listens.
pub const SOCKET: &str = "control.sock";

/// An open folder of a container.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    handle: File,
}

/// The folder's lock; given back when dropped.
#[derive(Debug)]
pub struct Lock {
    _flock: Flock<File>,
}

impl Folder {
    /// Makes the folder, which must not exist yet, and the root above it.
    pub fn create(root: &Path, name: &str) -> io::Result<Folder> {
        DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        let path = root.join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Folder::open(root, name)
    }

    /// Opens an existing folder.
    pub fn open(root: &Path, name: &str) -> io::Result<Folder> {
        let path = root.join(name);
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&path)?;
        Ok(Folder { path, handle })
    }

    /// The monitor's view: an inherited handle of the folder, which stays good when the path means something
    /// else after the change of the root.
    pub fn from_handle(handle: File) -> Folder {
        let path = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
        Folder { path, handle }
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the lock. An error of kind `NotFound` means that the folder was removed meanwhile.
    pub fn lock(&self) -> io::Result<Lock> {
        let flock =
            Flock::lock(self.handle.try_clone()?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        // Its number of links is 0 once it was removed, even when a new one has its name.
        if self.handle.metadata()?.nlink() == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Lock { _flock: flock })
    }

    /// Takes the lock if nobody has it.
    pub fn try_lock(&self) -> io::Result<Option<Lock>> {
        // Another opening than this folder's own: an unlocked copy of that would give up a lock it already has.
        let handle = self.reopen()?;
        match Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
            Ok(_) if self.handle.metadata()?.nlink() == 0 => Err(io::ErrorKind::NotFound.into()),
            Ok(flock) => Ok(Some(Lock { _flock: flock })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    fn reopen(&self) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.handle.as_raw_fd());
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)
    }

    /// Replaces a file of the folder so that a reader sees the old or the new content, whole.
    pub fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = format!(".{name}.{}", std::process::id());
        let result = self.write_new(&temporary, content).and_then(|()| {
            nix::fcntl::renameat(&self.handle, temporary.as_str(), &self.handle, name)
                .map_err(io::Error::from)
        });
        if result.is_err() {
            let _ = nix::unistd::unlinkat(
                &self.handle,
                temporary.as_str(),
                nix::unistd::UnlinkatFlags::NoRemoveDir,
            );
        }
        result
    }

    /// Opens a file of the folder whose first byte is to change in place. It is made with that byte, so that the
    /// changes need no space.
    pub fn open_byte(&self, name: &str, byte: u8) -> io::Result<File> {
        use nix::fcntl::OFlag;
        self.write(name, &[byte])?;
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        Ok(File::from(nix::fcntl::openat(&self.handle, name, flags, nix::sys::stat::Mode::empty())?))
    }

    fn write_new(&self, name: &str, content: &[u8]) -> io::Result<()> {
        use nix::fcntl::OFlag;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        let file = nix::fcntl::openat(&self.handle, name, flags, mode)?;
        File::from(file).write_all(content)
    }

    /// Like [`write`](Self::write), as JSON.
    pub fn write_json<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        self.write(name, &serde_json::to_vec(value)?)
    }

    /// Reads a file of the folder; none when there is no such file.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(name)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Like [`read`](Self::read), as JSON.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        self.read(name)?.map(|content| serde_json::from_slice(&content).map_err(io::Error::from)).transpose()
    }

    /// A path to the control socket that is short whatever the root is: a socket's path holds 108 bytes, and
    /// those that containerd chooses come close.
    pub fn socket_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", self.handle.as_raw_fd()))
    }

    /// Binds the control socket.
    pub fn listen(&self) -> io::Result<OwnedFd> {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(&self.socket_path())?)?;
        listen(&listener, Backlog::new(64)?)?;
        Ok(listener)
    }

    /// Removes the folder with everything in it; another one that has its name by now stays.
    pub fn remove(&self) -> io::Result<()> {
        let ours = self.handle.metadata()?;
        let is_another = |found: fs::Metadata| (found.dev(), found.ino()) != (ours.dev(), ours.ino());
        if fs::symlink_metadata(&self.path).is_ok_and(is_another) {
            return Ok(());
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        folder.write("x", b"a longer content").unwrap();
        folder.write("x", b"short").unwrap();
        assert_eq!(folder.read("x").unwrap().unwrap(), b"short");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(folder.read("absent").unwrap(), None);
    }

    #[test]
    fn a_byte_changes_in_place() {
        use std::os::unix::fs::FileExt;
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        let file = folder.open_byte("x", b'a').unwrap();
        file.write_all_at(b"b", 0).unwrap();
        assert_eq!(folder.read("x").unwrap().unwrap(), b"b");
    }

    #[test]
    fn a_folder_is_made_once() {
        let root = tempfile::tempdir().unwrap();
        let _first = Folder::create(root.path(), "c").unwrap();
        let error = Folder::create(root.path(), "c").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_removed_folder_cannot_be_locked() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        drop(folder.lock().unwrap());
        folder.remove().unwrap();
        let next = Folder::create(root.path(), "c").unwrap();
        folder.remove().unwrap();
        assert!(next.path().is_dir(), "the name is another's now");
        assert_eq!(folder.lock().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_lock_excludes_a_second_opening() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), "c").unwrap();
        let lock = folder.lock().unwrap();
        let second = Folder::open(root.path(), "c").unwrap();
        assert!(second.try_lock().unwrap().is_none());
        assert!(folder.try_lock().unwrap().is_none(), "it does not count as one's own");
        assert!(second.try_lock().unwrap().is_none(), "and the attempt has not given it up");
        drop(lock);
        drop(second.try_lock().unwrap().unwrap());
        second.lock().unwrap();
    }

    #[test]
    fn the_socket_works_below_a_very_long_path() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), &"long".repeat(50)).unwrap();
        let _listener = folder.listen().unwrap();
        assert!(folder.path().join(SOCKET).exists());
    }
}
