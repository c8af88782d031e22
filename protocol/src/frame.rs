//! Length-prefixed frames: four bytes of little-endian length, then a postcard message.
//!
//! The length is capped at [`MAX_FRAME`] before anything is allocated, since either end may be hostile.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest message, in bytes. An OCI spec of a heavily configured container is some 100 KB.
pub const MAX_FRAME: usize = 4 << 20;

const PREFIX: usize = 4;

/// Why a frame could not be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other end closed the connection between two frames.
    #[error("the connection was closed")]
    Closed,
    /// Reading or writing failed, or the connection ended inside a frame.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The announced or encoded length is above [`MAX_FRAME`].
    #[error("a message of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLarge(usize),
    /// The bytes are no message of this version.
    #[error("a message could not be understood: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Writes one message as a frame, in a single call of `write_all`.
pub fn write_frame<T: Serialize>(writer: &mut impl Write, message: &T) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?)?;
    Ok(())
}

/// Encodes one message as a frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; PREFIX])?;
    let length = bytes.len() - PREFIX;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    // MAX_FRAME fits u32, so the cast keeps the value.
    bytes[..PREFIX].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Writes as much of what waits as a non-blocking connection takes, and keeps the rest.
pub fn write_available(writer: &mut impl Write, waiting: &mut Vec<u8>) -> io::Result<()> {
    while !waiting.is_empty() {
        match writer.write(waiting) {
            Ok(length) => drop(waiting.drain(..length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads one message from a blocking reader.
pub fn read_frame<T: DeserializeOwned>(reader: &mut impl Read) -> Result<T, FrameError> {
    let mut prefix = [0; PREFIX];
    if reader.read(&mut prefix[..1])? == 0 {
        return Err(FrameError::Closed);
    }
    reader.read_exact(&mut prefix[1..])?;
    let mut body = vec![0; checked_length(prefix)?];
    reader.read_exact(&mut body)?;
    Ok(postcard::from_bytes(&body)?)
}

fn checked_length(prefix: [u8; PREFIX]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_FRAME { Err(FrameError::TooLarge(length)) } else { Ok(length) }
}

/// Collects the bytes of a non-blocking connection and yields the messages as they become whole.
#[derive(Debug, Default)]
pub struct FrameReader {
    bytes: Vec<u8>,
}

impl FrameReader {
    /// A reader that holds no bytes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. After an error the connection is of no further use.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((prefix, rest)) = self.bytes.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = checked_length(*prefix)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body)?;
        self.bytes.drain(..PREFIX + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{AgentError, AgentErrorKind, FromAgent, ProcessId, ToAgent};

    fn sample() -> FromAgent {
        FromAgent::Reply {
            request: 7,
            result: Err(AgentError { kind: AgentErrorKind::NotFound, message: "no such program".into() }),
        }
    }

    #[test]
    fn a_message_survives_the_way_there() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &sample()).unwrap();
        assert_eq!(read_frame::<FromAgent>(&mut wire.as_slice()).unwrap(), sample());
    }

    #[test]
    fn a_closed_connection_is_told_from_a_broken_one() {
        assert!(matches!(read_frame::<FromAgent>(&mut [].as_slice()), Err(FrameError::Closed)));
        assert!(matches!(read_frame::<FromAgent>(&mut [9, 0].as_slice()), Err(FrameError::Io(_))));
    }

    #[test]
    fn an_oversized_length_is_refused_before_allocation() {
        let wire = u32::MAX.to_le_bytes();
        assert!(matches!(read_frame::<FromAgent>(&mut wire.as_slice()), Err(FrameError::TooLarge(_))));
        let mut reader = FrameReader::new();
        reader.push(&wire);
        assert!(matches!(reader.next_message::<FromAgent>(), Err(FrameError::TooLarge(_))));
    }

    #[test]
    fn a_message_that_arrives_byte_by_byte_is_put_together() {
        let wire = encode(&sample()).unwrap();
        let mut reader = FrameReader::new();
        for byte in &wire[..wire.len() - 1] {
            reader.push(std::slice::from_ref(byte));
            assert_eq!(reader.next_message::<FromAgent>().unwrap(), None);
        }
        reader.push(&wire[wire.len() - 1..]);
        assert_eq!(reader.next_message::<FromAgent>().unwrap(), Some(sample()));
    }

    proptest! {
        #[test]
        fn no_bytes_from_the_other_end_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
            framed.extend_from_slice(&bytes);
            let _ = read_frame::<FromAgent>(&mut framed.as_slice());
            let _ = read_frame::<ToAgent>(&mut framed.as_slice());
            let _ = read_frame::<FromAgent>(&mut bytes.as_slice());
        }

        #[test]
        fn process_ids_survive(id in any::<u32>()) {
            let wire = encode(&ProcessId(id)).unwrap();
            prop_assert_eq!(read_frame::<ProcessId>(&mut wire.as_slice()).unwrap(), ProcessId(id));
        }
    }
}
