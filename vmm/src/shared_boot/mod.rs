//! What machines of a host share that boot: their kernel as it is loaded, its text once it is patched, and the initramfs.
//!
//! A Linux kernel begins by patching its own code to what the processor has: nearly each page of it, and the same each time.
//! So one machine [records](RecordedBoot) the outcome, and others are [given](SharedBoot) it. What they begin with is
//! mapped instead of copied where few pages are written to: the text as it is loaded, and the initramfs, of whose pages the
//! kernel makes those of its first program (its patch `initramfs-in-place`). When it comes to patching, the kernel asks at a
//! [port](TextPort) (its patch `boot-host-text`): if what it has by then is byte for byte what the recorded one had, and if
//! nothing else differs that decides how it is patched, its text is replaced by the patched one, and it has nothing to patch.
//! Machines share what they do not write to afterwards.

mod parts;
mod port;
mod recorded;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryError, MmapRegion};

use self::parts::Parts;
pub(crate) use self::port::{PORTS, TextPort};
pub use self::recorded::RecordedBoot;
use crate::boot::MAPPED;
use crate::layout::HIGH_MEMORY;
use crate::memory::HUGE_PAGE;
use crate::pagemap::PAGE;
use crate::touched::Touched;
use crate::{GuestMemory, cpuid, host, image};

/// No kernel has more, and no initramfs that is worth sharing.
const MAX_LENGTH: u64 = 128 << 20;

/// Why machines cannot begin with what was recorded.
#[derive(Debug, thiserror::Error)]
pub enum SharedBootError {
    /// It makes no sense.
    #[error("the boot that is kept has {0}")]
    Impossible(&'static str),
    /// The processor is not the same.
    #[error("the boot that is kept is that of another processor, or of the same with other features")]
    Processor,
    /// The host.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// KVM does not tell what the processor has.
    #[error("KVM refused to list the processor's features: {0}")]
    Features(vmm_sys_util::errno::Error),
    /// The file could not be used.
    #[error("the file of the boot that is kept could not be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// The file could not be used.
    #[error("the file of the boot that is kept could not be looked at: {0}")]
    File(#[from] io::Error),
    /// It does not get into memory.
    #[error("the boot that is kept could not be put into the guest's memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What is known of a recorded boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BootRecord {
    /// Where the kernel is, in whole pages, and where it is entered.
    kernel: Range<u64>,
    entry: u64,
    /// The length of the initramfs in bytes.
    initramfs: u64,
    /// Where its text is.
    parts: Parts,
    /// Of what else decided how it was patched.
    hash: u64,
    /// Which pages of the text the kernel writes to before it asks, and afterwards.
    written: [Vec<Range<u64>>; 2],
    /// What the processor says of itself.
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// A recorded boot in a file, for this host's processor.
#[derive(Debug)]
pub struct SharedBoot {
    record: BootRecord,
    /// The kernel's image comes first in it.
    file: File,
    /// Where the text begins as it is before it is patched.
    before: u64,
    /// Where it begins as it is after that.
    patched: u64,
    /// Where the initramfs begins.
    initramfs: u64,
}

impl SharedBoot {
    /// What [`RecordedBoot::write_to`] has written to a file which nobody changes.
    pub fn new(record: BootRecord, file: File) -> Result<SharedBoot, SharedBootError> {
        match cpuid::is_same_processor(&present()?, &record.cpuid) {
            true => SharedBoot::of_any(record, file),
            false => Err(SharedBootError::Processor),
        }
    }

    /// The same, on whatever processor.
    fn of_any(record: BootRecord, file: File) -> Result<SharedBoot, SharedBootError> {
        let kernel = &record.kernel;
        let size = kernel.end.checked_sub(kernel.start).filter(|size| (1..=MAX_LENGTH).contains(size));
        let size = size.ok_or(SharedBootError::Impossible("a length that no kernel has"))?;
        if !kernel.start.is_multiple_of(PAGE) || !kernel.end.is_multiple_of(PAGE) {
            return Err(SharedBootError::Impossible("bounds within a page"));
        }
        if kernel.start < HIGH_MEMORY.0 || kernel.end > MAPPED.0 || !kernel.contains(&record.entry) {
            return Err(SharedBootError::Impossible("a place where no kernel can be"));
        }
        let pages = kernel.start / PAGE..kernel.end / PAGE;
        if record.written.iter().flatten().any(|range| range.start < pages.start || range.end > pages.end) {
            return Err(SharedBootError::Impossible("written pages that are not the kernel's"));
        }
        if record.initramfs > MAX_LENGTH {
            return Err(SharedBootError::Impossible("an initramfs that is too large"));
        }
        let text = record.parts.length(kernel)?;
        let (before, patched, initramfs) = (size, size + text, size + 2 * text);
        if file.metadata()?.len() != initramfs + record.initramfs.next_multiple_of(PAGE) {
            return Err(SharedBootError::Impossible("another length than its file"));
        }
        Ok(SharedBoot { record, file, before, patched, initramfs })
    }

    /// Where the kernel is entered, and where it ends.
    pub(crate) fn kernel(&self) -> Range<u64> {
        self.record.entry..self.record.kernel.end
    }

    /// The length of the initramfs in bytes.
    pub(crate) fn initramfs_length(&self) -> u64 {
        self.record.initramfs
    }

    /// Puts the kernel into the memory of a machine that was not started, and the initramfs at a page of it. Returns the pages
    /// that the host has for them.
    pub(crate) fn load(&self, memory: &GuestMemory, initramfs: u64) -> Result<Touched, SharedBootError> {
        let BootRecord { kernel, parts, written, .. } = &self.record;
        let mut file = self.file.try_clone()?;
        for gap in parts.gaps(kernel) {
            file.seek(SeekFrom::Start(gap.start - kernel.start))?;
            let length = (gap.end - gap.start) as usize;
            memory.read_exact_volatile_from(GuestAddress(gap.start), &mut file, length)?;
        }
        for part in &parts.0 {
            image::map_range(memory, &self.file, part.start - kernel.start, part.clone())?;
        }
        let end = initramfs + self.record.initramfs.next_multiple_of(PAGE);
        if initramfs < end {
            image::map_range(memory, &self.file, self.initramfs, initramfs..end)?;
        }
        let [first, last] = [initramfs / PAGE, end / PAGE];
        // A kernel takes first what lies highest, below the initramfs, and that would come by one page at a time, too.
        let is_highest = memory.num_regions() == 1;
        let below = if is_highest { around(&(initramfs..end)).start.max(kernel.end / PAGE) } else { first };
        let mut written = written[0].clone();
        written.push(below..first);
        let pages = self.pages(Some(first..last), &written);
        pages.provide(memory);
        Ok(pages)
    }

    /// Replaces the text by the one that is patched; where that fails, all of it is as it was.
    fn map_patched(&self, memory: &GuestMemory) -> Result<Touched, SharedBootError> {
        self.map_text(memory, self.patched).or_else(|error| {
            self.map_text(memory, self.before)?;
            Err(error)
        })?;
        let pages = self.pages(None, &self.record.written[1]);
        pages.provide(memory);
        Ok(pages)
    }

    fn map_text(&self, memory: &GuestMemory, version: u64) -> Result<(), SharedBootError> {
        for (part, place) in self.record.parts.placed() {
            image::map_range(memory, &self.file, version + place, part.clone())?;
        }
        Ok(())
    }

    /// The pages of the text and others.
    fn pages(&self, others: Option<Range<u64>>, written: &[Range<u64>]) -> Touched {
        Touched::expected(self.record.parts.0.iter().map(around).chain(others), written)
    }

    /// The text before it is patched.
    fn text_before(&self) -> Result<MmapRegion, SharedBootError> {
        let file = FileOffset::new(self.file.try_clone()?, self.before);
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let length = (self.patched - self.before) as usize;
        Ok(MmapRegion::build(Some(file), length, libc::PROT_READ, flags)?)
    }
}

/// The pages of a mapped file and around it: as many as cannot be a huge page any more.
fn around(mapped: &Range<u64>) -> Range<u64> {
    let huge = HUGE_PAGE as u64;
    mapped.start / huge * huge / PAGE..mapped.end.div_ceil(huge) * huge / PAGE
}

/// What this host's processor says of itself.
pub(crate) fn present() -> Result<Vec<kvm_cpuid_entry2>, SharedBootError> {
    let kvm = host::open_kvm()?;
    Ok(cpuid::supported(&kvm).map_err(SharedBootError::Features)?.as_slice().to_vec())
}

#[cfg(test)]
mod tests;
