//! The sockets that a confined monitor asks with, each used again and again.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};

/// How many queries over UDP may be under way. A name of a container takes a millisecond, one of the world a second.
const UDP: usize = 32;
/// How many over TCP, which few programs ever use, and only for answers that are too long for a datagram.
const TCP: usize = 4;

/// The sockets, none of them connected.
#[derive(Debug)]
pub struct Sockets {
    /// Sockets of datagrams.
    pub udp: Vec<OwnedFd>,
    /// Sockets of streams.
    pub tcp: Vec<OwnedFd>,
}

impl Sockets {
    /// Makes them in the calling thread's network namespace.
    pub fn open() -> io::Result<Sockets> {
        let make = |count, kind| (0..count).map(|_| open(kind)).collect::<io::Result<Vec<_>>>();
        Ok(Sockets { udp: make(UDP, SockType::Datagram)?, tcp: make(TCP, SockType::Stream)? })
    }
}

fn open(kind: SockType) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Inet, kind, flags, None)?)
}

/// Connects a socket from a port that it has not had: by an old one the kernel would remember where dockerd used to be.
/// A stream may be under way when this returns.
pub fn connect_anew(socket: impl AsFd, server: SocketAddrV4) -> io::Result<()> {
    dissolve(&socket)?;
    match connect(socket.as_fd().as_raw_fd(), &SockaddrIn::from(server)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes a socket's peer and port from it (connect(2), `AF_UNSPEC`). Of a stream this is the end.
pub fn dissolve(socket: impl AsFd) -> io::Result<()> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the address is as long as it is said to be.
    let result = unsafe { libc::connect(socket.as_fd().as_raw_fd(), &raw const nobody, length) };
    Errno::result(result)?;
    Ok(())
}
