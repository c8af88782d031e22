//! The disk image: a file of which whole sectors can be read and written.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::{BlockError, SECTOR};
use crate::virtio::buffers::GuestBuffers;

/// Length of a disk's name (VIRTIO_BLK_ID_BYTES).
const NAME_LEN: usize = 20;
/// How much is zeroed by one write where the file system cannot do better.
const ZEROES: usize = 64 << 10;

/// A disk image.
#[derive(Debug)]
pub(super) struct Disk {
    image: File,
    sectors: u64,
    read_only: bool,
    name: [u8; NAME_LEN],
}

impl Disk {
    /// The disk of a regular file or a block device.
    pub(super) fn new(mut image: File, read_only: bool) -> Result<Disk, BlockError> {
        let metadata = image.metadata()?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(BlockError::Kind);
        }
        // A block device's metadata know nothing of its size.
        let sectors = image.seek(SeekFrom::End(0))? / SECTOR;
        // The same for the same image each time, and different for two images.
        let text = format!("{:x}-{:x}", metadata.ino(), metadata.dev());
        let mut name = [0; NAME_LEN];
        name.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        Ok(Disk { image, sectors, read_only, name })
    }

    /// How many sectors it has.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the guest may not write.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its name, padded with zeroes.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// The bytes of some sectors, if the disk has all of them.
    pub(super) fn range(&self, sector: u64, sectors: u64) -> Option<Range<u64>> {
        let end = sector.checked_add(sectors).filter(|&end| end <= self.sectors)?;
        // No overflow: the disk is no longer than a file can be.
        Some(sector * SECTOR..end * SECTOR)
    }

    /// Fills guest memory from the disk.
    pub(super) fn read(&self, mut room: GuestBuffers<'_>, mut offset: u64) -> io::Result<()> {
        while !room.is_empty() {
            match retry(|| room.read_file_at(self.image.as_fd(), offset))? {
                // Someone else made the file shorter.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => offset += read as u64,
            }
        }
        Ok(())
    }

    /// Writes guest memory to the disk.
    pub(super) fn write(&self, mut data: GuestBuffers<'_>, mut offset: u64) -> io::Result<()> {
        while !data.is_empty() {
            match retry(|| data.write_file_at(self.image.as_fd(), offset))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => offset += written as u64,
            }
        }
        Ok(())
    }

    /// Puts all that was written on the disk for good.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.image.sync_data()
    }

    /// Gives back the space of a range, whose contents do not matter any more.
    pub(super) fn discard(&self, range: Range<u64>) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, &range) {
            // To keep the space is no failure.
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes a range read as zeroes, and gives its space back where that is wanted and possible.
    pub(super) fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        let how = match unmap {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        match self.allocate(how, &range) {
            Err(Errno::EOPNOTSUPP) => self.write_zeroes_plainly(range),
            result => Ok(result?),
        }
    }

    fn write_zeroes_plainly(&self, range: Range<u64>) -> io::Result<()> {
        let zeroes = [0; ZEROES];
        for offset in range.clone().step_by(ZEROES) {
            let len = (range.end - offset).min(ZEROES as u64) as usize;
            self.image.write_all_at(&zeroes[..len], offset)?;
        }
        Ok(())
    }

    fn allocate(&self, how: FallocateFlags, range: &Range<u64>) -> Result<(), Errno> {
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (range.start as i64, (range.end - range.start) as i64);
        if len == 0 { Ok(()) } else { fallocate(&self.image, flags, offset, len) }
    }
}

fn retry(mut action: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match action() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            result => return result,
        }
    }
}
