//! One conversation with the kernel's routing tables (rtnetlink(7)), in the network namespace of the thread that
//! opened it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::NetworkError;

/// An open socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Netlink, NetworkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        Ok(Netlink { socket: open().map_err(socket_error)?, sequence: 0 })
    }

    /// Asks for every object of a kind.
    pub fn list(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut objects = Vec::new();
        self.receive(|object| objects.push(object)).map_err(|error| NetworkError::Read(error.into()))?;
        Ok(objects)
    }

    /// Asks for a change; the error is the kernel's answer.
    pub fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(request, NLM_F_REQUEST | NLM_F_ACK | flags).map_err(io::Error::other)?;
        self.receive(drop)
    }

    fn send(&mut self, request: RouteNetlinkMessage, flags: u16) -> Result<(), NetworkError> {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(request);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(socket_error)
    }

    /// Reads until the answer to the last request is complete.
    fn receive(&mut self, mut take: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                // Messages are aligned to four bytes; the last one of a datagram may come without its padding.
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(object) => take(object),
                    _ => {}
                }
            }
        }
    }
}

/// Hears of every change in the network namespace of the thread that opened it.
pub struct News {
    socket: Socket,
}

/// Links, neighbours, and addresses and routes of both families (`RTMGRP_*` of rtnetlink(7)).
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

impl News {
    /// Begins to listen.
    pub fn open() -> Result<News, NetworkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, GROUPS))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(News { socket: open().map_err(socket_error)? })
    }

    /// Forgets what has come: whoever looks now sees it. What was too much for the socket counts as come, too.
    pub fn clear(&self) {
        while !matches!(self.socket.recv_from_full(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
        {
        }
    }
}

impl AsFd for News {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn socket_error(error: io::Error) -> NetworkError {
    NetworkError::Socket(error.into())
}
