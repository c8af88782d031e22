//! What the guest need not ask for again, because the server would hear of a change: the names in directories, that
//! names are missing, and attributes.
//!
//! A directory is watched with inotify from when the guest looks into it. Each change of it, whoever makes it, becomes a
//! notice to the guest, see [`super::notices`]. The order makes it sound: first there is the watch, then the
//! version is read, then the directory; so a change is either in the answer or has a notice with a later version. What the
//! guest changes itself comes back as an event, too. It is heard before the version is read, and ends no answer but
//! older ones.
//!
//! A file is watched from when the guest asks for its attributes, beyond those that came with its name. It has a watch of
//! its own, since it can be changed by names in other directories. Who has mapped it changes it without an event, so its
//! validity is short as long as somebody may be writing to it, see [`super::writers`]; and for such a one to come there has to
//! be an event, that of opening it. A file that is *quiet* has had no event since there was no writer.
//!
//! Watches are scarce. The directory that has been watched longest loses its watch to the next one, and what the
//! guest knows of it becomes invalid. Where there are no more to give, validity is short.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::Mode;

use super::inodes::lock;
use super::notices::{Notices, Subject};
use super::pins::Node;
use super::server::{FileServer, descriptor_path};
use super::writers;

/// The most inodes that are watched for one guest. Each takes about 1 KiB of the host's kernel, with its inode.
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

/// A file may have been changed, or may be from now on.
const OF_FILE: AddWatchFlags = OF_ITSELF
    .union(AddWatchFlags::IN_OPEN)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE);

/// The inodes that are watched for the guest.
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
    /// What the listener waits for: it can be read when there are events, unless somebody will hear of them anyway.
    unheard: Epoll,
    /// How many changes are under way that threads make which will hear what came of them.
    changing: Mutex<usize>,
    /// Has something urgent to tell when anything is mounted or unmounted.
    mounts: OwnedFd,
    /// Held while events are read and become notices.
    hearing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Registry {
    /// The inodes of a watch: more than one where the same is mounted at several places.
    by_watch: HashMap<WatchDescriptor, Vec<u64>>,
    by_id: HashMap<u64, Watch>,
    /// Directories, in the order in which they lose their watch. Some have none any more.
    order: VecDeque<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Watch {
    descriptor: WatchDescriptor,
    is_directory: bool,
    /// There would be an event before anything changes.
    is_quiet: bool,
}

/// How many inodes one guest may watch here.
pub(super) fn limit() -> usize {
    let user = std::fs::read_to_string(USER_LIMIT).ok().and_then(|text| text.trim().parse().ok());
    (user.unwrap_or(USUAL_LIMIT) / SHARE).min(MAX_WATCHES)
}

impl Watches {
    /// No directory is watched yet. `descriptors` is the process's /proc/self/fd.
    pub(super) fn new(descriptors: &OwnedFd, limit: usize) -> Watches {
        Watches { queue: Queue::new(descriptors).ok(), limit, registry: Mutex::default() }
    }

    /// Whether an inode is watched, and there would be an event before anything changes.
    fn is_quiet(&self, id: u64) -> bool {
        lock(&self.registry).by_id.get(&id).is_some_and(|watch| watch.is_quiet)
    }

    /// A file is quiet until its next event, or is not.
    fn set_quiet(&self, id: u64, is_quiet: bool) {
        if let Some(watch) = lock(&self.registry).by_id.get_mut(&id) {
            watch.is_quiet = is_quiet;
        }
    }

    /// Watches an inode. The thread must have [entered](super::thread::enter).
    fn watch(&self, node: &Node, notices: &Notices) -> Result<(), Errno> {
        let mut registry = lock(&self.registry);
        let id = node.inode.id;
        if registry.by_id.contains_key(&id) {
            return Ok(());
        }
        let queue = self.queue.as_ref().ok_or(Errno::ENOSPC)?;
        let is_directory = node.inode.kind() == libc::S_IFDIR;
        while registry.by_id.len() >= self.limit {
            // Directories matter more, and files are many.
            if !is_directory {
                return Err(Errno::ENOSPC);
            }
            let oldest = registry.order.pop_front().ok_or(Errno::ENOSPC)?;
            registry.remove(oldest, queue);
            lost(oldest, notices);
        }
        let flags = if is_directory { OF_NAMES | OF_ITSELF } else { OF_FILE };
        let descriptor = queue.inotify.add_watch(descriptor_path(&node.file).as_c_str(), flags)?;
        registry.add(id, Watch { descriptor, is_directory, is_quiet: is_directory });
        Ok(())
    }

    /// Watches an inode no more, which the guest has forgotten.
    pub(super) fn forget(&self, id: u64) {
        if let Some(queue) = &self.queue {
            lock(&self.registry).remove(id, queue);
        }
    }

    /// Watches an inode no more, though the guest still knows it.
    pub(super) fn lose(&self, id: u64, notices: &Notices) {
        let Some(queue) = &self.queue else { return };
        let mut registry = lock(&self.registry);
        if registry.by_id.contains_key(&id) {
            registry.remove(id, queue);
            lost(id, notices);
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
        self.hear_but(queue, None, notices);
    }

    /// Opens a file to read it, and does not take the event of that for one of somebody else.
    pub(super) fn open_to_read(
        &self,
        id: u64,
        notices: &Notices,
        open: impl Fn(OFlag) -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Errno> {
        let watch = lock(&self.registry).by_id.get(&id).copied().filter(|watch| watch.is_quiet);
        let Some((queue, watch)) = self.queue.as_ref().zip(watch) else { return open(OFlag::empty()) };
        let (change, hearing) = (queue.change(notices), lock(&queue.hearing));
        let file = match open(OFlag::O_NONBLOCK) {
            // Somebody has to give a lease back first. Nobody else is to wait for that: it will be heard of as an opening by
            // somebody else.
            Err(Errno::EAGAIN) => {
                drop((hearing, change));
                return open(OFlag::empty());
            }
            opened => opened?,
        };
        self.hear_but(queue, Some(watch.descriptor), notices);
        // Somebody may have opened it just before or after, which makes one event of both. Who comes from now on has
        // an event to himself.
        if writers::may_exist(file.as_fd()) {
            self.take(watch.descriptor, AddWatchFlags::IN_OPEN, None, notices);
        }
        Ok(file)
    }

    /// Makes notices of all that has happened, but for one inode's having been opened.
    fn hear_but(&self, queue: &Queue, opened: Option<WatchDescriptor>, notices: &Notices) {
        let counts = |event: &&InotifyEvent| event.mask != AddWatchFlags::IN_OPEN || Some(event.wd) != opened;
        for _ in 0..MAX_READS {
            match queue.inotify.read_events() {
                Ok(events) => events.iter().filter(counts).for_each(|event| {
                    let name = event.name.as_ref().map(|name| name.as_bytes());
                    self.take(event.wd, event.mask, name, notices);
                }),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // It cannot be told what was missed.
                Err(_) => break,
            }
        }
        // So it is with what is still to be read.
        notices.give(Subject::Everything);
    }

    fn take(&self, watch: WatchDescriptor, what: AddWatchFlags, name: Option<&[u8]>, notices: &Notices) {
        if what.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return notices.give(Subject::Everything);
        }
        let mut registry = lock(&self.registry);
        let ids = registry.by_watch.get(&watch).cloned().unwrap_or_default();
        for id in ids {
            if let Some(name) = name.filter(|_| what.intersects(OF_NAMES)) {
                notices.give(Subject::Name(id, name));
                notices.give(Subject::Contents(id));
            } else if what.intersects(AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_UNMOUNT) {
                registry.take(id);
                lost(id, notices);
            } else if name.is_none() {
                if let Some(watch) = registry.by_id.get_mut(&id) {
                    watch.is_quiet = watch.is_directory;
                }
                notices.give(Subject::Access(id));
                notices.give(Subject::Contents(id));
            }
        }
    }

    /// Whether the listener is woken up.
    #[cfg(test)]
    pub(super) fn wake(&self) -> bool {
        let mut events = [EpollEvent::empty()];
        self.queue.as_ref().is_some_and(|queue| queue.unheard.wait(&mut events, 0u8).unwrap() > 0)
    }

    /// How many inodes are watched.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        lock(&self.registry).by_id.len()
    }
}

/// An inode has lost its watch.
fn lost(id: u64, notices: &Notices) {
    for subject in [Subject::Names(id), Subject::Access(id), Subject::Contents(id)] {
        notices.give(subject);
    }
}

impl Registry {
    fn add(&mut self, id: u64, watch: Watch) {
        self.by_watch.entry(watch.descriptor).or_default().push(id);
        self.by_id.insert(id, watch);
        if !watch.is_directory {
            return;
        }
        // What was forgotten is left in the order, until that makes up the most of it.
        if self.order.len() > 64 + 2 * self.by_id.len() {
            self.order.retain(|id| self.by_id.contains_key(id));
        }
        self.order.push_back(id);
    }

    /// Takes the watch away from an inode, and from the host if nobody else has it.
    fn remove(&mut self, id: u64, queue: &Queue) {
        if let Some(watch) = self.take(id) {
            // It fails when the inode is gone, and the watch with it.
            let _ = queue.inotify.rm_watch(watch);
        }
    }

    /// Takes the watch away from an inode; returns it if nobody else has it.
    fn take(&mut self, id: u64) -> Option<WatchDescriptor> {
        let watch = self.by_id.remove(&id)?.descriptor;
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
        let unheard = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let queue = Queue { inotify, unheard, changing: Mutex::default(), mounts, hearing: Mutex::default() };
        queue.listen()?;
        Ok(queue)
    }

    /// The thread is about to change something, and will hear what comes of it.
    fn change<'q>(&'q self, notices: &'q Notices) -> Change<'q> {
        let mut changing = lock(&self.changing);
        if *changing == 0 {
            // To wait for nothing would not do: the kernel does not say what for it wakes who listens to this queue. It
            // fails only where it was not put back.
            let _ = self.unheard.delete(&self.inotify);
        }
        *changing += 1;
        Change { queue: self, notices }
    }

    fn listen(&self) -> Result<(), Errno> {
        self.unheard.add(&self.inotify, EpollEvent::new(EpollFlags::EPOLLIN, 0))
    }
}

/// A change that is under way, of which there will be events: nobody is woken up for them.
pub(super) struct Change<'q> {
    queue: &'q Queue,
    notices: &'q Notices,
}

impl Drop for Change<'_> {
    /// With the last one the listener hears of what is left.
    fn drop(&mut self) {
        let mut changing = lock(&self.queue.changing);
        *changing -= 1;
        if *changing == 0 && self.queue.listen().is_err() {
            // For want of memory in the kernel, or because the user waits for too much (`fs.epoll.max_user_watches`).
            self.notices.end();
        }
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
    /// The validity of what will be seen of an inode, its attributes or the names in it, from now on. It is watched from
    /// now on, if that can be.
    pub(super) fn watched(&self, node: &Node) -> Validity {
        let inode = &node.inode;
        let can_be = match inode.kind() {
            libc::S_IFDIR => self.mounts.is_local(inode.mount()),
            libc::S_IFREG => self.mounts.tells_of_contents(inode.mount()),
            _ => false,
        };
        // Who takes no notices needs no watches.
        if !can_be || self.until_notice() == Validity::SHORT {
            return Validity::SHORT;
        }
        match self.watches.watch(node, &self.notices) {
            Ok(()) => self.quiet(node),
            Err(_) => Validity::SHORT,
        }
    }

    /// The validity of what will be seen of a watched inode. A file may have writers.
    fn quiet(&self, node: &Node) -> Validity {
        let id = node.inode.id;
        let valid = self.until_notice();
        if self.watches.is_quiet(id) {
            return valid;
        }
        let _change = self.begin_change();
        // Whoever has a lease is not waited for.
        let Ok(file) = self.open_inode(node, OFlag::O_RDONLY | OFlag::O_NONBLOCK) else {
            return Validity::SHORT;
        };
        // That was an event as well. One of another opening can be lost in it, but not who is open.
        self.watches.hear(&self.notices);
        self.watches.set_quiet(id, true);
        let valid = self.until_notice();
        if writers::may_exist(file.as_fd()) {
            self.watches.lose(id, &self.notices);
            return Validity::SHORT;
        }
        // Another thread may have taken the watch away before that version, to open the file for writing after the look for
        // writers. From now on that has a later version.
        if self.watches.is_quiet(id) { valid } else { Validity::SHORT }
    }

    /// The validity of what was seen of an inode since `then` was the validity of something.
    pub(super) fn watched_since(&self, then: Validity, id: u64) -> Validity {
        if then != Validity::SHORT && self.watches.is_quiet(id) { then } else { Validity::SHORT }
    }

    /// The thread is about to do something brief of which there will be events, and will hear them itself. Where nobody takes
    /// notices nobody listens.
    pub(super) fn begin_change(&self) -> Option<Change<'_>> {
        let queue = self.watches.queue.as_ref().filter(|_| self.notices.validity().is_some());
        queue.map(|queue| queue.change(&self.notices))
    }

    /// Makes notices of all that has happened, the server's own changes among it. What it sees from now on has that behind
    /// it.
    pub(super) fn hear_changes(&self) {
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
        Some([(queue.unheard.0.as_raw_fd(), EventSet::IN), (queue.mounts.as_raw_fd(), EventSet::PRIORITY)])
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
