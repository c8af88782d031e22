use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::process::terminal::Terminal;

const TOKEN: [u8; 16] = [7; 16];
const CONNECTED: EpollFlags = EpollFlags::EPOLLOUT;
const READABLE: EpollFlags = EpollFlags::EPOLLIN;

/// A stream whose connection is still under way, and the host's end of it.
fn stream(direction: Direction, local: Option<OwnedFd>) -> (Stream, UnixStream) {
    let (host, guest) = UnixStream::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    (Stream::new(StreamId(1), direction, guest.into(), local, StreamToken(TOKEN)), host)
}

fn output() -> (Stream, UnixStream, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader: OwnedFd = reader.into();
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&reader, flags).unwrap();
    let (stream, host) = stream(Direction::Output, Some(reader));
    (stream, host, writer)
}

fn receive(host: &mut UnixStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, expected);
}

fn assert_closed(host: &mut UnixStream) {
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_input_that_ends_before_it_is_connected_is_still_announced() {
    let poller = Poller::new().unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let (mut stream, mut host) = stream(Direction::Input, Some(writer.into()));
    stream.process_ended();
    stream.arm(&poller).unwrap();
    assert!(!stream.is_settled() && !stream.is_finished());
    stream.on_connection(CONNECTED);
    stream.arm(&poller).unwrap();
    receive(&mut host, &TOKEN);
    assert_closed(&mut host);
    assert!(stream.is_settled() && stream.is_finished());
}

#[test]
fn an_input_that_nobody_reads_is_announced_too() {
    let poller = Poller::new().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut stream, mut host) = stream(Direction::Input, Some(writer.into()));
    drop(reader);
    stream.on_local(EpollFlags::EPOLLERR);
    stream.on_connection(CONNECTED);
    stream.arm(&poller).unwrap();
    receive(&mut host, &TOKEN);
    assert_closed(&mut host);
}

#[test]
fn what_descendants_write_follows_what_the_process_wrote() {
    let poller = Poller::new().unwrap();
    let (mut stream, mut host, mut writer) = output();
    writer.write_all(b"own").unwrap();
    stream.process_ended();
    assert!(!stream.is_settled(), "nothing is sent yet");
    stream.on_connection(CONNECTED);
    assert!(stream.is_settled(), "the process's own output is sent");
    writer.write_all(b"late").unwrap();
    stream.on_local(READABLE);
    drop(writer);
    stream.on_local(EpollFlags::EPOLLHUP);
    stream.arm(&poller).unwrap();
    receive(&mut host, &[&TOKEN[..], b"ownlate"].concat());
    assert_closed(&mut host);
    assert!(stream.is_finished());
}

#[test]
fn the_grace_of_descendants_ends() {
    let poller = Poller::new().unwrap();
    let (mut stream, mut host, mut writer) = output();
    stream.on_connection(CONNECTED);
    assert_eq!(stream.deadline(), None);
    writer.write_all(b"own").unwrap();
    stream.process_ended();
    assert!(stream.deadline().is_some());
    stream.expire();
    stream.arm(&poller).unwrap();
    assert_eq!(stream.deadline(), None);
    receive(&mut host, &[&TOKEN[..], b"own"].concat());
    assert_closed(&mut host);
    // A daemon may write on, into the void.
    writer.write_all(b"daemon").unwrap();
    stream.on_local(READABLE);
    assert!(!stream.is_finished());
}

#[test]
fn what_is_owed_is_read_even_after_the_grace() {
    let poller = Poller::new().unwrap();
    let (mut stream, mut host, mut writer) = output();
    // With the header the buffer cannot hold all of it at once.
    let own = vec![b'o'; CAPACITY];
    writer.write_all(&own).unwrap();
    stream.process_ended();
    stream.expire();
    assert!(!stream.is_settled());
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        bytes
    });
    while stream.connection.is_some() {
        stream.on_connection(CONNECTED);
        stream.on_local(READABLE);
        stream.arm(&poller).unwrap();
    }
    assert_eq!(reader.join().unwrap().len(), STREAM_HEADER_LEN + CAPACITY);
    // The daemon's end of the pipe is still open.
    writer.write_all(b"daemon").unwrap();
}

#[test]
fn a_terminal_outlives_a_moment_without_anybody_at_it() {
    let poller = Poller::new().unwrap();
    let root = crate::container::tree::Tree::open(std::path::Path::new("/")).unwrap();
    let Terminal { master, slave } = Terminal::open(&root).unwrap();
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&master, flags).unwrap();
    let again = master.try_clone().unwrap();
    let (mut stream, mut host) = stream(Direction::Terminal, None);
    stream.set_terminal(master);
    stream.on_connection(CONNECTED);
    drop(slave);
    stream.on_local(EpollFlags::EPOLLHUP);
    stream.arm(&poller).unwrap();
    // The hang-up is told once, and not again and again.
    while !poller.wait(Some(Duration::ZERO)).unwrap().is_empty() {
        stream.on_local(EpollFlags::EPOLLHUP);
        stream.arm(&poller).unwrap();
    }
    let slave = crate::sys::process::open_terminal_peer(&again).unwrap();
    std::fs::File::from(slave.try_clone().unwrap()).write_all(b"back").unwrap();
    assert!(!poller.wait(None).unwrap().is_empty());
    stream.on_local(READABLE);
    receive(&mut host, &[&TOKEN[..], b"back"].concat());
}
