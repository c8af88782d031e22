//! What is recorded of a machine that boots, step by step.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use kvm_bindings::kvm_cpuid_entry2;
use vm_memory::{Bytes, GuestAddress};

use super::parts::Parts;
use super::{BootRecord, MAX_LENGTH};
use crate::GuestMemory;
use crate::pagemap::PAGE;

/// A boot that was recorded.
#[derive(Debug)]
pub struct RecordedBoot {
    /// What is to be known of it.
    pub record: BootRecord,
    /// The kernel as it is loaded.
    kernel: Vec<u8>,
    /// Its text before it is patched, and after it.
    before: Vec<u8>,
    patched: Vec<u8>,
    initramfs: Vec<u8>,
}

impl RecordedBoot {
    /// Of a kernel that is loaded. What is not in memory cannot be recorded.
    pub(super) fn begun(
        memory: &GuestMemory,
        kernel: &Range<u64>,
        initramfs: Vec<u8>,
    ) -> Option<RecordedBoot> {
        let whole = kernel.start - kernel.start % PAGE..kernel.end.checked_next_multiple_of(PAGE)?;
        let length = whole.end.checked_sub(whole.start)?;
        if length > MAX_LENGTH || initramfs.len() as u64 > MAX_LENGTH {
            return None;
        }
        let image = read(memory, &whole)?;
        let record = BootRecord {
            kernel: whole,
            entry: kernel.start,
            initramfs: initramfs.len() as u64,
            parts: Parts::default(),
            hash: 0,
            written: [Vec::new(), Vec::new()],
            cpuid: Vec::new(),
        };
        let (before, patched) = (Vec::new(), Vec::new());
        Some(RecordedBoot { record, kernel: image, before, patched, initramfs })
    }

    /// The kernel has named its text, and is about to patch it.
    pub(super) fn ask(&mut self, memory: &GuestMemory, parts: &Parts, hash: u64) -> Option<()> {
        // It is entered where its text begins. Of a kernel that asks, nothing lies before that.
        parts.length(&self.record.kernel).ok()?;
        parts.0.first().filter(|first| first.start == self.record.kernel.start)?;
        (self.record.parts, self.record.hash) = (parts.clone(), hash);
        self.before = self.text(memory)?;
        Some(())
    }

    /// The kernel has patched its text.
    pub(super) fn patch(&mut self, memory: &GuestMemory) -> Option<()> {
        self.patched = self.text(memory)?;
        Some(())
    }

    /// The kernel is up: what it writes to its text, it has written.
    pub(super) fn finish(&mut self, memory: &GuestMemory, cpuid: Vec<kvm_cpuid_entry2>) -> Option<()> {
        let parts = &self.record.parts;
        let mut loaded = Vec::new();
        for part in &parts.0 {
            let [from, to] = [part.start, part.end].map(|at| (at - self.record.kernel.start) as usize);
            loaded.extend_from_slice(self.kernel.get(from..to)?);
        }
        let written =
            [parts.differing(&loaded, &self.before), parts.differing(&self.patched, &self.text(memory)?)];
        self.record.written = written;
        self.record.cpuid = cpuid;
        Some(())
    }

    /// Writes all of it to an empty file.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        let mut at = 0;
        for piece in [&self.kernel, &self.before, &self.patched, &self.initramfs] {
            file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        // Whole pages can be mapped.
        file.set_len(at.next_multiple_of(PAGE))
    }

    /// What is in the places of the text.
    fn text(&self, memory: &GuestMemory) -> Option<Vec<u8>> {
        let parts = self.record.parts.0.iter().map(|part| read(memory, part));
        parts.collect::<Option<Vec<_>>>().map(|parts| parts.concat())
    }
}

fn read(memory: &GuestMemory, range: &Range<u64>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    memory.read_slice(&mut bytes, GuestAddress(range.start)).ok()?;
    Some(bytes)
}
