//! The text of the guest's kernel, which machines of a host can share.
//!
//! A Linux kernel begins by patching its own code to what the processor has: nearly each page of it, and the same each time.
//! So one machine [records](Text::Recorded) the outcome, and others are [given](Text::Shared) it. What they begin with is
//! the text as it is loaded, mapped instead of copied. When it comes to patching, their kernel asks at a port (its patch
//! `boot-host-text`): if what it has by then is byte for byte what the recorded one had, and if nothing else differs that decides
//! how it is patched, its text is replaced by the patched one, and it has nothing to patch. Machines share what they do not
//! write to afterwards.
//!
//! A kernel can ask once. By the time that anything of a container runs, it has.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion, VolatileMemory, VolatileMemoryError};

use crate::memory::HUGE_PAGE;
use crate::pagemap::PAGE;
use crate::touched::Touched;
use crate::{GuestMemory, cpuid, host, image};

/// Offsets of 32-bit ports: the number of the first page of a part of the text; how many pages it has, which names it; and
/// the question for all of them (read: 1 is yes) or the word that they are patched (write). By the last one comes a hash of what
/// else decides how they are patched, its upper half first.
const FIRST_PAGE: u16 = 0;
const PAGES: u16 = 4;
const PATCHED: u16 = 8;
const HASH: u16 = 12;
/// How many ports there are.
pub(crate) const PORTS: u16 = 16;

/// No kernel has more.
const MAX_LENGTH: u64 = 128 << 20;
/// Nor in more parts: what stays, and what is freed after the start.
const MAX_PARTS: usize = 4;
/// Bytes that are compared at a time, on the stack of a vCPU.
const CHUNK: usize = 16 << 10;

/// Why a recorded text cannot be given to machines.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// It makes no sense.
    #[error("the text of the guest's kernel has {0}")]
    Impossible(&'static str),
    /// The processor is not the same.
    #[error(
        "the text of the guest's kernel was patched on another processor, or on the same with other features"
    )]
    Processor,
    /// The host.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// KVM does not tell what the processor has.
    #[error("KVM refused to list the processor's features: {0}")]
    Features(vmm_sys_util::errno::Error),
    /// The file could not be used.
    #[error("the file with the text of the guest's kernel could not be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// The file could not be used.
    #[error("the file with the text of the guest's kernel could not be looked at: {0}")]
    File(#[from] io::Error),
}

/// What becomes of the text of a machine's kernel.
#[derive(Debug, Default)]
pub enum Text {
    /// The kernel patches it for itself.
    #[default]
    Own,
    /// The same, and it is recorded, if it is loaded as it is (an ELF file).
    Recorded,
    /// It is the one that was recorded, from the same kernel.
    Shared(SharedText),
}

/// What is known of a recorded text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextRecord {
    parts: Parts,
    /// Of what else decided how it was patched.
    hash: u64,
    /// Which pages the kernel writes to before it asks, and afterwards.
    written: [Vec<Range<u64>>; 2],
    /// What the processor says of itself.
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// Where the parts of a text are in the guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Parts(Vec<Range<u64>>);

impl Parts {
    /// Adds what the guest's kernel names, in pages. Two 32-bit numbers of pages do not overflow.
    fn add(&mut self, first: u32, pages: u32) {
        if self.0.len() < MAX_PARTS {
            let start = u64::from(first) * PAGE;
            self.0.push(start..start + u64::from(pages) * PAGE);
        }
    }

    /// The length of all of them in bytes, if they can be parts of a kernel.
    fn length(&self) -> Result<u64, TextError> {
        let mut sum: u64 = 0;
        for Range { start, end } in &self.0 {
            if !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
                return Err(TextError::Impossible("bounds within a page"));
            }
            let length = end.checked_sub(*start).filter(|length| (1..=MAX_LENGTH).contains(length));
            sum += length.ok_or(TextError::Impossible("a length that no kernel has"))?;
        }
        let is_possible = sum <= MAX_LENGTH && (1..=MAX_PARTS).contains(&self.0.len());
        is_possible.then_some(sum).ok_or(TextError::Impossible("a length that no kernel has"))
    }

    /// The pages in which two versions differ.
    fn differing(&self, left: &[u8], right: &[u8]) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (part, place) in self.placed() {
            for page in part.start / PAGE..part.end / PAGE {
                let at = (place + page * PAGE - part.start) as usize;
                let bytes = at..at + PAGE as usize;
                if left.get(bytes.clone()) == right.get(bytes) {
                    continue;
                }
                match found.last_mut().filter(|last| last.end == page) {
                    Some(last) => last.end += 1,
                    None => found.push(page..page + 1),
                }
            }
        }
        found
    }

    /// Each part, and where it begins if they are put behind one another.
    fn placed(&self) -> impl Iterator<Item = (&Range<u64>, u64)> {
        self.0.iter().scan(0, |next, part| {
            let place = *next;
            *next += part.end - part.start;
            Some((part, place))
        })
    }
}

/// A text that was recorded.
#[derive(Debug)]
pub struct RecordedText {
    /// What is to be known of it.
    pub record: TextRecord,
    /// As it is loaded, as it is before it is patched, and as it is then.
    versions: [Vec<u8>; 3],
}

impl RecordedText {
    /// Writes all of it to an empty file.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        self.versions
            .iter()
            .enumerate()
            .try_for_each(|(number, version)| file.write_all_at(version, (number * version.len()) as u64))
    }
}

/// A text in a file, for this host's processor.
#[derive(Debug)]
pub struct SharedText {
    record: TextRecord,
    /// The length of one version.
    length: u64,
    file: File,
}

impl SharedText {
    /// What [`RecordedText::write_to`] has written to a file which nobody changes.
    pub fn new(record: TextRecord, file: File) -> Result<SharedText, TextError> {
        match cpuid::is_same_processor(&present()?, &record.cpuid) {
            true => SharedText::of_any(record, file),
            false => Err(TextError::Processor),
        }
    }

    /// The same, on whatever processor.
    fn of_any(record: TextRecord, file: File) -> Result<SharedText, TextError> {
        let length = record.parts.length()?;
        if file.metadata()?.len() != 3 * length {
            return Err(TextError::Impossible("another length than its file"));
        }
        Ok(SharedText { record, length, file })
    }

    /// Has a machine that was not started begin with the text as it is loaded. `image` is where its kernel is.
    pub(crate) fn load(&self, memory: &GuestMemory, image: &Range<u64>) -> Result<Touched, TextError> {
        if self.record.parts.0.iter().any(|part| part.start < image.start || part.end > image.end) {
            return Err(TextError::Impossible("another place than the kernel"));
        }
        self.map(memory, 0, &self.record.written[0])
    }

    fn map(&self, memory: &GuestMemory, version: u64, written: &[Range<u64>]) -> Result<Touched, TextError> {
        for (part, place) in self.record.parts.placed() {
            image::map_range(memory, &self.file, version * self.length + place, part.clone())?;
        }
        // Around a part there are no huge pages any more.
        let huge = HUGE_PAGE as u64;
        let around =
            |part: &Range<u64>| part.start / huge * huge / PAGE..part.end.div_ceil(huge) * huge / PAGE;
        let pages = Touched::expected(self.record.parts.0.iter().map(around), written);
        pages.provide(memory);
        Ok(pages)
    }

    /// The text before it is patched.
    fn before(&self) -> Result<MmapRegion, TextError> {
        let file = FileOffset::new(self.file.try_clone()?, self.length);
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        Ok(MmapRegion::build(Some(file), self.length as usize, libc::PROT_READ, flags)?)
    }
}

/// What this host's processor says of itself.
pub(crate) fn present() -> Result<Vec<kvm_cpuid_entry2>, TextError> {
    let kvm = host::open_kvm()?;
    Ok(cpuid::supported(&kvm).map_err(TextError::Features)?.as_slice().to_vec())
}

/// Where the guest's kernel asks for its text.
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
    Text { shared: SharedText, before: MmapRegion },
    /// What the kernel does will be recorded. This is how it was loaded, and where.
    Record { loaded: Vec<u8>, start: u64 },
    /// The kernel is about to patch its text.
    Recording(Vec<u8>, Vec<u8>),
    /// It has: the parts, the hash, and their three versions.
    Recorded(Parts, u64, [Vec<u8>; 3]),
}

impl TextPort {
    /// Ports that answer no, until there is something to offer.
    pub(crate) fn new(memory: GuestMemory) -> TextPort {
        TextPort { memory, state: Mutex::default() }
    }

    /// Gives the kernel this text when it asks.
    pub(crate) fn offer(&self, shared: SharedText) -> Result<(), TextError> {
        let before = shared.before()?;
        self.state().offer = Offer::Text { shared, before };
        Ok(())
    }

    /// Records what the kernel makes of its text. It is loaded, at `image`, and was not entered.
    pub(crate) fn record(&self, image: &Range<u64>) {
        let length = image.end.saturating_sub(image.start).min(MAX_LENGTH).next_multiple_of(PAGE);
        // What is not in memory cannot be recorded.
        let whole = std::iter::once(image.start..image.start + length);
        if let Some(loaded) = self.copy(&Parts(whole.collect())) {
            self.state().offer = Offer::Record { loaded, start: image.start };
        }
    }

    /// What was recorded, if the kernel has asked, and has said that it was done. `cpuid` is what this host's processor says.
    pub(crate) fn take_recorded(&self, cpuid: Vec<kvm_cpuid_entry2>) -> Option<RecordedText> {
        let mut state = self.state();
        match std::mem::take(&mut state.offer) {
            Offer::Recorded(parts, hash, versions) => {
                let now = self.copy(&parts)?;
                let [loaded, before, patched] = &versions;
                let written = [parts.differing(loaded, before), parts.differing(patched, &now)];
                Some(RecordedText { record: TextRecord { parts, hash, written, cpuid }, versions })
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
            Offer::Record { loaded, start } => {
                (self.begin(&loaded, start, &state.parts).unwrap_or_default(), None)
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
                    Offer::Recording(loaded, before) => self.end(loaded, before, &state.parts, state.hash),
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
    fn give(&self, shared: &SharedText, before: &MmapRegion, parts: &Parts) -> Option<Touched> {
        let is_it = *parts == shared.record.parts
            && parts.placed().all(|(part, place)| self.has(part, before, place));
        is_it.then(|| shared.map(&self.memory, 2, &shared.record.written[1]).ok()).flatten()
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

    fn begin(&self, image: &[u8], start: u64, parts: &Parts) -> Option<Offer> {
        let mut loaded = Vec::new();
        for part in &parts.0 {
            let from = usize::try_from(part.start.checked_sub(start)?).ok()?;
            let to = usize::try_from(part.end.checked_sub(start)?).ok()?;
            loaded.extend_from_slice(image.get(from..to)?);
        }
        Some(Offer::Recording(loaded, self.copy(parts)?))
    }

    fn end(&self, loaded: Vec<u8>, before: Vec<u8>, parts: &Parts, hash: u64) -> Offer {
        match self.copy(parts).filter(|patched| patched.len() == before.len()) {
            Some(patched) => Offer::Recorded(parts.clone(), hash, [loaded, before, patched]),
            None => Offer::Nothing,
        }
    }

    /// What is in these places of the memory.
    fn copy(&self, parts: &Parts) -> Option<Vec<u8>> {
        let mut bytes = vec![0; parts.length().ok()? as usize];
        for (part, place) in parts.placed() {
            let (from, to) = (place as usize, (place + part.end - part.start) as usize);
            self.memory.read_slice(&mut bytes[from..to], GuestAddress(part.start)).ok()?;
        }
        Some(bytes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
