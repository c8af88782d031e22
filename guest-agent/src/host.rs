//! How the agent reaches the host.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr};
use rvm_protocol::HOST_CID;

/// Opens connections to ports of the host. Tests put Unix sockets in the place of the vsock.
pub trait Host {
    /// A non-blocking connection to `port`, which may still be under way: it can be written to once epoll
    /// says so.
    fn connect(&self, port: u32) -> nix::Result<OwnedFd>;
}

/// The host at the other end of the virtual machine's vsock device.
pub struct VsockHost;

impl Host for VsockHost {
    fn connect(&self, port: u32) -> nix::Result<OwnedFd> {
        let socket = socket::socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        match socket::connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
            Err(errno) => Err(errno),
        }
    }
}

/// What became of a connection that was under way, once epoll says that it can be written to.
pub fn connection_error(socket: impl AsFd) -> nix::Result<()> {
    match socket::getsockopt(&socket, socket::sockopt::SocketError)? {
        0 => Ok(()),
        number => Err(Errno::from_raw(number)),
    }
}
