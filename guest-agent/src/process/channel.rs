//! The set-up channel between the agent and a child that has not executed its program yet.
//!
//! A pair of packet sockets. The agent says *go* when it has done what only it can do from outside. The
//! child may send a terminal; it sends an error if a step fails; and `execve` closes its end, which tells the
//! agent that the program runs.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use rvm_protocol::{AgentError, AgentErrorKind};

use crate::error::{Context, Result, other};

const GO: u8 = b'G';
const TERMINAL: u8 = b'T';
const ERROR: u8 = b'E';

/// An error's message is cut to this, which a packet socket takes for certain.
const MAX_MESSAGE: usize = 8 << 10;

/// What a child says.
#[derive(Debug)]
pub enum Message {
    /// Here is the master of the terminal.
    Terminal(OwnedFd),
    /// A step failed; the child ends.
    Failed(AgentError),
    /// The program runs, or the child was killed: its end will tell.
    Closed,
}

/// The agent's end and the child's end of a new channel.
pub fn pair() -> Result<(AgentEnd, ChildEnd)> {
    let (agent, child) =
        socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .context(|| "making the set-up channel of the process")?;
    Ok((AgentEnd(agent), ChildEnd(child)))
}

/// The agent's end.
pub struct AgentEnd(pub OwnedFd);

impl AgentEnd {
    /// Lets the child go on.
    pub fn go(&self) -> Result<()> {
        send(&self.0, &[GO], None).context(|| "letting the process go on")
    }

    /// The next message, if there is one.
    pub fn receive(&self) -> Option<Message> {
        let mut bytes = vec![0; MAX_MESSAGE + 2];
        match receive(&self.0, &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok((length, descriptor)) => Some(decode(&bytes[..length], descriptor)),
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            Err(_) => Some(Message::Closed),
        }
    }
}

/// The child's end.
pub struct ChildEnd(pub OwnedFd);

impl ChildEnd {
    /// Waits until the agent has done its part.
    pub fn wait(&self) -> Result<()> {
        let mut byte = [0];
        match receive(&self.0, &mut byte, MsgFlags::empty()).context(|| "waiting for the agent")? {
            (1, _) if byte[0] == GO => Ok(()),
            _ => Err(other("the agent gave the process up")),
        }
    }

    /// Hands the master of the terminal over.
    pub fn send_terminal(&self, master: &OwnedFd) -> Result<()> {
        send(&self.0, &[TERMINAL], Some(master.as_raw_fd())).context(|| "handing the terminal over")
    }

    /// Tells what went wrong. There is nobody to tell if that fails too.
    pub fn send_error(&self, error: &AgentError) {
        let _ = send(&self.0, &encode_error(error), None);
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptor: Option<RawFd>) -> nix::Result<()> {
    let descriptors: Vec<RawFd> = descriptor.into_iter().collect();
    let control = [ControlMessage::ScmRights(&descriptors)];
    let control = if descriptors.is_empty() { &control[..0] } else { &control[..] };
    let data = [IoSlice::new(bytes)];
    socket::sendmsg::<UnixAddr>(socket.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

fn receive(socket: &OwnedFd, bytes: &mut [u8], flags: MsgFlags) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; 1]);
    let mut data = [IoSliceMut::new(bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = socket::recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let mut found = None;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel has just made this descriptor for this process; nothing else owns it.
                found = Some(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
        }
    }
    Ok((received.bytes, found))
}

fn encode_error(error: &AgentError) -> Vec<u8> {
    let kind = match error.kind {
        AgentErrorKind::NotFound => 0,
        AgentErrorKind::NotExecutable => 1,
        AgentErrorKind::NoSuchProcess => 2,
        AgentErrorKind::Other => 3,
    };
    let text = error.message.as_bytes();
    let mut bytes = vec![ERROR, kind];
    bytes.extend_from_slice(&text[..text.len().min(MAX_MESSAGE)]);
    bytes
}

fn decode(bytes: &[u8], descriptor: Option<OwnedFd>) -> Message {
    match (bytes, descriptor) {
        ([TERMINAL], Some(master)) => Message::Terminal(master),
        ([ERROR, kind, text @ ..], _) => Message::Failed(AgentError {
            kind: match kind {
                0 => AgentErrorKind::NotFound,
                1 => AgentErrorKind::NotExecutable,
                2 => AgentErrorKind::NoSuchProcess,
                _ => AgentErrorKind::Other,
            },
            message: String::from_utf8_lossy(text).into_owned(),
        }),
        ([], _) => Message::Closed,
        _ => Message::Failed(other("the process's set-up sent what makes no sense")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_error_arrives_with_its_kind() {
        let (agent, child) = pair().unwrap();
        assert!(agent.receive().is_none());
        let error = AgentError { kind: AgentErrorKind::NotExecutable, message: "no".into() };
        child.send_error(&error);
        assert!(matches!(agent.receive(), Some(Message::Failed(received)) if received == error));
    }

    #[test]
    fn a_closed_end_is_told_from_silence() {
        let (agent, child) = pair().unwrap();
        assert!(agent.receive().is_none());
        drop(child);
        assert!(matches!(agent.receive(), Some(Message::Closed)));
    }

    #[test]
    fn a_descriptor_arrives() {
        let (agent, child) = pair().unwrap();
        child.send_terminal(&std::fs::File::open("/dev/null").unwrap().into()).unwrap();
        assert!(matches!(agent.receive(), Some(Message::Terminal(_))));
    }

    #[test]
    fn a_child_that_is_given_up_does_not_go_on() {
        let (agent, child) = pair().unwrap();
        agent.go().unwrap();
        child.wait().unwrap();
        drop(agent);
        assert!(child.wait().is_err());
    }

    #[test]
    fn a_very_long_message_is_cut() {
        let (agent, child) = pair().unwrap();
        child.send_error(&other("x".repeat(1 << 20)));
        assert!(
            matches!(agent.receive(), Some(Message::Failed(error)) if error.message.len() == MAX_MESSAGE)
        );
    }

    proptest! {
        #[test]
        fn no_message_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&bytes, None);
        }
    }
}
