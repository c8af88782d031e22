//! Connections from the guest that carry standard streams: which process's stream is which connection.
//!
//! The container's processes can reach the vsock too. A connection counts only if it begins with a token that
//! the agent was told, each token counts once, and few connections may be undecided at a time.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rvm_protocol::{ProcessId, STREAM_HEADER_LEN, StandardStreams, StreamHeader, StreamToken};

use crate::control::WindowSize;

/// The most connections whose header has not arrived.
const MAX_UNDECIDED: usize = 64;

/// One of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamRole {
    /// The terminal, in both directions.
    Terminal,
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A stream that the guest has connected.
#[derive(Debug)]
pub struct Stream {
    /// Whose it is.
    pub process: ProcessId,
    /// Which it is.
    pub role: StreamRole,
    /// The connection; it blocks.
    pub connection: UnixStream,
}

/// Streams that are expected, and connections that have not said yet which they are.
#[derive(Debug, Default)]
pub struct Streams {
    expected: HashMap<StreamToken, (ProcessId, StreamRole)>,
    undecided: Vec<Undecided>,
}

#[derive(Debug)]
struct Undecided {
    connection: UnixStream,
    header: [u8; STREAM_HEADER_LEN],
    length: usize,
}

impl Streams {
    /// Expects the streams of a process: a terminal, or the pipes, of which standard input may be left out.
    pub fn expect(
        &mut self,
        process: ProcessId,
        terminal: Option<WindowSize>,
        null_stdin: bool,
    ) -> io::Result<StandardStreams> {
        let mut expect = |role| -> io::Result<StreamToken> {
            let token = new_token()?;
            self.expected.insert(token, (process, role));
            Ok(token)
        };
        Ok(match terminal {
            Some(WindowSize { rows, columns }) => {
                StandardStreams::Terminal { token: expect(StreamRole::Terminal)?, rows, columns }
            }
            None => StandardStreams::Pipes {
                stdin: if null_stdin { None } else { Some(expect(StreamRole::Stdin)?) },
                stdout: Some(expect(StreamRole::Stdout)?),
                stderr: Some(expect(StreamRole::Stderr)?),
            },
        })
    }

    /// Expects no streams of a process any more.
    pub fn forget(&mut self, process: ProcessId) {
        self.expected.retain(|_, (expected, _)| *expected != process);
    }

    /// Whether the next connection takes the place of the oldest undecided one.
    pub fn is_full(&self) -> bool {
        self.undecided.len() == MAX_UNDECIDED
    }

    /// Takes a connection whose header is to come.
    pub fn add(&mut self, connection: UnixStream) -> io::Result<()> {
        connection.set_nonblocking(true)?;
        if self.is_full() {
            // The agent sends the header at once: what is silent longest is least likely its.
            self.undecided.remove(0);
        }
        self.undecided.push(Undecided { connection, header: [0; STREAM_HEADER_LEN], length: 0 });
        Ok(())
    }

    /// The connections to poll for input.
    pub fn undecided(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.undecided.iter().map(|undecided| undecided.connection.as_fd())
    }

    /// Reads from all undecided connections, and returns the streams that are known now.
    pub fn receive(&mut self) -> Vec<Stream> {
        let mut known = Vec::new();
        for mut undecided in std::mem::take(&mut self.undecided) {
            match undecided.read() {
                Progress::Waiting => self.undecided.push(undecided),
                Progress::Whole => known.extend(self.identify(undecided)),
                Progress::Ended => {}
            }
        }
        known
    }

    fn identify(&mut self, undecided: Undecided) -> Option<Stream> {
        let token = StreamHeader::from_bytes(undecided.header).token;
        let (process, role) = self.expected.remove(&token)?;
        undecided.connection.set_nonblocking(false).ok()?;
        Some(Stream { process, role, connection: undecided.connection })
    }
}

enum Progress {
    Waiting,
    Whole,
    Ended,
}

impl Undecided {
    fn read(&mut self) -> Progress {
        while self.length < STREAM_HEADER_LEN {
            match self.connection.read(&mut self.header[self.length..]) {
                Ok(0) => return Progress::Ended,
                Ok(length) => self.length += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Progress::Ended,
            }
        }
        Progress::Whole
    }
}

fn new_token() -> io::Result<StreamToken> {
    let mut token = [0; STREAM_HEADER_LEN];
    // The system call itself: this process's root is the container's, where no /dev/urandom can be relied on.
    // SAFETY: the buffer is as long as it is said to be.
    let length = unsafe { libc::getrandom(token.as_mut_ptr().cast(), token.len(), 0) };
    // Up to 256 bytes are never cut short (getrandom(2)).
    if length == token.len().cast_signed() { Ok(StreamToken(token)) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn connection(streams: &mut Streams) -> UnixStream {
        let (host, guest) = UnixStream::pair().unwrap();
        streams.add(host).unwrap();
        guest
    }

    fn terminal(streams: &mut Streams, process: u32) -> StreamToken {
        match streams.expect(ProcessId(process), Some(WindowSize::default()), false).unwrap() {
            StandardStreams::Terminal { token, .. } => token,
            StandardStreams::Pipes { .. } => panic!("asked for a terminal"),
        }
    }

    #[test]
    fn a_connection_is_known_by_its_token_even_byte_by_byte() {
        let mut streams = Streams::default();
        let token = terminal(&mut streams, 7);
        let mut guest = connection(&mut streams);
        let header = StreamHeader { token };
        for byte in header.to_bytes() {
            assert!(streams.receive().is_empty());
            guest.write_all(&[byte]).unwrap();
        }
        guest.write_all(b"data").unwrap();
        let [stream] = streams.receive().try_into().unwrap();
        assert_eq!((stream.process, stream.role), (ProcessId(7), StreamRole::Terminal));
        let mut data = [0; 4];
        (&stream.connection).read_exact(&mut data).unwrap();
        assert_eq!(&data, b"data", "nothing after the header is swallowed");
    }

    #[test]
    fn a_null_input_is_no_stream() {
        let mut streams = Streams::default();
        let pipes = streams.expect(ProcessId(1), None, true).unwrap();
        assert!(matches!(pipes, StandardStreams::Pipes { stdin: None, stdout: Some(_), stderr: Some(_) }));
        let pipes = streams.expect(ProcessId(2), None, false).unwrap();
        assert!(matches!(pipes, StandardStreams::Pipes { stdin: Some(_), .. }));
    }

    #[test]
    fn a_token_counts_once_and_a_wrong_one_never() {
        let mut streams = Streams::default();
        let token = terminal(&mut streams, 1);
        for token in [token, token, StreamToken([0; 16])] {
            connection(&mut streams).write_all(&StreamHeader { token }.to_bytes()).unwrap();
        }
        assert_eq!(streams.receive().len(), 1);
        assert_eq!(streams.undecided().count(), 0);
    }

    #[test]
    fn a_forgotten_process_gets_no_stream() {
        let mut streams = Streams::default();
        let (first, second) = (terminal(&mut streams, 1), terminal(&mut streams, 2));
        streams.forget(ProcessId(1));
        for token in [first, second] {
            connection(&mut streams).write_all(&StreamHeader { token }.to_bytes()).unwrap();
        }
        let [stream] = streams.receive().try_into().unwrap();
        assert_eq!(stream.process, ProcessId(2));
    }

    #[test]
    fn silent_connections_do_not_keep_a_stream_out() {
        let mut streams = Streams::default();
        let token = terminal(&mut streams, 1);
        let _silent: Vec<_> = (0..MAX_UNDECIDED).map(|_| connection(&mut streams)).collect();
        let mut guest = connection(&mut streams);
        guest.write_all(&StreamHeader { token }.to_bytes()).unwrap();
        let [stream] = streams.receive().try_into().unwrap();
        assert_eq!(stream.process, ProcessId(1));
    }

    #[test]
    fn silent_connections_do_not_pile_up() {
        let mut streams = Streams::default();
        let guests: Vec<_> = (0..MAX_UNDECIDED * 2).map(|_| connection(&mut streams)).collect();
        assert!(streams.receive().is_empty());
        assert_eq!(streams.undecided().count(), MAX_UNDECIDED);
        drop(guests);
        assert!(streams.receive().is_empty());
        assert_eq!(streams.undecided().count(), 0);
    }
}
