//! The set-up channel between the agent and a child that has not executed its program yet.
//!
//! A pair of packet sockets. The agent says *go* when it has done what only it can do from outside. The
//! child may send a terminal; it sends an error if a step fails; and `execve` closes its end. So does its death:
//! whether a program runs is then asked of the kernel.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use nix::unistd;
use rvm_protocol::{AgentError, FrameReader, frame};

use crate::error::{Context, Result, other};

const GO: u8 = b'G';
const TERMINAL: u8 = b'T';
const ERROR: u8 = b'E';

/// An error's message is cut to this, which a packet socket takes for certain.
const MAX_MESSAGE: usize = 8 << 10;

/// What comes on top of an error's message: this channel's letter, the frame, the kind, the message's length.
const OVERHEAD: usize = 32;

/// What a child says.
#[derive(Debug)]
pub enum Message {
    /// Here is the master of the terminal.
    Terminal(OwnedFd),
    /// A step failed; the child ends.
    Failed(AgentError),
    /// The program runs, or the child has ended without a word.
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
        let mut bytes = vec![0; MAX_MESSAGE + OVERHEAD];
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

    /// Tells what went wrong. There is nobody to tell if that fails too. By now a seccomp filter may be in force:
    /// more of them allow write(2) than sendmsg(2).
    pub fn send_error(&self, error: &AgentError) {
        let _ = unistd::write(&self.0, &encode_error(error));
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
    let mut error = error.clone();
    let whole = |end: &usize| error.message.is_char_boundary(*end);
    let end = (0..=MAX_MESSAGE.min(error.message.len())).rev().find(whole).unwrap_or(0);
    error.message.truncate(end);
    let mut bytes = vec![ERROR];
    // What is cut to that length can be encoded.
    bytes.extend(frame::encode(&error).unwrap_or_default());
    bytes
}

fn decode(bytes: &[u8], descriptor: Option<OwnedFd>) -> Message {
    match (bytes, descriptor) {
        ([TERMINAL], Some(master)) => Message::Terminal(master),
        ([ERROR, error @ ..], _) => Message::Failed(decode_error(error)),
        ([], _) => Message::Closed,
        _ => Message::Failed(nonsense()),
    }
}

fn decode_error(bytes: &[u8]) -> AgentError {
    let mut reader = FrameReader::new();
    reader.push(bytes);
    reader.next_message().ok().flatten().unwrap_or_else(nonsense)
}

fn nonsense() -> AgentError {
    other("the process's set-up sent what makes no sense")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rvm_protocol::AgentErrorKind;

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
