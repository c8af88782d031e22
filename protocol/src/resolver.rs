//! DNS messages between the guest's resolver and the host's: those that the container's processes send to Docker's
//! 127.0.0.11, and the answers.
//!
//! A connection to [`RESOLVER_PORT`](crate::RESOLVER_PORT) carries [`Lookup`]s both ways, each a header of seven bytes
//! (number, transport, length; little-endian) and a DNS message. An answer has the number of its query. What neither
//! end looks into is the message, and its length cannot be beyond what DNS allows (RFC 1035, section 4.2.2).

/// The longest DNS message, in bytes.
pub const MAX_DNS_MESSAGE: usize = u16::MAX as usize;

const HEADER: usize = 7;

/// How a process has sent its query, and so how the answer may look: over UDP it may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram.
    Udp,
    /// A connection.
    Tcp,
}

/// A query or its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Which query it is. The guest chooses it.
    pub number: u32,
    /// How the process has sent it.
    pub transport: Transport,
    /// The DNS message.
    pub message: Vec<u8>,
}

/// What came is no lookup; the connection is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a lookup of the unknown transport {0}")]
pub struct UnknownTransport(u8);

impl Lookup {
    /// As it goes over the connection. A message that is too long for DNS is cut.
    pub fn to_bytes(&self) -> Vec<u8> {
        let message = &self.message[..self.message.len().min(MAX_DNS_MESSAGE)];
        let mut bytes = Vec::with_capacity(HEADER + message.len());
        bytes.extend(self.number.to_le_bytes());
        bytes.push(match self.transport {
            Transport::Udp => 0,
            Transport::Tcp => 1,
        });
        bytes.extend((message.len() as u16).to_le_bytes());
        bytes.extend(message);
        bytes
    }
}

/// Collects the bytes of a connection and yields the lookups as they become whole.
#[derive(Debug, Default)]
pub struct LookupReader {
    bytes: Vec<u8>,
}

impl LookupReader {
    /// Takes bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The lookups that are whole now.
    pub fn take(&mut self) -> Result<Vec<Lookup>, UnknownTransport> {
        let (mut lookups, mut rest) = (Vec::new(), self.bytes.as_slice());
        while let Some((&[n0, n1, n2, n3, transport, l0, l1], body)) = rest.split_first_chunk::<HEADER>() {
            let transport = match transport {
                0 => Transport::Udp,
                1 => Transport::Tcp,
                other => return Err(UnknownTransport(other)),
            };
            let Some((message, behind)) = body.split_at_checked(u16::from_le_bytes([l0, l1]).into()) else {
                break;
            };
            let number = u32::from_le_bytes([n0, n1, n2, n3]);
            lookups.push(Lookup { number, transport, message: message.to_vec() });
            rest = behind;
        }
        self.bytes = rest.to_vec();
        Ok(lookups)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup() -> impl Strategy<Value = Lookup> {
        let transport = prop_oneof![Just(Transport::Udp), Just(Transport::Tcp)];
        let message = proptest::collection::vec(any::<u8>(), 0..600);
        (any::<u32>(), transport, message).prop_map(|(number, transport, message)| Lookup {
            number,
            transport,
            message,
        })
    }

    proptest! {
        #[test]
        fn lookups_survive_in_pieces_of_any_size(
            lookups in proptest::collection::vec(lookup(), 0..6),
            piece in 1..50_usize,
        ) {
            let bytes: Vec<u8> = lookups.iter().flat_map(Lookup::to_bytes).collect();
            let (mut reader, mut found) = (LookupReader::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                reader.push(piece);
                found.extend(reader.take().unwrap());
            }
            prop_assert_eq!(found, lookups);
        }

        #[test]
        fn whatever_comes_takes_no_more_memory_than_one_message(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut reader = LookupReader::default();
            reader.push(&bytes);
            if reader.take().is_ok() {
                prop_assert!(reader.bytes.len() < HEADER + MAX_DNS_MESSAGE);
            }
        }
    }

    #[test]
    fn a_message_is_as_long_as_dns_allows_at_most() {
        let lookup = |length| Lookup { number: 1, transport: Transport::Tcp, message: vec![7; length] };
        let mut reader = LookupReader::default();
        reader.push(&lookup(MAX_DNS_MESSAGE + 1).to_bytes());
        assert_eq!(reader.take(), Ok(vec![lookup(MAX_DNS_MESSAGE)]));
    }

    #[test]
    fn an_unknown_transport_ends_it() {
        let mut reader = LookupReader::default();
        reader.push(&[0, 0, 0, 0, 9, 0, 0]);
        assert_eq!(reader.take(), Err(UnknownTransport(9)));
    }
}
