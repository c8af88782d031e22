//! What the kernel tells of this process's pages (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Size of a page in bytes.
pub(crate) const PAGE: u64 = 4096;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// The table of this process's pages.
pub(crate) struct Pagemap(File);

/// What it says of one page.
#[derive(Clone, Copy)]
pub(crate) struct Entry(u64);

impl Pagemap {
    /// Opens the table.
    pub(crate) fn open() -> io::Result<Pagemap> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// The entries of so many pages from the one at this address on.
    pub(crate) fn read(&self, address: u64, pages: u64) -> io::Result<Vec<Entry>> {
        let mut bytes = vec![0; pages as usize * size_of::<u64>()];
        self.0.read_exact_at(&mut bytes, address / PAGE * size_of::<u64>() as u64)?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries.iter().map(|entry| Entry(u64::from_ne_bytes(*entry))).collect())
    }
}

impl Entry {
    /// The page is in memory.
    pub(crate) fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// The page is there, in memory or swapped out.
    pub(crate) fn exists(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// The page is one of a file, and no copy.
    pub(crate) fn is_of_file(self) -> bool {
        self.0 & OF_FILE != 0
    }
}
