//! The inodes that the guest refers to.
//!
//! While an inode is *pinned* it is open with `O_PATH`: it can be reached whatever happens to its names, and the host
//! cannot give its number to another file. But each pinned inode takes a file descriptor and some 2 KiB of the
//! host's kernel that cannot be reclaimed, and a guest that walks a large tree knows all of it for as long as it
//! has memory. So only so many are pinned at a time; of the others the table knows where they were seen last, see
//! [`super::pins`].

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::identity::{Identity, Link, Version};
use super::pins::Node;

/// The number of the tree's root in the protocol.
pub(super) const ROOT: u64 = 1;
/// How many pinned inodes are looked at to find one that can be released.
const MAX_SEARCH: usize = 64;

/// A name in a directory that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The number of the directory.
    pub(super) parent: u64,
    /// The name in it.
    pub(super) name: CString,
}

/// An inode that the guest refers to.
#[derive(Debug)]
pub(super) struct Inode {
    /// Its number in the protocol.
    pub(super) id: u64,
    kind: u32,
    mount: u64,
    identity: Mutex<Identity>,
    opened: Mutex<Option<Box<Version>>>,
    hold: Mutex<Hold>,
}

/// How an inode can be reached.
#[derive(Debug)]
struct Hold {
    /// The inode, opened with `O_PATH`, while it is pinned.
    file: Option<Arc<OwnedFd>>,
    /// Where it was seen last, if that was anywhere.
    place: Option<Place>,
    /// Whether it was used since somebody looked.
    used: bool,
}

impl Inode {
    /// What it is on the host.
    pub(super) fn identity(&self) -> Identity {
        lock(&self.identity).clone()
    }

    /// Its type, as the upper bits of a mode.
    pub(super) fn kind(&self) -> u32 {
        self.kind
    }

    /// The mount that it lies on.
    pub(super) fn mount(&self) -> u64 {
        self.mount
    }

    /// Whether it lies on another mount than `other`.
    pub(super) fn crosses_mount(&self, other: &Inode) -> bool {
        self.mount != other.mount
    }

    /// Whether the file has not changed since this was called last. A version that could be one of several is
    /// none.
    pub(super) fn unchanged_since_last_open(&self, version: Option<Version>) -> bool {
        let version = version.map(Box::new);
        std::mem::replace(&mut *lock(&self.opened), version.clone()).is_some_and(|old| Some(old) == version)
    }

    /// The inode, opened with `O_PATH`, if it is pinned. It stays pinned at least as long as this is kept.
    pub(super) fn pinned(&self) -> Option<Arc<OwnedFd>> {
        let mut hold = lock(&self.hold);
        hold.used = true;
        hold.file.clone()
    }

    /// Where it was seen last.
    pub(super) fn place(&self) -> Option<Place> {
        lock(&self.hold).place.clone()
    }

    /// Remembers where it was seen.
    fn seen_at(&self, parent: u64, name: &CStr) {
        let mut hold = lock(&self.hold);
        if hold.place.as_ref().is_none_or(|place| place.parent != parent || *place.name != *name) {
            hold.place = Some(Place { parent, name: name.to_owned() });
        }
    }

    /// It has lost the name by which it could be found.
    pub(super) fn lose_place(&self) {
        lock(&self.hold).place = None;
    }

    /// Whether nobody uses it now or did lately, so that it can be released. Asked again, it was not lately.
    fn is_idle(&self) -> bool {
        let mut hold = lock(&self.hold);
        let in_use = hold.file.as_ref().is_none_or(|file| Arc::strong_count(file) > 1);
        !std::mem::take(&mut hold.used) && !in_use && hold.place.is_some()
    }
}

#[derive(Debug)]
struct Known {
    inode: Arc<Inode>,
    lookups: u64,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, Known>,
    /// Numbers by hashes of identities, which are much smaller than identities. Whoever looks one up compares.
    by_identity: HashMap<u64, u64>,
    hasher: RandomState,
    /// Those whose identity has a link in it.
    by_link: HashMap<Arc<Link>, u64>,
    last_id: u64,
    /// Files that were pinned, in the order in which they shall be released. Some are gone already.
    files: VecDeque<u64>,
    /// The same for directories, which come last: files are found by them.
    directories: VecDeque<u64>,
    pinned: usize,
}

/// The table of inodes.
#[derive(Debug)]
pub(super) struct Inodes {
    table: Mutex<Table>,
    limits: Limits,
}

/// How many inodes there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// So many may be known, pinned or not. Only the guest can make them fewer.
    pub(super) known: usize,
    /// Beyond so many pinned ones, inodes are released that nobody uses.
    pub(super) idle: usize,
    /// So many more, if all are in use.
    pub(super) in_use: usize,
}

impl Inodes {
    /// A table with nothing but a root.
    pub(super) fn new(root: OwnedFd, identity: Identity, limits: Limits) -> Inodes {
        let inodes = Inodes { table: Mutex::default(), limits };
        inodes.table().insert(root, identity);
        inodes
    }

    /// The inode of a number that the guest was told.
    pub(super) fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        self.table().by_id.get(&id).map(|known| known.inode.clone()).ok_or(Errno::ESTALE)
    }

    /// An inode that is known and that the guest is told of once more.
    pub(super) fn remember_known(&self, identity: &Identity) -> Option<Arc<Inode>> {
        self.table().count_lookup(identity)
    }

    /// The inode that the guest is told of now, which it will forget as often as it was told.
    pub(super) fn remember(&self, file: OwnedFd, identity: Identity) -> Result<Node, Errno> {
        let mut table = self.table();
        if let Some(inode) = table.count_lookup(&identity) {
            let file = table.pin(&inode, file);
            return Ok(Node { inode, file });
        }
        let Limits { known, idle, in_use } = self.limits;
        if table.by_id.len() >= known || table.pinned >= idle + in_use {
            return Err(Errno::ENFILE);
        }
        Ok(table.insert(file, identity))
    }

    /// The inode that is known by one of a file's names alone.
    pub(super) fn linked(&self, link: &Link) -> Option<Arc<Inode>> {
        let table = self.table();
        let id = table.by_link.get(link)?;
        table.by_id.get(id).map(|known| known.inode.clone())
    }

    /// The guest's inode turned out to be something else on the host by now, and still the same file.
    pub(super) fn rename(&self, inode: &Inode, identity: Identity) {
        let mut table = self.table();
        if !table.by_id.contains_key(&inode.id) || table.find(&identity).is_some() {
            return;
        }
        let old = std::mem::replace(&mut *lock(&inode.identity), identity.clone());
        table.remove_identity(&old, inode.id);
        table.insert_identity(identity, inode.id);
    }

    /// The inode that is known by this identity.
    pub(super) fn find(&self, identity: &Identity) -> Option<Arc<Inode>> {
        self.table().find(identity).map(|known| known.inode.clone())
    }

    /// Whether one more may be pinned that cannot be released.
    pub(super) fn has_room(&self) -> bool {
        let Limits { idle, in_use, .. } = self.limits;
        self.table().pinned < idle + in_use
    }

    /// Remembers where an inode was seen, if the guest knows it.
    pub(super) fn seen_at(&self, identity: &Identity, parent: u64, name: &CStr) {
        let table = self.table();
        if let Some(known) = table.find(identity).filter(|known| known.inode.id != ROOT) {
            known.inode.seen_at(parent, name);
        }
    }

    /// Pins an inode again; returns what it is reached by.
    pub(super) fn pin(&self, inode: &Inode, file: OwnedFd) -> Arc<OwnedFd> {
        self.table().pin(inode, file)
    }

    /// An inode that should be released, if too many are pinned. [`Inodes::release`] has to follow.
    pub(super) fn superfluous(&self) -> Option<Arc<Inode>> {
        let mut table = self.table();
        if table.pinned <= self.limits.idle {
            return None;
        }
        let Table { by_id, files, directories, .. } = &mut *table;
        find_idle(by_id, files).or_else(|| find_idle(by_id, directories))
    }

    /// Releases a superfluous inode, if it can be found again. Otherwise it stays until it is seen somewhere.
    pub(super) fn release(&self, inode: &Inode, can_be_found: bool) {
        let mut table = self.table();
        let mut hold = lock(&inode.hold);
        // Since it was chosen it may have been forgotten, or come to use again.
        let Some(file) = &hold.file else { return };
        // Its name may have been taken away since it was found by it.
        let can_be_found = can_be_found && hold.place.is_some();
        if can_be_found && Arc::strong_count(file) == 1 {
            hold.file = None;
            table.pinned -= 1;
            return;
        }
        if !can_be_found {
            hold.place = None;
        }
        drop(hold);
        table.enqueue(inode);
    }

    /// The guest forgets an inode, so many times. The root is never forgotten.
    pub(super) fn forget(&self, id: u64, times: u64) {
        let mut table = self.table();
        let Some(known) = table.by_id.get_mut(&id).filter(|_| id != ROOT) else { return };
        known.lookups = known.lookups.saturating_sub(times);
        let pin = if known.lookups == 0 { table.remove(id) } else { None };
        // Nobody waits for it to be closed, which removes a file that has lost its names, and can take long.
        drop(table);
        drop(pin);
    }

    /// Forgets all but the root.
    pub(super) fn clear(&self) {
        let mut table = self.table();
        let all: Vec<u64> = table.by_id.keys().copied().filter(|&id| id != ROOT).collect();
        let pins: Vec<_> = all.into_iter().filter_map(|id| table.remove(id)).collect();
        drop(table);
        drop(pins);
    }

    /// How many inodes there are, and how many of them are pinned.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let table = self.table();
        (table.by_id.len(), table.pinned)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Table {
    fn find(&self, identity: &Identity) -> Option<&Known> {
        let id = self.by_identity.get(&self.hasher.hash_one(identity))?;
        self.by_id.get(id).filter(|known| *lock(&known.inode.identity) == *identity)
    }

    fn count_lookup(&mut self, identity: &Identity) -> Option<Arc<Inode>> {
        let id = self.find(identity)?.inode.id;
        let known = self.by_id.get_mut(&id)?;
        known.lookups = known.lookups.saturating_add(1);
        Some(known.inode.clone())
    }

    /// Adds an inode under a number that was never used, so that a guest which confuses forgotten inodes with
    /// present ones confuses only itself.
    fn insert(&mut self, file: OwnedFd, identity: Identity) -> Node {
        self.last_id += 1;
        let id = self.last_id;
        let hold = Mutex::new(Hold { file: None, place: None, used: true });
        let (kind, mount) = (identity.kind, identity.mount);
        self.insert_identity(identity.clone(), id);
        let (identity, opened) = (Mutex::new(identity), Mutex::default());
        let inode = Arc::new(Inode { id, kind, mount, identity, opened, hold });
        self.by_id.insert(id, Known { inode: inode.clone(), lookups: 1 });
        let file = self.pin(&inode, file);
        Node { inode, file }
    }

    /// Pins an inode, unless it was forgotten meanwhile: then only who uses it keeps it.
    fn pin(&mut self, inode: &Inode, file: OwnedFd) -> Arc<OwnedFd> {
        if !self.by_id.contains_key(&inode.id) {
            return Arc::new(file);
        }
        let mut hold = lock(&inode.hold);
        hold.used = true;
        if let Some(file) = &hold.file {
            return file.clone();
        }
        let file = Arc::new(file);
        hold.file = Some(file.clone());
        drop(hold);
        self.pinned += 1;
        self.enqueue(inode);
        file
    }

    /// Lines an inode up for its release.
    fn enqueue(&mut self, inode: &Inode) {
        let order = if inode.kind() == libc::S_IFDIR { &mut self.directories } else { &mut self.files };
        // What was forgotten is left in the order, until that makes up the most of it.
        if order.len() > MAX_SEARCH + 2 * self.pinned {
            order.retain(|id| self.by_id.contains_key(id));
        }
        order.push_back(inode.id);
    }

    /// Removes an inode; returns what it was pinned by, to be closed when the table is not locked any more.
    fn remove(&mut self, id: u64) -> Option<Arc<OwnedFd>> {
        let known = self.by_id.remove(&id)?;
        let pin = lock(&known.inode.hold).file.take();
        self.pinned -= usize::from(pin.is_some());
        let identity = known.inode.identity();
        self.remove_identity(&identity, id);
        pin
    }

    fn insert_identity(&mut self, identity: Identity, id: u64) {
        if let Some(link) = &identity.link {
            self.by_link.insert(link.clone(), id);
        }
        // Of two identities with the same hash the older one is as if it were new, when it is seen again.
        self.by_identity.insert(self.hasher.hash_one(&identity), id);
    }

    fn remove_identity(&mut self, identity: &Identity, id: u64) {
        let hash = self.hasher.hash_one(identity);
        if self.by_identity.get(&hash) == Some(&id) {
            self.by_identity.remove(&hash);
        }
        if let Some(link) = identity.link.as_ref().filter(|link| self.by_link.get(*link) == Some(&id)) {
            self.by_link.remove(link);
        }
    }
}

/// Takes an inode that nobody uses from among the first of an order, and moves others that it looked at to the end.
fn find_idle(by_id: &HashMap<u64, Known>, order: &mut VecDeque<u64>) -> Option<Arc<Inode>> {
    for _ in 0..MAX_SEARCH {
        let id = order.pop_front()?;
        let Some(Known { inode, .. }) = by_id.get(&id) else { continue };
        if lock(&inode.hold).file.is_none() {
            continue;
        }
        if inode.is_idle() {
            return Some(inode.clone());
        }
        order.push_back(id);
    }
    None
}

/// What these locks guard is valid between any two statements, so a panic elsewhere does not spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_inode_takes_as_much_memory_as_the_limit_is_made_for() {
        // With two counters of its own, what the allocator adds, and a name of usual length.
        let inode = size_of::<Inode>() + 2 * size_of::<usize>() + 8 + 32;
        // Tables of 2^18 places, each with one byte more, for three quarters as many inodes.
        let tables = (size_of::<(u64, Known)>() + size_of::<(u64, u64)>() + 2) * 4 / 3;
        assert!(inode + tables <= 280, "{inode} {tables}");
    }
}
