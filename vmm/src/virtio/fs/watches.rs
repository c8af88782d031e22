//! What the guest need not ask for again, because the server would hear of a change: the names in directories, that
//! names are missing, and the attributes of directories.
//!
//! A directory is watched with inotify from when the guest looks into it. Each change in it, whoever makes it, becomes a
//! notice to the guest, see [`super::notices`]. The order makes it sound: first there is the watch, then the
//! version is read, then the directory; so a change is either in the answer or has a notice with a later version. What the
//! guest changes itself comes back as an event, too. It is heard before the version is read, and ends no answer but
//! older ones.
//!
//! Files are not watched. A process of the host that has one mapped changes it without an event, and one that knows it
//! by another name does so in another directory.
//!
//! Watches are scarce. The directory that has been watched longest loses its watch to the next one, and what the
//! guest knows of it becomes invalid. Where the host has no more to give, validity is short.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::Mode;

use super::inodes::lock;
use super::notices::{Notices, Subject};
use super::pins::Node;
use super::server::{FileServer, descriptor_path};

/// The most directories that are watched for one guest. Each takes about 1 KiB of the host's kernel, with its inode.
const MAX_WATCHES: usize = 8192;
/// The part of what a user may watch in all (`fs.inotify.max_user_watches`) that one guest may have.
const SHARE: usize = 16;
/// What a user may watch on hosts that do not say.
const USUAL_LIMIT: usize = 8192;
/// So many more queues of events (`fs.inotify.max_user_instances`) must be left to the user's other programs.
const RESERVED_QUEUES: usize = 16;
/// How often events are read before something else gets its turn.
const MAX_READS: usize = 64;
const USER_LIMIT: &str = "/proc/sys/fs/inotify/max_user_watches";

/// A name comes, goes, or means something else.
const OF_NAMES: AddWatchFlags =
    AddWatchFlags::IN_CREATE.union(AddWatchFlags::IN_DELETE).union(AddWatchFlags::IN_MOVE);
/// The directory itself changes.
const OF_ITSELF: AddWatchFlags =
    AddWatchFlags::IN_ATTRIB.union(AddWatchFlags::IN_DELETE_SELF).union(AddWatchFlags::IN_MOVE_SELF);

/// The directories that are watched for the guest.
#[derive(Debug)]
pub(super) struct Watches {
    queue: Option<Queue>,
    limit: usize,
    registry: Mutex<Registry>,
}

/// Where changes are heard of.
#[derive(Debug)]
struct Queue {
    inotify: Inotify,
    /// Has something urgent to tell when anything is mounted or unmounted.
    mounts: OwnedFd,
    /// Held while events are read and become notices.
    hearing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Registry {
    /// The directories of a watch: more than one where the same is mounted at several places.
    by_watch: HashMap<WatchDescriptor, Vec<u64>>,
    by_id: HashMap<u64, WatchDescriptor>,
    /// In the order in which they lose their watch. Some have none any more.
    order: VecDeque<u64>,
}

/// How many directories one guest may watch here.
pub(super) fn limit() -> usize {
    let user = std::fs::read_to_string(USER_LIMIT).ok().and_then(|text| text.trim().parse().ok());
    (user.unwrap_or(USUAL_LIMIT) / SHARE).min(MAX_WATCHES)
}

impl Watches {
    /// No directory is watched yet. `descriptors` is the process's /proc/self/fd.
    pub(super) fn new(descriptors: &OwnedFd, limit: usize) -> Watches {
        Watches { queue: Queue::new(descriptors).ok(), limit, registry: Mutex::default() }
    }

    /// Whether a directory is watched.
    fn is_watched(&self, id: u64) -> bool {
        lock(&self.registry).by_id.contains_key(&id)
    }

    /// Watches a directory. The thread must have [entered](super::thread::enter).
    fn watch(&self, node: &Node, notices: &Notices) -> Result<(), Errno> {
        let mut registry = lock(&self.registry);
        let id = node.inode.id;
        if registry.by_id.contains_key(&id) {
            return Ok(());
        }
        let queue = self.queue.as_ref().ok_or(Errno::ENOSPC)?;
        while registry.by_id.len() >= self.limit {
            let oldest = registry.order.pop_front().ok_or(Errno::ENOSPC)?;
            registry.remove(oldest, queue);
            lost(oldest, notices);
        }
        let flags = OF_NAMES | OF_ITSELF | AddWatchFlags::IN_ONLYDIR;
        let watch = queue.inotify.add_watch(descriptor_path(&node.file).as_c_str(), flags)?;
        registry.add(id, watch);
        Ok(())
    }

    /// Watches a directory no more, which the guest has forgotten.
    pub(super) fn forget(&self, id: u64) {
        if let Some(queue) = &self.queue {
            lock(&self.registry).remove(id, queue);
        }
    }

    /// Watches nothing.
    pub(super) fn clear(&self) {
        let Some(queue) = &self.queue else { return };
        let mut registry = lock(&self.registry);
        let all: Vec<u64> = registry.by_id.keys().copied().collect();
        all.into_iter().for_each(|id| registry.remove(id, queue));
        registry.order.clear();
    }

    /// Makes notices of all that has happened.
    fn hear(&self, notices: &Notices) {
        let Some(queue) = &self.queue else { return };
        let _hearing = lock(&queue.hearing);
        for _ in 0..MAX_READS {
            match queue.inotify.read_events() {
                Ok(events) => events.iter().for_each(|event| self.take(event, notices)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // It cannot be told what was missed.
                Err(_) => return notices.give(Subject::Everything),
            }
        }
    }

    fn take(&self, event: &InotifyEvent, notices: &Notices) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return notices.give(Subject::Everything);
        }
        let mut registry = lock(&self.registry);
        let ids = registry.by_watch.get(&event.wd).cloned().unwrap_or_default();
        for id in ids {
            let name = event.name.as_ref().map(|name| name.as_bytes());
            if let Some(name) = name.filter(|_| event.mask.intersects(OF_NAMES)) {
                notices.give(Subject::Name(id, name));
                notices.give(Subject::Contents(id));
            } else if event.mask.intersects(AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_UNMOUNT) {
                registry.take(id);
                lost(id, notices);
            } else if name.is_none() {
                notices.give(Subject::Access(id));
                notices.give(Subject::Contents(id));
            }
        }
    }

    /// How many directories are watched.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        lock(&self.registry).by_id.len()
    }
}

/// A directory has lost its watch.
fn lost(id: u64, notices: &Notices) {
    for subject in [Subject::Names(id), Subject::Access(id), Subject::Contents(id)] {
        notices.give(subject);
    }
}

impl Registry {
    fn add(&mut self, id: u64, watch: WatchDescriptor) {
        self.by_watch.entry(watch).or_default().push(id);
        self.by_id.insert(id, watch);
        // What was forgotten is left in the order, until that makes up the most of it.
        if self.order.len() > 64 + 2 * self.by_id.len() {
            self.order.retain(|id| self.by_id.contains_key(id));
        }
        self.order.push_back(id);
    }

    /// Takes the watch away from a directory, and from the host if nobody else has it.
    fn remove(&mut self, id: u64, queue: &Queue) {
        if let Some(watch) = self.take(id) {
            // It fails when the directory is gone, and the watch with it.
            let _ = queue.inotify.rm_watch(watch);
        }
    }

    /// Takes the watch away from a directory; returns it if nobody else has it.
    fn take(&mut self, id: u64) -> Option<WatchDescriptor> {
        let watch = self.by_id.remove(&id)?;
        let ids = self.by_watch.get_mut(&watch)?;
        ids.retain(|other| *other != id);
        if !ids.is_empty() {
            return None;
        }
        self.by_watch.remove(&watch);
        Some(watch)
    }
}

impl Queue {
    fn new(descriptors: &OwnedFd) -> Result<Queue, Errno> {
        let open = || Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let inotify = open()?;
        // They end with this statement.
        (0..RESERVED_QUEUES).map(|_| open()).collect::<Result<Vec<_>, _>>()?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mounts = openat(descriptors, c"../mountinfo", flags, Mode::empty())?;
        Ok(Queue { inotify, mounts, hearing: Mutex::default() })
    }
}

/// How long the guest may use an answer without asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    /// Whole seconds, or a version with a mark.
    pub(super) seconds: u64,
    /// The rest.
    pub(super) nanoseconds: u32,
}

impl Validity {
    /// Where changes are not heard of.
    pub(super) const SHORT: Validity =
        Validity { seconds: super::VALIDITY.as_secs(), nanoseconds: super::VALIDITY.subsec_nanos() };
}

impl FileServer {
    /// The validity of what will be seen of a directory, its names or its attributes, from now on. It is watched from
    /// now on, if that can be.
    pub(super) fn watched(&self, directory: &Node) -> Validity {
        let inode = &directory.inode;
        let can_be = inode.kind() == libc::S_IFDIR && self.mounts.is_local(inode.mount());
        // Who takes no notices needs no watches.
        if !can_be
            || self.notices.validity().is_none()
            || self.watches.watch(directory, &self.notices).is_err()
        {
            return Validity::SHORT;
        }
        self.until_notice()
    }

    /// The validity of what was seen of an inode since `then` was the validity of something.
    pub(super) fn watched_since(&self, then: Validity, id: u64) -> Validity {
        if then != Validity::SHORT && self.watches.is_watched(id) { then } else { Validity::SHORT }
    }

    /// The server has changed something. What it sees from now on has that behind it.
    pub(super) fn hear_own_changes(&self) {
        if self.notices.validity().is_some() {
            self.watches.hear(&self.notices);
        }
    }

    fn until_notice(&self) -> Validity {
        let validity = self.notices.validity();
        validity.map_or(Validity::SHORT, |seconds| Validity { seconds, nanoseconds: 0 })
    }
}

/// Makes notices of events, on a thread of its own: changes must not wait for slow files.
pub(super) struct Listener {
    server: Arc<FileServer>,
}

impl Listener {
    /// A listener for a server.
    pub(super) fn new(server: Arc<FileServer>) -> Listener {
        Listener { server }
    }

    fn sources(&self) -> Option<[(RawFd, EventSet); 2]> {
        let queue = self.server.watches.queue.as_ref()?;
        // Mounts are told of as an error.
        Some([
            (queue.inotify.as_fd().as_raw_fd(), EventSet::IN),
            (queue.mounts.as_raw_fd(), EventSet::PRIORITY),
        ])
    }
}

impl MutEventSubscriber for Listener {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let FileServer { watches, notices, .. } = &*self.server;
        let Some(queue) = &watches.queue else { return };
        if events.fd() == queue.mounts.as_raw_fd() {
            notices.give(Subject::Everything);
        } else {
            watches.hear(notices);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let sources = self.sources().into_iter().flatten();
        for (source, set) in sources {
            if ops.add(Events::new_raw(source, set)).is_err() {
                // For want of memory in the kernel.
                self.server.notices.end();
            }
        }
    }
}
