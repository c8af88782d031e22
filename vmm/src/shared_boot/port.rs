//! Where the guest's kernel asks for its text.
//!
//! It names the parts of the text and a hash of what decides how they are patched, and asks once, before anything of a container
//! runs. What it names is compared with what was recorded, and nothing else follows from it.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory, VolatileMemoryError};

use super::parts::Parts;
use super::{RecordedBoot, SharedBoot, SharedBootError};
use crate::GuestMemory;
use crate::touched::Touched;

/// Offsets of 32-bit ports: the number of the first page of a part of the text; how many pages it has, which names it; and
/// the question for all of them (read: 1 is yes) or the word that they are patched (write). By the last one comes a hash of what
/// else decides how they are patched, its upper half first.
pub(super) const FIRST_PAGE: u16 = 0;
pub(super) const PAGES: u16 = 4;
pub(super) const PATCHED: u16 = 8;
pub(super) const HASH: u16 = 12;
/// How many ports there are.
pub(crate) const PORTS: u16 = 16;

/// Bytes that are compared at a time, on the stack of a vCPU.
const CHUNK: usize = 16 << 10;

/// The ports.
#[derive(Debug)]
pub(crate) struct TextPort {
    memory: GuestMemory,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the kernel says that its text is.
    first_page: u32,
    parts: Parts,
    /// Of what decides how it will patch them.
    hash: u64,
    offer: Offer,
    /// Memory that was replaced, and that KVM could map at once.
    replaced: Option<Touched>,
}

#[derive(Debug, Default)]
enum Offer {
    #[default]
    Nothing,
    /// The kernel will be given this.
    Text { shared: Box<SharedBoot>, before: MmapRegion },
    /// What the kernel does is recorded, and it is so far.
    Recording(Progress, Box<RecordedBoot>),
}

/// How far a kernel is with its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Loaded,
    Asked,
    Patched,
}

impl TextPort {
    /// Ports that answer no, until there is something to offer.
    pub(crate) fn new(memory: GuestMemory) -> TextPort {
        TextPort { memory, state: Mutex::default() }
    }

    /// Gives the kernel this text when it asks.
    pub(crate) fn offer(&self, shared: SharedBoot) -> Result<(), SharedBootError> {
        let before = shared.text_before()?;
        self.state().offer = Offer::Text { shared: Box::new(shared), before };
        Ok(())
    }

    /// Records what the kernel makes of its text. It is loaded at `kernel`, was not entered, and will find this initramfs.
    pub(crate) fn record(&self, kernel: &Range<u64>, initramfs: Vec<u8>) {
        let recorded = RecordedBoot::begun(&self.memory, kernel, initramfs);
        self.state().offer = recorded
            .map_or(Offer::Nothing, |recorded| Offer::Recording(Progress::Loaded, Box::new(recorded)));
    }

    /// What was recorded, if the kernel has asked, and has said that it was done. `cpuid` is what this host's processor says.
    pub(crate) fn take_recorded(&self, cpuid: Vec<kvm_cpuid_entry2>) -> Option<RecordedBoot> {
        let mut state = self.state();
        match std::mem::take(&mut state.offer) {
            Offer::Recording(Progress::Patched, mut recorded) => {
                recorded.finish(&self.memory, cpuid)?;
                Some(*recorded)
            }
            other => {
                state.offer = other;
                None
            }
        }
    }

    /// A 32-bit `in` instruction.
    pub(crate) fn read(&self, offset: u16) -> u32 {
        if offset != PATCHED {
            return 0;
        }
        let mut state = self.state();
        let (offer, replaced) = match std::mem::take(&mut state.offer) {
            Offer::Text { shared, before } => {
                let is_it = shared.record.hash == state.hash;
                (Offer::Nothing, is_it.then(|| self.give(&shared, &before, &state.parts)).flatten())
            }
            Offer::Recording(Progress::Loaded, mut recorded) => {
                let asked = recorded.ask(&self.memory, &state.parts, state.hash);
                (asked.map_or(Offer::Nothing, |()| Offer::Recording(Progress::Asked, recorded)), None)
            }
            other => (other, None),
        };
        state.offer = offer;
        state.replaced = replaced;
        state.replaced.is_some().into()
    }

    /// A 32-bit `out` instruction.
    pub(crate) fn write(&self, offset: u16, value: u32) {
        let mut state = self.state();
        match offset {
            FIRST_PAGE => state.first_page = value,
            PAGES => {
                let first = state.first_page;
                state.parts.add(first, value);
            }
            HASH => state.hash = state.hash << 32 | u64::from(value),
            PATCHED => {
                state.offer = match std::mem::take(&mut state.offer) {
                    Offer::Recording(Progress::Asked, mut recorded) => recorded
                        .patch(&self.memory)
                        .map_or(Offer::Nothing, |()| Offer::Recording(Progress::Patched, recorded)),
                    other => other,
                };
            }
            _ => {}
        }
    }

    /// Has KVM map what has been replaced, before the guest comes to each page of it.
    pub(crate) fn map_replaced(&self, vcpu: &VcpuFd) {
        if let Some(pages) = self.state().replaced.take() {
            pages.map(&self.memory, vcpu);
        }
    }

    /// Replaces the text, if it is what it should be. One vCPU alone runs by then; a kernel that has others write to it
    /// meanwhile harms itself.
    fn give(&self, shared: &SharedBoot, before: &MmapRegion, parts: &Parts) -> Option<Touched> {
        let is_it = *parts == shared.record.parts
            && parts.placed().all(|(part, place)| self.has(part, before, place));
        is_it.then(|| shared.map_patched(&self.memory).ok()).flatten()
    }

    /// Whether a part is what it is expected to be, which lies at `place`.
    fn has(&self, part: &Range<u64>, expected: &MmapRegion, place: u64) -> bool {
        let same = |at: u64| -> Result<bool, VolatileMemoryError> {
            let length = (part.end - at).min(CHUNK as u64) as usize;
            let (mut present, mut wanted) = ([0; CHUNK], [0; CHUNK]);
            let offset = (place + at - part.start) as usize;
            expected.get_slice(offset, length)?.copy_to(&mut wanted[..]);
            let read = self.memory.read_slice(&mut present[..length], GuestAddress(at));
            Ok(read.is_ok() && present[..length] == wanted[..length])
        };
        (part.start..part.end).step_by(CHUNK).all(|at| same(at).unwrap_or(false))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
