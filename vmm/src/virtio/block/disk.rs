//! The disk image: a file of which whole sectors can be read and written.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{major, minor};

use super::{BlockError, SECTOR};
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::worker::Stop;

/// Length of a disk's name (VIRTIO_BLK_ID_BYTES).
const NAME_LEN: usize = 20;
/// How much is read or written by one system call, between which a reset is noticed.
pub(super) const PIECE: usize = 1 << 20;
/// How much is zeroed by one write where the file system cannot do better.
const ZEROES: usize = 64 << 10;

/// A disk image.
#[derive(Debug)]
pub(super) struct Disk {
    image: File,
    sectors: u64,
    read_only: bool,
    name: [u8; NAME_LEN],
    /// How often it was flushed.
    #[cfg(test)]
    pub(super) flushes: std::sync::atomic::AtomicUsize,
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
        let (device, inode) = match metadata.is_file() {
            true => (metadata.dev(), metadata.ino()),
            // No file has the inode 0.
            false => (metadata.rdev(), 0),
        };
        Ok(Disk {
            image,
            sectors,
            read_only,
            name: name(device, inode),
            #[cfg(test)]
            flushes: Default::default(),
        })
    }

    /// How many sectors it has.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the guest may not write.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its name.
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
    pub(super) fn read(&self, mut room: GuestBuffers<'_>, mut offset: u64, stop: &Stop) -> io::Result<()> {
        while !room.is_empty() {
            let mut piece = next_piece(&mut room, stop)?;
            while !piece.is_empty() {
                match retry(|| piece.read_file_at(self.image.as_fd(), offset))? {
                    // Someone else made the file shorter.
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    read => offset += read as u64,
                }
            }
        }
        Ok(())
    }

    /// Writes guest memory to the disk.
    pub(super) fn write(&self, data: &mut GuestBuffers<'_>, mut offset: u64, stop: &Stop) -> io::Result<()> {
        while !data.is_empty() {
            let mut piece = next_piece(data, stop)?;
            while !piece.is_empty() {
                match retry(|| piece.write_file_at(self.image.as_fd(), offset))? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    written => offset += written as u64,
                }
            }
        }
        Ok(())
    }

    /// Puts all that was written on the disk for good.
    pub(super) fn flush(&self) -> io::Result<()> {
        #[cfg(test)]
        self.flushes.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
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
    pub(super) fn write_zeroes(&self, range: Range<u64>, unmap: bool, stop: &Stop) -> io::Result<()> {
        let how = match unmap {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        match self.allocate(how, &range) {
            Err(Errno::EOPNOTSUPP) => self.write_zeroes_plainly(range, stop),
            result => Ok(result?),
        }
    }

    fn write_zeroes_plainly(&self, range: Range<u64>, stop: &Stop) -> io::Result<()> {
        let zeroes = [0; ZEROES];
        for offset in range.clone().step_by(ZEROES) {
            go_on(stop)?;
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

/// The same for the same image each time, and different for two images: 64 bits of the inode and 32 of the device, which
/// are all that the kernel has, in 20 characters of 5 bits.
fn name(device: u64, inode: u64) -> [u8; NAME_LEN] {
    const DIGITS: [u8; 32] = *b"0123456789abcdefghijklmnopqrstuv";
    let device = major(device) << 20 | minor(device);
    let number = u128::from(device as u32) << 64 | u128::from(inode);
    std::array::from_fn(|position| DIGITS[(number >> (5 * position)) as usize % DIGITS.len()])
}

/// What of a request is done next. A request may be as long as the disk; its end is too long to wait for.
fn next_piece<'m>(bytes: &mut GuestBuffers<'m>, stop: &Stop) -> io::Result<GuestBuffers<'m>> {
    go_on(stop)?;
    Ok(bytes.split_front(PIECE))
}

/// An error when the device was reset: nobody waits for the request any more.
pub(super) fn go_on(stop: &Stop) -> io::Result<()> {
    if stop.is_requested() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
}

fn retry(mut action: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match action() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::makedev;

    use super::*;

    #[test]
    fn no_two_images_have_the_same_name() {
        let large = 0x1234_5678_9abc_def0;
        let images = [
            (makedev(8, 1), large),
            (makedev(8, 2), large),
            (makedev(9, 1), large),
            (makedev(8, 1), large + 1),
            (makedev(8, 1), large ^ 1 << 63),
            (makedev(0xfff, 0xf_ffff), large),
            (makedev(8, 1), 0),
        ];
        let mut names = images.map(|(device, inode)| name(device, inode));
        assert!(names.as_flattened().iter().all(u8::is_ascii_alphanumeric));
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn a_reset_ends_a_request_between_two_pieces() {
        let disk = Disk::new(tempfile::tempfile().unwrap(), false).unwrap();
        let stop = Stop::default();
        assert!(disk.write_zeroes_plainly(0..100, &stop).is_ok());
        stop.request();
        assert!(disk.write_zeroes_plainly(100..200, &stop).is_err());
        assert_eq!(disk.image.metadata().unwrap().len(), 100);
        assert!(next_piece(&mut GuestBuffers::empty(), &stop).is_err());
    }
}
