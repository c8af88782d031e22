//! The header of a vsock packet (virtio 1.2, section 5.10.6).
//!
//! A header is copied out of the guest's memory once, and everything else works on the copy.

use crate::virtio::buffers::GuestBuffers;

/// Bytes of a header: every packet starts with one, and the payload follows.
pub const HEADER_LEN: usize = 44;

/// The context ID of the host.
pub const HOST_CID: u64 = 2;

/// The only type of socket that the device offers.
pub const TYPE_STREAM: u16 = 1;

/// SHUTDOWN flag: the sender of the packet will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// SHUTDOWN flag: the sender of the packet will not send any more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both SHUTDOWN flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Says that one side will send or receive no more.
    Shutdown,
    /// Carries data.
    ReadWrite,
    /// Tells of room for data, which every packet does, and nothing else.
    CreditUpdate,
    /// Asks for a `CreditUpdate`.
    CreditRequest,
}

impl Operation {
    fn from_wire(op: u16) -> Option<Operation> {
        use Operation::*;
        let all = [Request, Response, Reset, Shutdown, ReadWrite, CreditUpdate, CreditRequest];
        all.into_iter().find(|operation| operation.to_wire() == op)
    }

    fn to_wire(self) -> u16 {
        match self {
            Operation::Request => 1,
            Operation::Response => 2,
            Operation::Reset => 3,
            Operation::Shutdown => 4,
            Operation::ReadWrite => 5,
            Operation::CreditUpdate => 6,
            Operation::CreditRequest => 7,
        }
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub source_cid: u64,
    /// Context ID of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// The type of socket.
    pub socket_type: u16,
    /// What the packet is for; `None` is an operation that does not exist.
    pub operation: Option<Operation>,
    /// Flags of the operation.
    pub flags: u32,
    /// How many bytes the sender is ready to buffer for this connection.
    pub buf_alloc: u32,
    /// How many bytes of this connection have left that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Takes a header off the start of a packet. Less than a whole header is none.
    pub fn read(packet: &mut GuestBuffers<'_>) -> Option<Header> {
        let mut bytes = [0; HEADER_LEN];
        (packet.read(&mut bytes) == HEADER_LEN).then(|| Header::from_bytes(&bytes))
    }

    /// The header that answers this one with a reset.
    pub fn reset(&self) -> Header {
        Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            len: 0,
            socket_type: self.socket_type,
            operation: Some(Operation::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Decodes a header.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Header {
        Header {
            source_cid: u64::from_le_bytes(field(bytes, 0)),
            destination_cid: u64::from_le_bytes(field(bytes, 8)),
            source_port: u32::from_le_bytes(field(bytes, 16)),
            destination_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            operation: Operation::from_wire(u16::from_le_bytes(field(bytes, 30))),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Encodes the header.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.map_or(0, Operation::to_wire).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The `N` bytes at `offset`, which is always a constant within the header.
fn field<const N: usize>(bytes: &[u8; HEADER_LEN], offset: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[offset + index])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: HOST_CID,
            source_port: 0x1112_1314,
            destination_port: 1024,
            len: 7,
            socket_type: TYPE_STREAM,
            operation: Some(Operation::ReadWrite),
            flags: SHUTDOWN_SEND,
            buf_alloc: 0x2122_2324,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..24], [0x14, 0x13, 0x12, 0x11, 0, 4, 0, 0]);
        assert_eq!(bytes[24..36], [7, 0, 0, 0, 1, 0, 5, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[36..], [0x24, 0x23, 0x22, 0x21, 9, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_and_known_operations_survive(bytes in prop::array::uniform32(any::<u8>()), op in 0..9u8) {
            let mut raw = [0; HEADER_LEN];
            raw[..32].copy_from_slice(&bytes);
            raw[30] = op;
            raw[31] = 0;
            let header = Header::from_bytes(&raw);
            prop_assert_eq!(header.operation.is_some(), (1..=7).contains(&op));
            prop_assert_eq!(Header::from_bytes(&header.to_bytes()), header);
        }
    }
}
