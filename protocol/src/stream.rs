//! The first bytes of a stream connection, which say whose stream it is.

/// Length of a [`StreamHeader`] on the wire, in bytes.
pub const STREAM_HEADER_LEN: usize = 16;

/// A secret that names one stream. The host draws it at random and hands it to the agent over the control
/// connection, so that a process of the container, which can reach the vsock too, cannot pose as the agent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct StreamToken(pub [u8; 16]);

impl std::fmt::Debug for StreamToken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("StreamToken(..)")
    }
}

/// What the agent sends first on a connection to [`STREAM_PORT`](crate::STREAM_PORT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The stream that this connection carries.
    pub token: StreamToken,
}

impl StreamHeader {
    /// The header as it goes over the wire.
    pub fn to_bytes(self) -> [u8; STREAM_HEADER_LEN] {
        self.token.0
    }

    /// The header of a connection, from its first bytes.
    pub fn from_bytes(bytes: [u8; STREAM_HEADER_LEN]) -> Self {
        Self { token: StreamToken(bytes) }
    }
}
