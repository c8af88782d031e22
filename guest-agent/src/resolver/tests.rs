//! The resolver between programs and a host, both played by the test.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use proptest::prelude::*;
use rvm_protocol::{LookupReader, RESOLVER_PORT};

use super::*;

/// A host whose ends of connections the test takes.
#[derive(Default)]
struct Monitor {
    connections: RefCell<Vec<UnixStream>>,
    refuses: bool,
}

impl Host for Monitor {
    fn connect(&self, port: u32) -> nix::Result<OwnedFd> {
        assert_eq!(port, RESOLVER_PORT);
        if self.refuses {
            return Err(Errno::ECONNREFUSED);
        }
        let (guest, monitor) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        monitor.set_nonblocking(true).unwrap();
        self.connections.borrow_mut().push(monitor);
        Ok(guest.into())
    }
}

struct Guest {
    poller: Poller,
    resolver: Resolver,
    monitor: Monitor,
}

impl Guest {
    fn new() -> Guest {
        let poller = Poller::new().unwrap();
        let resolver = Resolver::listen(&poller, Ipv4Addr::LOCALHOST).unwrap();
        Guest { poller, resolver, monitor: Monitor::default() }
    }

    /// Lets the resolver act until it has nothing to do for a moment.
    fn act(&mut self) {
        loop {
            let events = self.poller.wait(Some(Duration::from_millis(30))).unwrap();
            if events.is_empty() {
                return;
            }
            for (target, ready) in events {
                let control = [Target::Control, Target::Signals, Target::Memory];
                assert!(!control.contains(&target), "{target:?} is none of its own");
                self.resolver.on_event(target, ready, &self.monitor, &self.poller);
            }
        }
    }

    /// What the host is asked by now.
    fn asked(&mut self) -> Vec<Lookup> {
        self.act();
        let mut reader = LookupReader::default();
        if let Some(mut connection) = self.monitor.connections.borrow().last() {
            let mut bytes = vec![0; 1 << 20];
            while let Ok(length @ 1..) = connection.read(&mut bytes) {
                reader.push(&bytes[..length]);
            }
        }
        reader.take().unwrap()
    }

    fn answer(&mut self, query: &Lookup, message: &[u8]) {
        let answer = Lookup { message: message.to_vec(), ..query.clone() };
        self.monitor.connections.borrow().last().unwrap().write_all(&answer.to_bytes()).unwrap();
        self.act();
    }

    fn program(&self) -> UdpSocket {
        let program = UdpSocket::bind("127.0.0.1:0").unwrap();
        program.connect(self.resolver.datagrams.local_addr().unwrap()).unwrap();
        program.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        program
    }

    fn tcp_program(&self) -> TcpStream {
        let program = TcpStream::connect(self.resolver.listener.local_addr().unwrap()).unwrap();
        program.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        program
    }
}

fn received(program: &UdpSocket) -> Vec<u8> {
    let mut message = [0; 512];
    let length = program.recv(&mut message).unwrap();
    message[..length].to_vec()
}

#[test]
fn each_program_gets_the_answer_to_its_own_question() {
    let mut guest = Guest::new();
    let programs = [guest.program(), guest.program()];
    programs[0].send(b"first").unwrap();
    let [first] = guest.asked().try_into().unwrap();
    programs[1].send(b"second").unwrap();
    let [second] = guest.asked().try_into().unwrap();
    assert_eq!((first.message.as_slice(), second.message.as_slice()), (&b"first"[..], &b"second"[..]));
    guest.answer(&second, b"to the second");
    guest.answer(&first, b"to the first");
    assert_eq!(
        (received(&programs[0]), received(&programs[1])),
        (b"to the first".into(), b"to the second".into())
    );
    assert_eq!(guest.monitor.connections.borrow().len(), 1, "one connection serves all");
}

#[test]
fn an_answer_to_nothing_is_dropped() {
    let mut guest = Guest::new();
    let program = guest.program();
    program.send(b"question").unwrap();
    let [query] = guest.asked().try_into().unwrap();
    guest.answer(&Lookup { number: 99, ..query.clone() }, b"nobody's");
    guest.answer(&query, b"answer");
    guest.answer(&query, b"once more");
    assert_eq!(received(&program), b"answer");
    program.set_nonblocking(true).unwrap();
    assert!(program.recv(&mut [0]).is_err());
}

#[test]
fn a_connection_asks_several_times_and_stays_for_the_answers() {
    let mut guest = Guest::new();
    let mut program = guest.tcp_program();
    program.write_all(b"\x00").unwrap();
    assert!(guest.asked().is_empty());
    program.write_all(b"\x03one\x00\x03two\x00").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    let [one, two] = guest.asked().try_into().unwrap();
    assert_eq!((one.transport, one.message.as_slice()), (Transport::Tcp, &b"one"[..]));
    guest.answer(&one, &[b'1'; 300]);
    guest.answer(&two, b"2");
    let mut answers = Vec::new();
    program.read_to_end(&mut answers).unwrap();
    assert_eq!(answers, [&b"\x01\x2c"[..], &[b'1'; 300], b"\x00\x012"].concat());
    assert!(guest.resolver.clients.is_empty());
}

#[test]
fn a_lost_connection_to_the_host_is_made_again_with_the_next_question() {
    let mut guest = Guest::new();
    let program = guest.program();
    let mut waiting = guest.tcp_program();
    waiting.write_all(b"\x00\x01w").unwrap();
    program.send(b"first").unwrap();
    assert_eq!(guest.asked().len(), 2);
    guest.monitor.connections.borrow_mut().clear();
    guest.act();
    assert_eq!(waiting.read(&mut [0]).unwrap(), 0, "it will get no answer, and is told");
    program.send(b"second").unwrap();
    let [query] = guest.asked().try_into().unwrap();
    guest.answer(&query, b"answer");
    assert_eq!(received(&program), b"answer");
}

#[test]
fn garbage_from_the_host_ends_the_connection() {
    let mut guest = Guest::new();
    let program = guest.program();
    program.send(b"first").unwrap();
    guest.asked();
    (&guest.monitor.connections.borrow()[0]).write_all(&[0xff; 64]).unwrap();
    guest.act();
    assert!(guest.resolver.asked.is_empty());
}

#[test]
fn without_a_host_nothing_piles_up() {
    let mut guest = Guest::new();
    guest.monitor.refuses = true;
    let program = guest.program();
    program.send(b"question").unwrap();
    guest.act();
    assert!(guest.resolver.asked.is_empty());
}

#[test]
fn floods_are_bounded() {
    let mut guest = Guest::new();
    let program = guest.program();
    for _ in 0..40 {
        for _ in 0..50 {
            program.send(&[7; 400]).unwrap();
        }
        // The host takes none of it.
        guest.act();
    }
    assert!(guest.resolver.asked.len() <= MAX_ASKED, "{}", guest.resolver.asked.len());

    let connections: Vec<_> = (0..MAX_CLIENTS + 8).map(|_| guest.tcp_program()).collect();
    guest.act();
    assert_eq!(guest.resolver.clients.len(), MAX_CLIENTS);
    let mut oldest = &connections[0];
    assert_eq!(oldest.read(&mut [0]).unwrap(), 0, "it was closed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Messages over a connection are told apart as their lengths say, however they are cut; a rest is no message.
    #[test]
    fn whatever_comes_over_a_connection_is_told_apart(bytes in proptest::collection::vec(any::<u8>(), 1..400), cut in 1..40_usize) {
        let (listener, mut expected, mut rest) = (TcpListener::bind("127.0.0.1:0").unwrap(), Vec::new(), &bytes[..]);
        while let Some((&length, body)) = rest.split_first_chunk::<2>()
            && let Some((message, behind)) = body.split_at_checked(u16::from_be_bytes(length).into())
        {
            expected.push(message.to_vec());
            rest = behind;
        }
        let mut program = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut client = Client::new(0, listener.accept().unwrap().0).unwrap();
        let mut found = Vec::new();
        for piece in bytes.chunks(cut) {
            program.write_all(piece).unwrap();
            found.extend(client.read().unwrap());
        }
        drop(program);
        while !client.has_ended() {
            found.extend(client.read().unwrap());
        }
        prop_assert_eq!(found, expected);
    }
}
