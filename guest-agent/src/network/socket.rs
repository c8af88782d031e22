//! A netlink socket for requests, one at a time.
//!
//! Requests and answers are wrapped here rather than in the crate's enum of all messages: with that, the
//! parsers of every message and attribute of rtnetlink would become part of the agent, half a megabyte that
//! each guest would load.

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

/// More than the kernel puts into one datagram.
const RECEIVE_BUFFER: usize = 32 << 10;

/// A socket of the calling thread's network namespace.
pub struct NetlinkSocket {
    socket: Socket,
    sequence: u32,
}

impl NetlinkSocket {
    /// Opens the socket.
    pub fn open() -> std::io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for a change, and waits until it is made or refused.
    pub fn change(&mut self, kind: u16, body: &dyn Emitable, flags: u16) -> nix::Result<()> {
        self.send(Request { kind, body }, NLM_F_ACK | flags)?;
        loop {
            let mut received = Vec::with_capacity(RECEIVE_BUFFER);
            self.socket.recv(&mut received, 0).map_err(errno)?;
            let mut rest = received.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<Other>::deserialize(rest).map_err(|_| Errno::EBADMSG)?;
                if answer.header.sequence_number == self.sequence
                    && let NetlinkPayload::Error(error) = answer.payload
                {
                    return error.code.map_or(Ok(()), |code| Err(Errno::from_raw(-code.get())));
                }
                // Messages are padded to four bytes.
                let length = answer.header.length as usize;
                rest = rest.get(length.max(1).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    fn send(&mut self, request: Request<'_>, flags: u16) -> nix::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(errno)
    }
}

struct Request<'a> {
    kind: u16,
    body: &'a dyn Emitable,
}

impl NetlinkSerializable for Request<'_> {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.body.emit(buffer);
    }
}

/// An answer that tells neither success nor an error; nothing is asked for that has one.
struct Other;

impl NetlinkDeserializable for Other {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
