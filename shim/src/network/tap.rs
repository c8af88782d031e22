//! Tap devices: the end of a virtual machine's network cable.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::NetworkError;

/// How the names of all our taps begin; the kernel adds the first number that is free.
pub const PREFIX: &str = "rvm";

/// Length of `struct virtio_net_hdr_v1`, which comes before each frame (virtio 1.2, section 5.1.6).
const VNET_HEADER_LEN: libc::c_int = 12;

nix::ioctl_write_ptr_bad!(
    /// Makes the descriptor a tap of this name (linux/if_tun.h). The name is read and written.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets the length of the header before each frame (linux/if_tun.h).
    tun_set_vnet_header_len,
    libc::TUNSETVNETHDRSZ,
    libc::c_int
);

/// A tap of the calling thread's network namespace. The device vanishes when the descriptor is closed.
pub struct Tap {
    /// The open descriptor; non-blocking, with the virtio network header before each frame.
    pub fd: OwnedFd,
    /// The device's name in its namespace.
    pub name: String,
}

/// Makes a tap with a name that is free in the namespace.
pub fn create() -> Result<Tap, NetworkError> {
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun");
    let fd = OwnedFd::from(open.map_err(|error| NetworkError::TunDevice(error.into()))?);
    let mut request = request(&format!("{PREFIX}%d"));
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and the request is a whole `ifreq` that outlives the call.
    unsafe { tun_set_iff(fd.as_raw_fd(), &raw const request) }.map_err(tap_error)?;
    // SAFETY: the descriptor is open, and the kernel reads one integer from the pointer.
    unsafe { tun_set_vnet_header_len(fd.as_raw_fd(), &VNET_HEADER_LEN) }.map_err(tap_error)?;
    let name = name_in(&request);
    silence(&name);
    Ok(Tap { fd, name })
}

fn tap_error(error: nix::Error) -> NetworkError {
    NetworkError::Tap(error.into())
}

fn request(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays zero: the kernel expects a terminated string.
    for (slot, byte) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

fn name_in(request: &libc::ifreq) -> String {
    request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte as u8)).collect()
}

/// Keeps the host's own stack from speaking IPv6 through the tap: the guest would hear router solicitations of
/// a neighbour that does not exist. Hosts without IPv6 have no such file.
fn silence(name: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_the_request() {
        assert_eq!(name_in(&request("rvm0")), "rvm0");
        assert_eq!(name_in(&request("a-name-that-is-too-long")), "a-name-that-is-");
    }
}
