//! One request to the block device (virtio 1.2, section 5.2.6): a header, data, and a byte for the status.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestMemoryMmap;

use super::SECTOR;
use super::disk::{Disk, go_on};
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::virtqueue::Chain;
use crate::virtio::worker::Stop;

/// How many ranges one request may discard or zero.
pub(super) const MAX_RANGES: u32 = 16;
/// How long each of them may be: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of a range in a request: sector, count and flags.
const RANGE_LEN: usize = 16;
/// The only flag of a range: its space may be given back.
const UNMAP: u32 = 1 << 0;

/// How a request can fail.
#[derive(Debug)]
enum Failure {
    /// It makes no sense, or the disk could not do it.
    Error,
    /// The device does not know how.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Failure::Error
    }
}

/// Does what a chain asks for; returns how many bytes were written to it. A chain without sense or without a byte
/// for the status stays without an answer.
pub(super) fn serve(
    disk: &Disk,
    write_through: bool,
    stop: &Stop,
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
) -> u32 {
    let Ok((mut data, mut status)) = GuestBuffers::both(memory, chain) else { return 0 };
    let Some(room_len) = status.len().checked_sub(1) else { return 0 };
    let room = status.split_front(room_len);
    let code = match run(disk, write_through, stop, &mut data, room) {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(Failure::Error) => VIRTIO_BLK_S_IOERR,
        Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
    };
    status.write(&[code as u8]);
    // The length has to reach to the status, which is at the end; it tells what of the data is good.
    room_len as u32 + 1
}

fn run(
    disk: &Disk,
    write_through: bool,
    stop: &Stop,
    data: &mut GuestBuffers<'_>,
    mut room: GuestBuffers<'_>,
) -> Result<(), Failure> {
    let header: [u8; 16] = data.read_object().ok_or(Failure::Error)?;
    let (kind, _, sector) = fields(&header);
    match kind {
        VIRTIO_BLK_T_IN => {
            let at = offset(disk, sector, room.len())?;
            return Ok(disk.read(room, at, stop)?);
        }
        VIRTIO_BLK_T_GET_ID => {
            room.write(disk.name());
            return Ok(());
        }
        VIRTIO_BLK_T_FLUSH => disk.flush()?,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.is_read_only() => {
            return Err(Failure::Error);
        }
        VIRTIO_BLK_T_OUT => {
            let at = offset(disk, sector, data.len())?;
            disk.write(data, at, stop)?;
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => clear(disk, stop, kind, data)?,
        _ => return Err(Failure::Unsupported),
    }
    if write_through && kind != VIRTIO_BLK_T_FLUSH {
        disk.flush()?;
    }
    Ok(())
}

/// Where on the disk data of this length belong.
fn offset(disk: &Disk, sector: u64, len: usize) -> Result<u64, Failure> {
    if !(len as u64).is_multiple_of(SECTOR) {
        return Err(Failure::Error);
    }
    disk.range(sector, len as u64 / SECTOR).map(|range| range.start).ok_or(Failure::Error)
}

/// Discards ranges, or has them read as zeroes. All are checked before the first is touched.
fn clear(disk: &Disk, stop: &Stop, kind: u32, data: &mut GuestBuffers<'_>) -> Result<(), Failure> {
    let (count, odd) = (data.len() / RANGE_LEN, data.len() % RANGE_LEN);
    if count == 0 || odd != 0 || count > MAX_RANGES as usize {
        return Err(Failure::Error);
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let range: [u8; RANGE_LEN] = data.read_object().ok_or(Failure::Error)?;
        let (sectors, flags, sector) = range_fields(&range);
        // Reserved flags, and for a discard all of them, shall be refused in this way (section 5.2.6.2).
        let allowed = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { UNMAP };
        if flags & !allowed != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Failure::Error);
        }
        ranges.push((disk.range(sector, sectors.into()).ok_or(Failure::Error)?, flags & UNMAP != 0));
    }
    for (range, unmap) in ranges {
        go_on(stop)?;
        match kind {
            VIRTIO_BLK_T_DISCARD => disk.discard(range)?,
            _ => disk.write_zeroes(range, unmap, stop)?,
        }
    }
    Ok(())
}

/// A request's header: its type, a reserved field, the first sector.
fn fields(header: &[u8; 16]) -> (u32, u32, u64) {
    let [a, b, c, d, e, f, g, h, sector @ ..] = *header;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), u64::from_le_bytes(sector))
}

/// A range to clear: how many sectors, flags, the first sector.
fn range_fields(range: &[u8; RANGE_LEN]) -> (u32, u32, u64) {
    let [sector @ .., a, b, c, d, e, f, g, h] = *range;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), u64::from_le_bytes(sector))
}
