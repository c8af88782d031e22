//! The cache of everything that takes long to make: the guest kernel, the test host's image, the built artefacts.
//!
//! It lies outside the work tree, so that `cargo clean` or a fresh clone costs nothing. An entry is a directory named
//! after a hash of all that went into it; it appears by one rename, so whoever finds it finds it whole.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// An entry that nobody asks for so long belongs to a recipe of the past.
const UNUSED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The root of the cache: `$RVM_CACHE`, else `$XDG_CACHE_HOME/rvm`, else `~/.cache/rvm`.
pub fn cache_dir() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    locate(variable("RVM_CACHE"), variable("XDG_CACHE_HOME"), variable("HOME"))
}

/// Where the built rvm lies as it would be installed: `bin/rvm`, `lib/rvm/{vmlinux,rvm-agent}`, and the test programs.
pub fn artefacts_dir() -> PathBuf {
    cache_dir().join("artefacts")
}

fn locate(own: Option<PathBuf>, xdg: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    own.or_else(|| xdg.filter(|path| path.is_absolute()).map(|path| path.join("rvm")))
        .unwrap_or_else(|| home.unwrap_or_else(|| PathBuf::from("/root")).join(".cache/rvm"))
}

/// The name of a cache entry: a hash of everything that decides what is in it.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// A key of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in one named ingredient. Lengths are hashed too, so neighbouring ingredients cannot run together.
    pub fn with(mut self, name: &str, content: impl AsRef<[u8]>) -> Self {
        for part in [name.as_bytes(), content.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Sixteen hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.clone().finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Takes the lock file at `path`, waiting for whoever holds it; dropping it lets go.
pub fn lock(path: &Path) -> Result<Flock<File>> {
    Flock::lock(lock_file(path)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io::Error::from(errno))
        .with_context(|| format!("cannot lock {}", path.display()))
}

/// As [`lock`], without waiting: nothing where somebody holds it.
pub fn try_lock(path: &Path) -> Result<Option<Flock<File>>> {
    match Flock::lock(lock_file(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => {
            Err(io::Error::from(errno)).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

fn lock_file(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock file {}", path.display()))
}

/// Returns the directory `entry`, made by `build` when it does not exist yet.
///
/// `build` gets a temporary directory beside it, which takes the entry's name only once all of it is there. Two
/// processes that want the same entry wait for each other, so the work is done once.
pub fn build_once(entry: &Path, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    if entry.is_dir() {
        mark_used(entry);
        return Ok(entry.to_path_buf());
    }
    let _lock = lock(&sibling(entry, ".lock"))?;
    if entry.is_dir() {
        return Ok(entry.to_path_buf());
    }
    let partial = sibling(entry, ".partial");
    remove(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    build(&partial)?;
    fs::rename(&partial, entry).with_context(|| format!("cannot move the result to {}", entry.display()))?;
    Ok(entry.to_path_buf())
}

/// Removes the entries of `directory` that [`build_once`] has not returned for a week: those of older recipes.
pub fn remove_unused(directory: &Path) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        let unused = data.modified()?.elapsed().unwrap_or_default() > UNUSED;
        if data.is_dir() && unused {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Notes in an entry's time of change that it is in use. Not being allowed to is no reason to fail.
fn mark_used(entry: &Path) {
    let _ = File::open(entry).and_then(|directory| directory.set_modified(SystemTime::now()));
}

/// Removes a directory tree that may not be there.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn sibling(entry: &Path, suffix: &str) -> PathBuf {
    let mut name = entry.as_os_str().as_bytes().to_vec();
    name.extend_from_slice(suffix.as_bytes());
    PathBuf::from(std::ffi::OsStr::from_bytes(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_variable_wins_then_xdg_then_home() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(locate(path("/a"), path("/b"), path("/c")), PathBuf::from("/a"));
        assert_eq!(locate(None, path("/b"), path("/c")), PathBuf::from("/b/rvm"));
        assert_eq!(locate(None, path("relative"), path("/c")), PathBuf::from("/c/.cache/rvm"));
    }

    #[test]
    fn a_key_depends_on_every_byte_and_on_where_ingredients_end() {
        let key = Key::new().with("a", "bc");
        assert_eq!(key.hex(), Key::new().with("a", "bc").hex());
        assert_ne!(key.hex(), Key::new().with("ab", "c").hex());
        assert_ne!(key.hex(), Key::new().with("a", "bd").hex());
        assert_eq!(key.hex().len(), 16);
    }

    #[test]
    fn an_entry_is_built_once_and_a_failed_build_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        let entry = dir.path().join("entry");
        assert!(build_once(&entry, |_| anyhow::bail!("no")).is_err());
        assert!(!entry.exists());
        build_once(&entry, |partial| Ok(fs::write(partial.join("file"), "x")?)).unwrap();
        build_once(&entry, |_| panic!("built twice")).unwrap();
        assert_eq!(fs::read(entry.join("file")).unwrap(), b"x");
    }

    #[test]
    fn only_what_nobody_asks_for_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * UNUSED;
        let entry = |name: &str| {
            let path = build_once(&dir.path().join(name), |_| Ok(())).unwrap();
            File::open(&path).unwrap().set_modified(old).unwrap();
            path
        };
        let (unused, used) = (entry("a"), entry("b"));
        build_once(&used, |_| panic!("built twice")).unwrap();
        remove_unused(dir.path()).unwrap();
        assert!(!unused.exists() && used.exists());
    }
}
