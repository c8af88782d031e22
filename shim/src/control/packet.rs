//! One message with the file descriptors that go with it, on a `SOCK_SEQPACKET` socket.
//!
//! A packet is a byte that tells where the message is, and the message in postcard. A message that is too long
//! for a packet (the kernel wants it in few pages) travels in a memfd, which is then the first descriptor.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ControlError;

/// The longest message inside a packet.
const MAX_INLINE: usize = 32 << 10;
/// The longest message in a memfd.
const MAX_MESSAGE: usize = 8 << 20;
/// The most descriptors that go with one packet.
pub const MAX_DESCRIPTORS: usize = 16;

const INLINE: u8 = 0;
const IN_MEMFD: u8 = 1;

/// A message that arrived.
#[derive(Debug)]
pub struct Packet<T> {
    /// The message.
    pub message: T,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// Sends a message.
pub fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    let mut bytes = postcard::to_extend(message, vec![INLINE])?;
    let memfd = if bytes.len() > MAX_INLINE { Some(store(&bytes[1..])?) } else { None };
    if memfd.is_some() {
        bytes = vec![IN_MEMFD];
    }
    let fds: Vec<_> =
        memfd.iter().map(File::as_raw_fd).chain(descriptors.iter().map(|fd| fd.as_raw_fd())).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None) {
            Err(nix::errno::Errno::EINTR) => {}
            result => return result.map(drop).map_err(|errno| ControlError::Io(errno.into())),
        }
    }
}

/// Receives a message; none when the other end closed the connection.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<Packet<T>>, ControlError> {
    let mut bytes = vec![0; MAX_INLINE + 1];
    let (length, mut descriptors) = receive_bytes(socket.as_fd(), &mut bytes)?;
    let message = match bytes[..length].split_first() {
        None => return Ok(None),
        Some((&INLINE, body)) => postcard::from_bytes(body)?,
        Some((&IN_MEMFD, [])) if !descriptors.is_empty() => {
            postcard::from_bytes(&load(File::from(descriptors.remove(0)))?)?
        }
        Some(_) => return Err(ControlError::Malformed(postcard::Error::DeserializeBadEncoding)),
    };
    Ok(Some(Packet { message, descriptors }))
}

fn receive_bytes(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), ControlError> {
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS + 1]);
    let mut buffers = [IoSliceMut::new(bytes)];
    let received = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            result => break result.map_err(|errno| ControlError::Io(errno.into()))?,
        }
    };
    let mut descriptors = Vec::new();
    if let Ok(messages) = received.cmsgs() {
        for message in messages {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just made these descriptors for us, and nothing else owns them.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    if received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(ControlError::TooLarge);
    }
    Ok((received.bytes, descriptors))
}

fn store(bytes: &[u8]) -> Result<File, ControlError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ControlError::TooLarge);
    }
    let memfd = memfd_create("rvm-message", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    Ok(file)
}

fn load(file: File) -> Result<Vec<u8>, ControlError> {
    let metadata = file.metadata()?;
    // Reading anything but a plain file could block for ever.
    if !metadata.is_file() || metadata.len() > MAX_MESSAGE as u64 {
        return Err(ControlError::TooLarge);
    }
    let mut bytes = vec![0; metadata.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    use super::*;
    use crate::control::{Answer, Command};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (ours, theirs) = pair();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&ours, &Answer::Done, &[writer.as_fd()]).unwrap();
        drop(writer);
        let packet = receive::<Answer>(&theirs).unwrap().unwrap();
        assert!(matches!(packet.message, Answer::Done));
        let mut file = File::from(packet.descriptors.into_iter().next().unwrap());
        file.write_all(b"hello").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn messages_of_every_size_arrive() {
        for size in [0, 1, MAX_INLINE - 8, MAX_INLINE, MAX_INLINE + 1, 1 << 20] {
            let (ours, theirs) = pair();
            let text = "x".repeat(size);
            send(&ours, &Answer::Refused(text.as_str().into()), &[ours.as_fd()]).unwrap();
            let packet = receive::<Answer>(&theirs).unwrap().unwrap();
            assert!(matches!(packet.message, Answer::Refused(got) if got.words == text));
            assert_eq!(packet.descriptors.len(), 1, "the memfd is not among them");
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_both_ends() {
        let (ours, theirs) = pair();
        let error = send(&ours, &Answer::Refused("x".repeat(MAX_MESSAGE + 1).into()), &[]).unwrap_err();
        assert!(matches!(error, ControlError::TooLarge));

        let hostile = tempfile::tempfile().unwrap();
        hostile.set_len(1 << 40).unwrap();
        let rights = [hostile.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&[IN_MEMFD])], &rights, MsgFlags::empty(), None)
            .unwrap();
        assert!(matches!(receive::<Answer>(&theirs), Err(ControlError::TooLarge)));
    }

    #[test]
    fn a_pipe_in_the_place_of_a_memfd_does_not_block() {
        let (ours, theirs) = pair();
        let (reader, _writer) = io::pipe().unwrap();
        let rights = [reader.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&[IN_MEMFD])], &rights, MsgFlags::empty(), None)
            .unwrap();
        assert!(receive::<Answer>(&theirs).is_err());
    }

    #[test]
    fn a_closed_connection_is_no_message() {
        let (ours, theirs) = pair();
        drop(ours);
        assert!(receive::<Answer>(&theirs).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn no_packet_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 1..300)) {
            let (ours, theirs) = pair();
            sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&bytes)], &[], MsgFlags::empty(), None).unwrap();
            let _ = receive::<Command>(&theirs);
        }

        #[test]
        fn signals_survive(signal in any::<i32>(), all in any::<bool>()) {
            let (ours, theirs) = pair();
            send(&ours, &Command::Signal { signal, all }, &[]).unwrap();
            let packet = receive::<Command>(&theirs).unwrap().unwrap();
            let same = matches!(packet.message, Command::Signal { signal: s, all: a } if (s, a) == (signal, all));
            prop_assert!(same);
        }
    }
}
