//! The tap behind a network device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER;

/// What a reader of the tap can do with frames that are not finished (`linux/if_tun.h`).
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;

mod ioctl {
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<u32>()));
    nix::ioctl_write_ptr!(set_header_size, b'T', 216, i32);
}

/// An open tap.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// A tap that is attached to its interface.
    pub(super) fn new(tap: OwnedFd) -> Tap {
        Tap(tap)
    }

    /// Tells the tap what the guest's driver agreed to.
    pub(super) fn configure(&self, features: u64) -> io::Result<()> {
        #[cfg(any(test, feature = "fuzzing"))]
        if nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(self.0.as_raw_fd()).is_ok() {
            // A socket that stands in for a tap carries frames as they are.
            return Ok(());
        }
        let size = HEADER as i32;
        // SAFETY: the request reads one integer, which `size` is.
        unsafe { ioctl::set_header_size(self.0.as_raw_fd(), &size) }?;
        // SAFETY: the request takes its argument by value.
        unsafe { ioctl::set_offload(self.0.as_raw_fd(), offloads(features) as i32) }?;
        Ok(())
    }

    /// Another descriptor of the same tap.
    pub(super) fn try_clone(&self) -> io::Result<Tap> {
        self.0.try_clone().map(Tap)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the guest takes unfinished. Segments without a checksum cannot be had (section 5.1.3.1), so a driver that
/// asks for nothing but them gets nothing.
fn offloads(features: u64) -> u32 {
    let accepted = |bit: u32, flag| if features & (1 << bit) != 0 { flag } else { 0 };
    match accepted(VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM) {
        0 => 0,
        checksum => {
            checksum
                | accepted(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4)
                | accepted(VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_need_checksums() {
        let tso = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(tso), 0);
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM), TUN_F_CSUM);
        assert_eq!(offloads(tso | 1 << VIRTIO_NET_F_GUEST_CSUM), TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    }

    #[test]
    fn something_else_than_a_tap_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(Tap::new(file.into()).configure(0).is_err());
    }
}
