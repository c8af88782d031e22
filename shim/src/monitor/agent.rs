//! The control connection to the agent in the guest: numbered requests out, replies and events in.
//!
//! Nothing here blocks. Requests that are made before the agent is up wait for it.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use rvm_protocol::{
    ClockReading, FrameError, FrameReader, FromAgent, Request, ToAgent, VERSION, frame, write_available,
};
use rvm_vmm::clock::GuestClock;

use crate::foreign::tame_message;

const READ_SIZE: usize = 64 << 10;
/// Number of the first request, which is made by itself. No other has it.
pub const GREETING: u64 = 0;

/// Why the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum AgentFailure {
    /// The agent closed it.
    #[error("the guest's agent closed its connection")]
    Closed,
    /// It broke, or the agent sent what is no message.
    #[error("the connection to the guest's agent failed: {0}")]
    Broken(#[from] FrameError),
    /// The agent is not of this version of rvm.
    #[error("the guest's agent speaks version {0} of the protocol, and this rvm version {VERSION}")]
    Version(u32),
    /// The host has no random bytes for it.
    #[error("the host has no random bytes for the guest")]
    NoEntropy,
    /// The first message was not the one it has to be.
    #[error("the guest's agent did not say first that it is ready")]
    NotReady,
}

/// A request was not made; the connection is as good as before.
#[derive(Debug, thiserror::Error)]
#[error("the request cannot be sent to the guest: {0}")]
pub struct Unsendable(FrameError);

/// The connection, from before it exists.
#[derive(Debug, Default)]
pub struct Agent {
    stream: Option<UnixStream>,
    incoming: FrameReader,
    outgoing: Vec<u8>,
    requests: u64,
    ready: bool,
    clock: GuestClock,
    /// Whether the guest goes on from a template.
    goes_on: bool,
}

impl Agent {
    /// The agent of a guest that is told what time it is by this clock, and may go on from a template.
    pub fn new(clock: GuestClock, goes_on: bool) -> Agent {
        Agent { clock, goes_on, ..Agent::default() }
    }

    /// Whether the guest has connected.
    pub fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    /// Takes the guest's connection.
    pub fn connect(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Gives the connection up.
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// What to poll for, once there is a connection.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::POLLIN;
        if self.ready && !self.outgoing.is_empty() {
            flags |= PollFlags::POLLOUT;
        }
        Some((self.stream.as_ref()?.as_fd(), flags))
    }

    /// Queues a request and returns its number. [`flush`](Self::flush) sends it, at once or as soon as the agent
    /// is up.
    pub fn request(&mut self, body: Request) -> Result<u64, Unsendable> {
        self.requests += 1;
        let request = self.requests;
        self.outgoing.extend(frame::encode(&ToAgent { request, body }).map_err(Unsendable)?);
        Ok(request)
    }

    /// Writes what waits to be written, as far as the connection takes it.
    pub fn flush(&mut self) -> Result<(), AgentFailure> {
        let Some(stream) = self.stream.as_mut().filter(|_| self.ready) else { return Ok(()) };
        write_available(stream, &mut self.outgoing).map_err(|error| FrameError::from(error).into())
    }

    /// Reads once, and returns the messages that are whole now.
    pub fn receive(&mut self) -> Result<Vec<FromAgent>, AgentFailure> {
        let Some(stream) = self.stream.as_mut() else { return Ok(Vec::new()) };
        let mut buffer = vec![0; READ_SIZE];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(AgentFailure::Closed),
            Ok(length) => self.incoming.push(&buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(FrameError::from(error).into()),
        }
        let mut messages = Vec::new();
        while let Some(message) = self.incoming.next_message()? {
            self.check_order(&message)?;
            messages.push(tame_message(message));
        }
        self.flush()?;
        Ok(messages)
    }

    fn check_order(&mut self, message: &FromAgent) -> Result<(), AgentFailure> {
        match message {
            FromAgent::Ready { version, .. } if *version != VERSION => Err(AgentFailure::Version(*version)),
            FromAgent::Ready { .. } => {
                self.ready = true;
                self.greet()
            }
            _ if self.ready => Ok(()),
            _ => Err(AgentFailure::NotReady),
        }
    }
}

impl Agent {
    /// What time it is, for the guest.
    pub fn time(&self) -> ClockReading {
        let rvm_vmm::clock::ClockReading { realtime, counter, khz } = self.clock.read();
        ClockReading { realtime, counter, khz }
    }

    /// Before all that waits to be sent, has the guest put its clock right, which has lost time while its kernel came up,
    /// or stood still in a template. One that goes on from a template becomes one of its own, too.
    fn greet(&mut self) -> Result<(), AgentFailure> {
        let clock = self.time();
        let body = match self.goes_on {
            false => Request::SetClock(clock),
            true => Request::Awaken { entropy: entropy()?, clock },
        };
        let greeting = frame::encode(&ToAgent { request: GREETING, body })?;
        let waiting = std::mem::replace(&mut self.outgoing, greeting);
        self.outgoing.extend(waiting);
        Ok(())
    }
}

/// Random bytes that nobody else gets.
fn entropy() -> Result<[[u8; 32]; 2], AgentFailure> {
    let mut entropy = [[0; 32]; 2];
    getrandom::fill(entropy.as_flattened_mut()).map_err(|_| AgentFailure::NoEntropy)?;
    Ok(entropy)
}

#[cfg(test)]
mod tests {
    use rvm_protocol::{Reply, read_frame, write_frame};

    use super::*;

    fn connected() -> (Agent, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        let mut agent = Agent::default();
        agent.connect(ours).unwrap();
        (agent, guest)
    }

    fn ready() -> FromAgent {
        FromAgent::Ready { version: VERSION, kernel: "6.12".into() }
    }

    #[test]
    fn requests_wait_until_the_agent_is_up() {
        let mut agent = Agent::default();
        let number = agent.request(Request::List).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        agent.connect(ours).unwrap();
        agent.flush().unwrap();
        guest.set_nonblocking(true).unwrap();
        assert!(guest.read(&mut [0]).is_err(), "nothing was sent yet");
        guest.set_nonblocking(false).unwrap();

        write_frame(&mut guest, &ready()).unwrap();
        assert_eq!(agent.receive().unwrap(), [ready()]);
        let greeting: ToAgent = read_frame(&mut guest).unwrap();
        assert!(matches!(greeting.body, Request::SetClock(_)), "{greeting:?}");
        let request: ToAgent = read_frame(&mut guest).unwrap();
        assert_eq!(request, ToAgent { request: number, body: Request::List });
    }

    #[test]
    fn a_request_that_is_too_large_harms_no_other() {
        let (mut agent, mut guest) = connected();
        write_frame(&mut guest, &ready()).unwrap();
        agent.receive().unwrap();
        let _greeting: ToAgent = read_frame(&mut guest).unwrap();
        let resources = " ".repeat(rvm_protocol::MAX_FRAME);
        assert!(agent.request(Request::Update { resources }).is_err());
        let number = agent.request(Request::List).unwrap();
        agent.flush().unwrap();
        let request: ToAgent = read_frame(&mut guest).unwrap();
        assert_eq!(request, ToAgent { request: number, body: Request::List });
    }

    #[test]
    fn a_guest_from_a_template_is_awakened_before_all_else() {
        let mut agent = Agent::new(GuestClock::default(), true);
        let number = agent.request(Request::List).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        agent.connect(ours).unwrap();
        write_frame(&mut guest, &ready()).unwrap();
        agent.receive().unwrap();
        let first: ToAgent = read_frame(&mut guest).unwrap();
        let Request::Awaken { entropy: [one, other], clock } = first.body else { panic!("{first:?}") };
        assert!(clock.realtime > 0);
        assert_ne!(one, other);
        let second: ToAgent = read_frame(&mut guest).unwrap();
        assert_eq!(second, ToAgent { request: number, body: Request::List });
    }

    #[test]
    fn an_agent_of_another_version_is_refused() {
        let (mut agent, mut guest) = connected();
        write_frame(&mut guest, &FromAgent::Ready { version: VERSION + 1, kernel: String::new() }).unwrap();
        assert!(matches!(agent.receive(), Err(AgentFailure::Version(_))));
    }

    #[test]
    fn a_guest_that_does_not_begin_with_ready_is_refused() {
        let (mut agent, mut guest) = connected();
        write_frame(&mut guest, &FromAgent::Reply { request: 1, result: Ok(Reply::Done) }).unwrap();
        assert!(matches!(agent.receive(), Err(AgentFailure::NotReady)));
    }

    #[test]
    fn the_end_of_the_connection_is_seen() {
        let (mut agent, guest) = connected();
        assert_eq!(agent.receive().unwrap(), []);
        drop(guest);
        assert!(matches!(agent.receive(), Err(AgentFailure::Closed)));
    }
}
