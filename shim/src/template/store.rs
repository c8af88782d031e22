//! The folder of all templates: one folder each, named by its key, with a file of the state and one of the memory.
//!
//! Whoever could write there could take over every container. So folder and files belong to the user that rvm runs as,
//! nobody else may even read them, and nothing is opened by way of a symbolic link.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::Mode;

use super::file::{self, Record};
use super::key::FileIdentity;
use super::{Key, TemplateError, is_absent};

const STATE: &str = "state";
const MEMORY: &str = "memory";
/// Held by whoever makes a template or removes one.
const LOCK: &str = ".lock";
/// The folder of a template that is being made. There is one at most, since it takes the lock.
const UNFINISHED: &str = ".unfinished";
/// When a template could last not be made, for whatever reason.
const FAILED: &str = ".failed";
/// How long nobody tries again by itself.
const AFTER_FAILURE: Duration = Duration::from_secs(600);
/// How much all templates may take on disk.
const MOST_BYTES: u64 = 2 << 30;
/// Nobody but the owner.
const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The folder of all templates.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

/// A template that can be used.
#[derive(Debug)]
pub struct Template {
    /// The machine.
    pub record: Record,
    /// Its memory.
    pub memory: File,
    /// Its folder.
    kept: Kept,
}

/// The folder of something in the store.
#[derive(Debug)]
pub struct Kept {
    folder: File,
}

/// What is told of a template.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its key.
    pub key: Key,
    /// Bytes on disk.
    pub size: u64,
    /// When it was made.
    pub created: SystemTime,
    /// When a machine went on from it last.
    pub used: SystemTime,
    /// Its machine's vCPUs and memory, if it can be used.
    pub shape: Option<(u8, u64)>,
}

/// The exclusive right to change the store.
#[derive(Debug)]
pub struct Lock {
    _flock: Flock<File>,
}

impl Template {
    /// Has nobody go on from it any more: something is wrong with it.
    pub fn discard(&self) {
        self.kept.discard();
    }
}

impl Kept {
    /// Has nobody find it any more.
    pub fn discard(&self) {
        let flags = nix::unistd::UnlinkatFlags::NoRemoveDir;
        let _ = nix::unistd::unlinkat(&self.folder, STATE, flags);
    }

    /// Notes that it was used. Those that have not been for the longest time go first.
    pub(super) fn touch(&self) {
        let _ = self.folder.set_modified(SystemTime::now());
    }
}

impl Store {
    /// The store in this folder, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Store {
        Store { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a template. None if there is no such template; an error if there is one that cannot be used.
    pub fn find(&self, key: Key) -> Result<Option<Template>, TemplateError> {
        let Some(store) = self.open()? else { return Ok(None) };
        let found = open_template(&store, &self.path, &key.to_string())?;
        found.iter().for_each(|template| template.kept.touch());
        Ok(found)
    }

    /// Whether there is a template, usable or not.
    pub fn has(&self, key: Key) -> bool {
        self.has_named(&key.to_string())
    }

    pub(super) fn has_named(&self, name: &str) -> bool {
        self.path.join(name).join(STATE).symlink_metadata().is_ok()
    }

    /// All templates, by their keys.
    pub fn list(&self) -> Result<Vec<Listed>, TemplateError> {
        let Some(store) = self.open()? else { return Ok(Vec::new()) };
        let mut keys: Vec<Key> = self.names()?.filter_map(|name| name.parse().ok()).collect();
        keys.sort();
        Ok(keys.into_iter().filter_map(|key| self.describe(&store, key)).collect())
    }

    fn describe(&self, store: &File, key: Key) -> Option<Listed> {
        let path = self.path.join(key.to_string());
        let folder = path.symlink_metadata().ok()?;
        let files = [STATE, MEMORY].map(|name| path.join(name).symlink_metadata().ok());
        let size = files.iter().flatten().map(|file| file.blocks() * 512).sum();
        let made = files[0].as_ref().and_then(|file| file.modified().ok());
        let used = folder.modified().ok()?;
        let template = open_template(store, &self.path, &key.to_string()).ok().flatten();
        let machine = template.and_then(|template| template.record.machine().ok());
        let shape = machine.map(|machine| (machine.vcpus(), machine.memory()));
        Some(Listed { key, size, created: made.unwrap_or(used), used, shape })
    }

    /// The names of all that is in the folder, which has to be there.
    pub(super) fn names(&self) -> Result<impl Iterator<Item = String>, TemplateError> {
        let entries = fs::read_dir(&self.path)
            .map_err(TemplateError::system(format!("cannot list {}", self.path.display())))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()))
    }

    /// Removes a template. Machines that went on from it keep what they use.
    pub fn remove(&self, key: Key) -> Result<(), TemplateError> {
        match self.remove_named(&key.to_string())? {
            true => Ok(()),
            false => Err(TemplateError::Absent(key.to_string())),
        }
    }

    /// Removes a folder, and tells whether there was one.
    pub(super) fn remove_named(&self, name: &str) -> Result<bool, TemplateError> {
        let path = self.path.join(name);
        match remove_folder(&path) {
            Ok(()) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(TemplateError::system(format!("cannot remove {}", path.display()))(error)),
        }
    }

    /// The right to change the store, as soon as nobody else has it. With `wait` unset: if nobody has it.
    pub fn lock(&self, wait: bool) -> Result<Option<Lock>, TemplateError> {
        let failed = || format!("cannot make {}", self.path.display());
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(&self.path)
            .map_err(TemplateError::system(failed()))?;
        let Some(store) = self.open()? else {
            return Err(TemplateError::unfit(&self.path, "it has vanished"));
        };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = openat(&store, LOCK, flags, Mode::from_bits_truncate(FILE_MODE));
        let file = file.map(File::from).map_err(TemplateError::system(format!("cannot make {LOCK}")))?;
        let how = if wait { FlockArg::LockExclusive } else { FlockArg::LockExclusiveNonblock };
        match Flock::lock(file, how) {
            Ok(flock) => Ok(Some(Lock { _flock: flock })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(TemplateError::system("cannot lock the templates")(errno)),
        }
    }

    /// Notes that no template could be made.
    pub fn note_failure(&self) {
        let path = self.path.join(FAILED);
        let _ = fs::remove_file(&path);
        // Where not even that can be written, the next start tries again.
        let _ = new_file(&path);
    }

    /// Whether it is no use to try again so soon.
    pub fn has_failed_lately(&self) -> bool {
        let failed = self.path.join(FAILED).symlink_metadata().and_then(|file| file.modified());
        failed.is_ok_and(|at| at.elapsed().is_ok_and(|ago| ago < AFTER_FAILURE))
    }

    /// Begins a template: makes its folder, with an empty file for the memory.
    pub fn begin(&self, _lock: &Lock) -> Result<Unfinished, TemplateError> {
        let path = self.path.join(UNFINISHED);
        // Of one that was killed while it made another.
        let _ = remove_folder(&path);
        let failed = |error| TemplateError::system(format!("cannot make {}", path.display()))(error);
        DirBuilder::new().mode(FOLDER_MODE).create(&path).map_err(failed)?;
        let memory = new_file(&path.join(MEMORY)).map_err(failed)?;
        Ok(Unfinished { memory, path, store: self.clone(), finished: false })
    }

    /// Removes templates until the others take no more than they may, those first that have not been used for the
    /// longest time, and `kept` never.
    fn shrink_to(&self, kept: Key, most: u64) -> Result<(), TemplateError> {
        let mut all = self.list()?;
        all.sort_by_key(|listed| (listed.key != kept, std::cmp::Reverse(listed.used)));
        let mut total: u64 = 0;
        for listed in all {
            total = total.saturating_add(listed.size);
            if total > most && listed.key != kept {
                self.remove(listed.key)?;
            }
        }
        Ok(())
    }

    pub(super) fn open(&self) -> Result<Option<File>, TemplateError> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let store = match OpenOptions::new().read(true).custom_flags(flags).open(&self.path) {
            Ok(store) => store,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => {
                return Err(TemplateError::system(format!("cannot open {}", self.path.display()))(error));
            }
        };
        check_owner(&store, &self.path)?;
        Ok(Some(store))
    }
}

/// A template that is being made. It vanishes unless it is finished.
#[derive(Debug)]
pub struct Unfinished {
    /// The file for its memory.
    pub memory: File,
    path: PathBuf,
    store: Store,
    finished: bool,
}

impl Unfinished {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the state; the memory is written.
    pub fn write(&self, record: &Record) -> Result<(), TemplateError> {
        self.write_state(&file::seal(record))
    }

    pub(super) fn write_state(&self, state: &[u8]) -> Result<(), TemplateError> {
        let write = || -> io::Result<()> {
            // A host that loses its power must not find a state without its memory.
            self.memory.sync_all()?;
            let path = self.path.join(STATE);
            // There is an earlier one when more is known by now.
            let _ = fs::remove_file(&path);
            let mut file = new_file(&path)?;
            file.write_all(state)?;
            file.sync_all()
        };
        write().map_err(TemplateError::system(format!("cannot write {}", self.path.display())))
    }

    /// Opens it as it is so far.
    pub fn open(&self) -> Result<Template, TemplateError> {
        let Some(store) = self.store.open()? else {
            return Err(TemplateError::unfit(self.store.path(), "it has vanished"));
        };
        let found = open_template(&store, self.store.path(), UNFINISHED)?;
        found.ok_or_else(|| TemplateError::unfit(&self.path, "it has vanished"))
    }

    /// From now on it is there for others.
    pub fn finish(self, key: Key) -> Result<(), TemplateError> {
        let store = self.store.clone();
        self.finish_as(&key.to_string())?;
        store.shrink_to(key, MOST_BYTES)
    }

    pub(super) fn finish_as(mut self, name: &str) -> Result<(), TemplateError> {
        let place = self.store.path.join(name);
        // One that could not be used.
        let _ = remove_folder(&place);
        let moved = fs::rename(&self.path, &place);
        moved.map_err(TemplateError::system(format!("cannot make {}", place.display())))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = remove_folder(&self.path);
        }
    }
}

/// Opens the template in a folder of the store.
fn open_template(store: &File, path: &Path, name: &str) -> Result<Option<Template>, TemplateError> {
    let Some(Entry { kept, mut state, memory }) = open_entry(store, path, name)? else { return Ok(None) };
    let record: Record = file::read(&mut state)?;
    check_identity(&memory, &path.join(name), &record.memory)?;
    Ok(Some(Template { record, memory, kept }))
}

/// The files in a folder of the store.
pub(super) struct Entry {
    pub(super) kept: Kept,
    pub(super) state: File,
    pub(super) memory: File,
}

/// Opens the files in a folder of the store.
pub(super) fn open_entry(store: &File, path: &Path, name: &str) -> Result<Option<Entry>, TemplateError> {
    let path = path.join(name);
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let Some(folder) = open_at(store, name, flags | OFlag::O_DIRECTORY, &path)? else { return Ok(None) };
    check_owner(&folder, &path)?;
    let open = |name: &str| {
        // No FIFO is waited for.
        let file = open_at(&folder, name, flags | OFlag::O_NONBLOCK, &path.join(name))?;
        file.map(|file| check_file(&file, &path.join(name)).map(|()| file)).transpose()
    };
    // Whoever has removed one of them has removed it all.
    let (Some(state), Some(memory)) = (open(STATE)?, open(MEMORY)?) else { return Ok(None) };
    Ok(Some(Entry { kept: Kept { folder }, state, memory }))
}

/// The memory in a folder is what was written there, if that is what its state says of it.
pub(super) fn check_identity(
    memory: &File,
    path: &Path,
    expected: &FileIdentity,
) -> Result<(), TemplateError> {
    let found = memory.metadata().map_err(TemplateError::system("cannot look at its memory"))?;
    match FileIdentity::of(&found) == *expected {
        true => Ok(()),
        false => Err(TemplateError::unfit(path.join(MEMORY), "it has been changed or copied")),
    }
}

fn open_at(folder: &File, name: &str, flags: OFlag, path: &Path) -> Result<Option<File>, TemplateError> {
    match openat(folder, name, flags, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(nix::errno::Errno::ENOENT) => Ok(None),
        Err(nix::errno::Errno::ELOOP | nix::errno::Errno::ENOTDIR) => {
            Err(TemplateError::unfit(path, "it is a symbolic link"))
        }
        Err(errno) => Err(TemplateError::system(format!("cannot open {}", path.display()))(errno)),
    }
}

/// A file or folder that nobody but this user can have written.
fn check_owner(file: &File, path: &Path) -> Result<(), TemplateError> {
    let found =
        file.metadata().map_err(TemplateError::system(format!("cannot look at {}", path.display())))?;
    if found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(TemplateError::unfit(path, "it belongs to another user"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(TemplateError::unfit(path, "others than its owner have rights to it"));
    }
    Ok(())
}

fn check_file(file: &File, path: &Path) -> Result<(), TemplateError> {
    check_owner(file, path)?;
    let found =
        file.metadata().map_err(TemplateError::system(format!("cannot look at {}", path.display())))?;
    match found.is_file() && found.nlink() == 1 {
        true => Ok(()),
        false => Err(TemplateError::unfit(path, "it is no file of its own")),
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(FILE_MODE).open(path)
}

/// Removes the folder of a template: the state first, so that a half of it is none.
fn remove_folder(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return fs::remove_file(path);
    }
    let _ = fs::remove_file(path.join(STATE));
    fs::remove_dir_all(path)
}

#[cfg(test)]
mod tests;
