//! The guest's memory as a file: how it is written, and how a machine begins with it.
//!
//! The file is as long as the memory; what lies above the gap follows what lies below. Pages of zeros are holes in it.
//! A machine maps stretches of the file in which there is something, as copies that are its own as soon as it writes to
//! them. Everything else is fresh memory, as in a machine that boots.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
};

use crate::pagemap::{PAGE, Pagemap};
use crate::{GuestMemory, memory};

/// What is mapped or not as a whole: a huge page.
const STRETCH: u64 = 2 << 20;

/// Why memory could not be written to a file, or be had from one.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The guest's memory could not be read.
    #[error("the guest's memory could not be read: {0}")]
    Read(#[from] GuestMemoryError),
    /// The file could not be written.
    #[error("the guest's memory could not be written to its file: {0}")]
    Write(#[source] io::Error),
    /// The file could not be mapped.
    #[error("the file of the guest's memory could not be mapped: {0}")]
    Map(#[source] io::Error),
    /// The file is no image of this memory.
    #[error("the file of the guest's memory has {found} bytes, and the memory has {expected}")]
    Size {
        /// How long the file is.
        found: u64,
        /// How much memory there is.
        expected: u64,
    },
}

/// Writes all memory to an empty file.
pub(crate) fn write(memory: &GuestMemory, file: &File) -> Result<(), ImageError> {
    let pages = Pagemap::open().ok();
    let mut buffer = vec![0; STRETCH as usize];
    let mut offset = 0;
    for region in memory.iter() {
        let mut start = 0;
        while start < region.len() {
            let length = STRETCH.min(region.len() - start);
            let data = &mut buffer[..length as usize];
            if has_pages(pages.as_ref(), region, start, length) {
                memory.read_slice(data, GuestAddress(region.start_addr().0 + start))?;
                write_pages(file, data, offset + start).map_err(ImageError::Write)?;
            }
            start += length;
        }
        offset += region.len();
    }
    file.set_len(offset).map_err(ImageError::Write)
}

/// Whether the host has any page for a stretch of the guest's memory. Where that cannot be told, there may be.
fn has_pages(pages: Option<&Pagemap>, region: &GuestRegionMmap, start: u64, length: u64) -> bool {
    let address = region.as_ptr() as u64 + start;
    let entries = pages.and_then(|pages| pages.read(address, length.div_ceil(PAGE)).ok());
    entries.is_none_or(|entries| entries.iter().any(|entry| entry.exists()))
}

/// Writes the pages that are not zero, those beside one another together.
fn write_pages(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    let is_empty = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut start = 0;
    for run in data.chunks(PAGE as usize).collect::<Vec<_>>().chunk_by(|a, b| is_empty(a) == is_empty(b)) {
        let length: usize = run.iter().map(|page| page.len()).sum();
        if !run.first().is_none_or(|page| is_empty(page)) {
            file.write_all_at(&data[start..start + length], offset + start as u64)?;
        }
        start += length;
    }
    Ok(())
}

/// Puts what is in the file where memory is that nobody has touched yet.
pub(crate) fn map(memory: &GuestMemory, file: &File) -> Result<(), ImageError> {
    let found = file.metadata().map_err(ImageError::Map)?.len();
    let expected = memory::size(memory);
    if found != expected {
        return Err(ImageError::Size { found, expected });
    }
    let mut offset = 0;
    for region in memory.iter() {
        map_region(region, file, offset).map_err(ImageError::Map)?;
        offset += region.len();
    }
    Ok(())
}

/// Puts a part of a file, from a page on, in the place of this memory, which the guest may have used.
pub(crate) fn map_range(memory: &GuestMemory, file: &File, at: u64, range: Range<u64>) -> io::Result<()> {
    let length = range.end - range.start;
    let region = memory.find_region(GuestAddress(range.start)).ok_or(io::ErrorKind::InvalidInput)?;
    let place = range.start - region.start_addr().0;
    if place + length > region.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map_stretch(region, place, file, at, length)
}

/// Maps the stretches of a region, which begins at `offset` of the file, that have something in them.
fn map_region(region: &GuestRegionMmap, file: &File, offset: u64) -> io::Result<()> {
    let end = offset + region.len();
    let mut next = offset;
    while let Some(data) = seek(file, next, Whence::SeekData)?.filter(|data| *data < end) {
        // A stretch may hold holes; it is mapped up to the first stretch that is one.
        let start = data - (data - offset) % STRETCH;
        let mut stop = start;
        while stop < end && seek(file, stop, Whence::SeekData)?.is_some_and(|data| data < stop + STRETCH) {
            stop = (stop + STRETCH).min(end);
        }
        map_stretch(region, start - offset, file, start, stop - start)?;
        next = stop;
        if next >= end {
            break;
        }
    }
    Ok(())
}

/// The first place from `from` on with data, or without.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek64(file, from.cast_signed(), whence) {
        Ok(found) => Ok(Some(found.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Maps so much of a file, from `at` on, to `place` in a region.
fn map_stretch(region: &GuestRegionMmap, place: u64, file: &File, at: u64, length: u64) -> io::Result<()> {
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED);
    let place = region.as_ptr().wrapping_add(place as usize);
    // SAFETY: the range lies within the region, which owns the mapping that is replaced here, and unmaps both. Nothing
    // refers to its memory: this process accesses it by address alone, and KVM follows.
    let mapped = unsafe {
        libc::mmap(place.cast(), length as usize, protection, flags, file.as_raw_fd(), at.cast_signed())
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // As for the rest of the memory.
    // SAFETY: the range is a mapping of this process, and the advice changes nothing of its contents.
    unsafe { libc::madvise(place.cast(), length as usize, libc::MADV_DONTFORK) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const SIZE: u64 = 64 << 20;

    fn image(fill: impl Fn(&GuestMemory)) -> File {
        let memory = memory::create(SIZE).unwrap();
        fill(&memory);
        let file = tempfile::tempfile().unwrap();
        write(&memory, &file).unwrap();
        file
    }

    #[test]
    fn memory_comes_back_from_its_file() {
        let places = [0, 0x1000, 0x7ff_fff8, 0x20_0000, 33 << 20, SIZE - 8].map(|at: u64| at & (SIZE - 1));
        let file = image(|memory| {
            places.iter().for_each(|at| memory.write_obj(at | 1, GuestAddress(*at)).unwrap());
        });
        let memory = memory::create(SIZE).unwrap();
        map(&memory, &file).unwrap();
        for at in places {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at | 1);
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x3000)).unwrap(), 0);
    }

    #[test]
    fn empty_pages_take_no_space() {
        let file = image(|memory| {
            memory.write_obj(1_u8, GuestAddress(5 << 20)).unwrap();
            memory.write_obj(0_u8, GuestAddress(7 << 20)).unwrap();
        });
        let found = file.metadata().unwrap();
        assert_eq!(found.len(), SIZE);
        assert!(found.blocks() * 512 <= 64 << 10, "{} blocks", found.blocks());
    }

    #[test]
    fn what_a_machine_writes_is_its_own() {
        let file = image(|memory| memory.write_obj(7_u64, GuestAddress(4096)).unwrap());
        let machines = [(); 2].map(|()| memory::create(SIZE).unwrap());
        machines.iter().for_each(|memory| map(memory, &file).unwrap());
        machines[0].write_obj(8_u64, GuestAddress(4096)).unwrap();
        assert_eq!(machines[1].read_obj::<u64>(GuestAddress(4096)).unwrap(), 7);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(bytes, 7_u64.to_ne_bytes());
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = image(|_| ());
        file.set_len(SIZE - 1).unwrap();
        let memory = memory::create(SIZE).unwrap();
        assert!(matches!(map(&memory, &file), Err(ImageError::Size { found, .. }) if found == SIZE - 1));
    }

    #[test]
    fn memory_around_the_gap_is_one_file() {
        let size = 5 << 30;
        let memory = memory::create(size).unwrap();
        let places = [1 << 30, 4 << 30, (6 << 30) - 8];
        places.iter().for_each(|at| memory.write_obj(*at, GuestAddress(*at)).unwrap());
        let file = tempfile::tempfile().unwrap();
        write(&memory, &file).unwrap();
        let other = memory::create(size).unwrap();
        map(&other, &file).unwrap();
        for at in places {
            assert_eq!(other.read_obj::<u64>(GuestAddress(at)).unwrap(), at);
        }
    }
}
