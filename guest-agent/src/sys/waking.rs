//! What tells a guest apart that goes on from the same state as others.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// The most that is added at a time.
const MOST: usize = 64;

/// `struct rand_pool_info` with its buffer.
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    size: libc::c_int,
    buffer: [u8; MOST],
}

mod requests {
    // The number is made of the size of a `struct rand_pool_info` without its buffer.
    nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), super::PoolInfo);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// Mixes these bytes into the kernel's random generator, as random as they are long, and has everything that is drawn
/// from now on depend on them.
pub fn add_entropy(bytes: &[u8]) -> nix::Result<()> {
    let bytes = bytes.get(..MOST).unwrap_or(bytes);
    // At most MOST bytes, whose bits an int can count.
    let mut pool =
        PoolInfo { entropy_count: 8 * bytes.len() as i32, size: bytes.len() as i32, buffer: [0; MOST] };
    pool.buffer[..bytes.len()].copy_from_slice(bytes);
    let device =
        File::open("/dev/urandom").map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    // SAFETY: the request reads the structure and as many bytes of its buffer as it says, which are there.
    unsafe { requests::add_entropy(device.as_raw_fd(), &raw const pool) }?;
    // SAFETY: the request takes no argument.
    unsafe { requests::reseed(device.as_raw_fd()) }?;
    Ok(())
}
