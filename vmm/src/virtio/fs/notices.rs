//! Notices: how the guest hears that something is not valid any more.
//!
//! Names and attributes that the server watches are valid until there is a notice, see [`super::watches`]. The guest's
//! kernel (with the project's patches) lends a piece of its memory for that, once, by a queue of its own; nothing ever
//! goes back by it. Each notice has a number, its *version*, and is written to a word of that memory which follows
//! from what it is about. A reply says which version was the last when the server began to look. It is valid as long
//! as the words about it say nothing later. So
//! - it does not matter in which order a reply and a notice arrive;
//! - nothing waits for the guest, and nothing is kept for it;
//! - words may be shared by several subjects, of which one is then asked for more often than needed.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use vm_memory::{Bytes, GuestAddress};

use super::inodes::lock;
use crate::GuestMemory;

/// Marks a validity as one until a notice, beside the version (`FUSE_UNTIL_NOTICE` of the guest's kernel).
const UNTIL_NOTICE: u64 = 1 << 63;
/// How many words there are for notices about one subject.
const WORDS: u64 = 8190;
/// Two words before them: the notice about everything, and one that has no meaning.
const FIRST_WORD: u64 = 2;
/// How much memory the guest lends.
pub(super) const LEN: usize = (FIRST_WORD + WORDS) as usize * size_of::<u64>();

/// What a notice is about. Inodes are meant by their number in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject<'n> {
    /// Whatever the guest was told.
    Everything,
    /// What a name in a directory stands for.
    Name(u64, &'n [u8]),
    /// The same for all names in a directory.
    Names(u64),
    /// Mode, owner, access control list and other extended attributes.
    Access(u64),
    /// All other attributes.
    Contents(u64),
}

impl Subject<'_> {
    /// The word for it, as the guest's kernel finds it.
    pub(super) fn word(self) -> u64 {
        let hash = |kind: u64, id: u64| (id << 3 | kind).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = match self {
            Subject::Everything => return 0,
            Subject::Name(id, name) => name
                .iter()
                .fold(hash(1, id), |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)),
            Subject::Names(id) => hash(2, id),
            Subject::Access(id) => hash(3, id),
            Subject::Contents(id) => hash(4, id),
        };
        FIRST_WORD + (hash >> 32) % WORDS
    }
}

/// The guest's memory for notices, and the version of the last one.
#[derive(Debug)]
pub(super) struct Notices {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    version: u64,
    lent: Option<(GuestMemory, GuestAddress)>,
    /// Nobody would hear of a change.
    deaf: bool,
}

impl Default for Notices {
    /// Nobody takes notices yet. Versions begin with the clock's microseconds, later than those of the device of a captured
    /// machine, which has left its notices in the memory that its clones lend anew. Were they earlier, for a clock that was
    /// set back, the guest would only ask more often.
    fn default() -> Notices {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let version = time.as_micros() as u64 & !UNTIL_NOTICE;
        Notices { state: Mutex::new(State { version, lent: None, deaf: false }) }
    }
}

impl Notices {
    /// From now on notices go there: [`LEN`] bytes, which are zero or were used for this before.
    pub(super) fn lend(&self, memory: GuestMemory, address: GuestAddress) {
        lock(&self.state).lent = Some((memory, address));
    }

    /// When this returns, the guest's memory is left alone.
    pub(super) fn give_back(&self) {
        lock(&self.state).lent = None;
    }

    /// Changes are not heard of, now or ever. What the guest was told until now is not valid any more.
    pub(super) fn end(&self) {
        // First, so that nothing is told any more to be valid until a notice, of which this was the last.
        lock(&self.state).deaf = true;
        self.give(Subject::Everything);
    }

    /// The validity of what is looked at from now on, as seconds of a reply; none where the guest takes no notices.
    pub(super) fn validity(&self) -> Option<u64> {
        let state = lock(&self.state);
        state.lent.as_ref().filter(|_| !state.deaf).map(|_| UNTIL_NOTICE | state.version)
    }

    /// Something has changed.
    pub(super) fn give(&self, subject: Subject<'_>) {
        let mut state = lock(&self.state);
        state.version = (state.version + 1) & !UNTIL_NOTICE;
        let Some((memory, address)) = &state.lent else { return };
        let word = GuestAddress(address.0.saturating_add(subject.word() * size_of::<u64>() as u64));
        // A place that is not in memory is the guest's own mistake: it was told so when it lent it, see the worker.
        // Release: a guest that sees the notice, and asks, finds the change.
        let _ = memory.store(state.version.to_le(), word, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory() -> GuestMemory {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 * LEN)]).unwrap())
    }

    fn word(memory: &GuestMemory, base: u64, subject: Subject<'_>) -> u64 {
        memory.read_obj(GuestAddress(base + 8 * subject.word())).unwrap()
    }

    #[test]
    fn a_notice_ends_what_was_told_before_it_and_nothing_else() {
        let (notices, memory) = (Notices::default(), memory());
        assert_eq!(notices.validity(), None, "nobody takes notices");
        notices.lend(memory.clone(), GuestAddress(4096));
        let before = notices.validity().unwrap() & !UNTIL_NOTICE;
        notices.give(Subject::Name(5, b"name"));
        let after = notices.validity().unwrap() & !UNTIL_NOTICE;
        let said = word(&memory, 4096, Subject::Name(5, b"name"));
        assert!(before < said && said <= after, "{before} {said} {after}");
        for other in [
            Subject::Everything,
            Subject::Name(5, b"eman"),
            Subject::Names(5),
            Subject::Access(5),
            Subject::Contents(5),
        ] {
            assert_eq!(word(&memory, 4096, other), 0, "{other:?}");
        }
    }

    #[test]
    fn what_an_earlier_device_has_left_in_the_memory_ends_nothing() {
        let (earlier, memory) = (Notices::default(), memory());
        earlier.lend(memory.clone(), GuestAddress(0));
        (0..100).for_each(|_| earlier.give(Subject::Everything));
        // A clone is not made in the same instant.
        std::thread::sleep(std::time::Duration::from_millis(1));
        let notices = Notices::default();
        notices.lend(memory.clone(), GuestAddress(0));
        let now = notices.validity().unwrap() & !UNTIL_NOTICE;
        assert!(word(&memory, 0, Subject::Everything) <= now);
    }

    #[test]
    fn subjects_have_the_words_that_the_guests_kernel_looks_at() {
        let subjects = [
            Subject::Everything,
            Subject::Name(1, b"usr"),
            Subject::Names(1),
            Subject::Access(77),
            Subject::Contents(1 << 40),
            Subject::Name(9, "ä".as_bytes()),
        ];
        // Computed by the code of the patch.
        assert_eq!(subjects.map(Subject::word), [0, 1546, 1050, 5708, 7067, 6100]);
        assert_eq!(LEN, 64 << 10);
    }

    #[test]
    fn memory_that_was_given_back_is_left_alone() {
        let (notices, memory) = (Notices::default(), memory());
        notices.lend(memory.clone(), GuestAddress(0));
        notices.give_back();
        notices.give(Subject::Everything);
        assert_eq!((word(&memory, 0, Subject::Everything), notices.validity()), (0, None));
    }
}
