//! A guest's resolver and a name server, both played by the test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const QUERY: [u8; 16] = *b"\x12\x34\x01\x00\0\x01\0\0\0\0\0\0name";

/// A name server over UDP, one over TCP at the same port, and a guest that asks them.
struct Names {
    udp: UdpSocket,
    tcp: TcpListener,
    resolver: Resolver,
    guest: UnixStream,
    reader: LookupReader,
}

impl Names {
    fn new() -> Names {
        // The port that the kernel gives for one may be taken for the other.
        let (udp, tcp, server) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            let SocketAddr::V4(server) = udp.local_addr().unwrap() else { unreachable!() };
            if let Ok(tcp) = TcpListener::bind(server) {
                break (udp, tcp, server);
            }
        };
        udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let resolver = Resolver::asking(server).unwrap();
        let guest = connect(&resolver);
        Names { udp, tcp, resolver, guest, reader: LookupReader::default() }
    }

    fn ask(&mut self, number: u32, transport: Transport) {
        let lookup = Lookup { number, transport, message: query(number) };
        self.guest.write_all(&lookup.to_bytes()).unwrap();
    }

    /// A datagram that has arrived at the server.
    fn asked(&self) -> (Vec<u8>, SocketAddr) {
        let mut message = [0; 512];
        let (length, from) = self.udp.recv_from(&mut message).unwrap();
        (message[..length].to_vec(), from)
    }

    fn answer_one(&self) {
        let (query, from) = self.asked();
        self.udp.send_to(&response(&query), from).unwrap();
    }

    fn answered(&mut self) -> Lookup {
        loop {
            if let Some(lookup) = self.reader.take().unwrap().into_iter().next() {
                return lookup;
            }
            let mut bytes = [0; 4096];
            let length = self.guest.read(&mut bytes).unwrap();
            assert_ne!(length, 0, "the connection was closed");
            self.reader.push(&bytes[..length]);
        }
    }
}

fn connect(resolver: &Resolver) -> UnixStream {
    let (guest, host) = UnixStream::pair().unwrap();
    guest.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    resolver.serve(host).unwrap();
    guest
}

/// A query with a number of its own, as programs draw them.
fn query(number: u32) -> Vec<u8> {
    let mut query = QUERY.to_vec();
    query[..2].copy_from_slice(&(number as u16).to_be_bytes());
    query
}

fn response(query: &[u8]) -> Vec<u8> {
    let mut response = query.to_vec();
    response[2] |= 0x80;
    response.extend(b"address");
    response
}

#[test]
fn a_datagram_is_answered_and_each_comes_from_another_port() {
    let mut names = Names::new();
    let mut ports = Vec::new();
    for number in 0..40 {
        names.ask(number, Transport::Udp);
        let (query, from) = names.asked();
        names.udp.send_to(&response(&query), from).unwrap();
        let answer = names.answered();
        assert_eq!((answer.number, &answer.message), (number, &response(&query)));
        ports.push(from.port());
    }
    ports.dedup();
    assert!(ports.len() > 30, "{ports:?}");
}

#[test]
fn what_is_not_the_answer_is_not_passed_on() {
    let mut names = Names::new();
    names.ask(1, Transport::Udp);
    let (asked, from) = names.asked();
    for wrong in [b"".to_vec(), b"short".to_vec(), asked.clone(), response(&query(2))] {
        names.udp.send_to(&wrong, from).unwrap();
    }
    names.udp.send_to(&response(&asked), from).unwrap();
    assert_eq!(names.answered().message, response(&asked));
}

#[test]
fn a_flood_costs_the_oldest_questions_their_answers_and_nothing_else() {
    let mut names = Names::new();
    for number in 0..100 {
        names.ask(number, Transport::Udp);
    }
    let mut last = names.asked();
    while last.0 != query(99) {
        last = names.asked();
    }
    names.udp.send_to(&response(&last.0), last.1).unwrap();
    assert_eq!(names.answered().number, 99);
}

#[test]
fn many_connections_share_few_sockets() {
    let mut names = Names::new();
    for number in 0..20 {
        names.ask(number, Transport::Tcp);
    }
    for _ in 0..20 {
        let (mut stream, _) = names.tcp.accept().unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut query).unwrap();
        let mut message = response(&query);
        message.resize(40_000, 7);
        // In pieces, as a long answer comes.
        stream.write_all(&(message.len() as u16).to_be_bytes()[..1]).unwrap();
        stream.write_all(&(message.len() as u16).to_be_bytes()[1..]).unwrap();
        stream.write_all(&message[..20_000]).unwrap();
        stream.write_all(&message[20_000..]).unwrap();
        let answer = names.answered();
        assert_eq!((answer.message, answer.transport), (message, Transport::Tcp));
    }
}

#[test]
fn a_server_that_is_gone_is_said_at_once_and_one_that_comes_back_is_asked() {
    let Names { udp, tcp, resolver: _resolver, guest, reader } = Names::new();
    let server = udp.local_addr().unwrap();
    drop((udp, tcp));
    let ask = |guest: &mut UnixStream, transport| {
        let lookup = Lookup { number: 5, transport, message: query(5) };
        guest.write_all(&lookup.to_bytes()).unwrap();
    };
    let (mut guest, mut reader) = (guest, reader);
    let answer = |guest: &mut UnixStream, reader: &mut LookupReader| loop {
        if let Some(lookup) = reader.take().unwrap().into_iter().next() {
            break lookup;
        }
        let mut bytes = [0; 4096];
        let length = guest.read(&mut bytes).unwrap();
        reader.push(&bytes[..length]);
    };
    for transport in [Transport::Udp, Transport::Tcp] {
        ask(&mut guest, transport);
        assert_eq!(answer(&mut guest, &mut reader).message[3] & 15, 2, "SERVFAIL");
    }
    let udp = UdpSocket::bind(server).unwrap();
    ask(&mut guest, Transport::Udp);
    let mut message = [0; 512];
    let (length, from) = udp.recv_from(&mut message).unwrap();
    udp.send_to(&response(&message[..length]), from).unwrap();
    assert_eq!(answer(&mut guest, &mut reader).message, response(&query(5)));
}

#[test]
fn a_server_that_breaks_off_has_failed() {
    let mut names = Names::new();
    for broken in [&b"\x00"[..], &b"\x00\x05short"[..], &b"\xff\xffhalf"[..]] {
        names.ask(3, Transport::Tcp);
        let (mut stream, _) = names.tcp.accept().unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(broken).unwrap();
        drop(stream);
        assert_eq!(names.answered().message[3] & 15, 2, "SERVFAIL");
    }
}

#[test]
fn a_guest_that_takes_no_answers_holds_up_itself_alone() {
    let mut names = Names::new();
    names.udp.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut answers = 0;
    while answers < 5000 {
        names.ask(1, Transport::Udp);
        let mut message = [0; 512];
        // Queries that are not read any more wait in the guest's connection.
        let Ok((_, from)) = names.udp.recv_from(&mut message) else { break };
        names.udp.send_to(&[response(&query(1)), vec![7; 4000]].concat(), from).unwrap();
        answers += 1;
    }
    assert!(answers < 1000, "{answers} answers wait");
}

#[test]
fn one_connection_at_a_time_and_the_next_after_it() {
    let mut names = Names::new();
    names.ask(1, Transport::Udp);
    names.answer_one();
    names.answered();
    let mut second = connect(&names.resolver);
    assert_eq!(second.read(&mut [0]).unwrap(), 0, "it was closed");

    names.guest.shutdown(std::net::Shutdown::Both).unwrap();
    // The thread that served the first one ends in a moment.
    loop {
        names.guest = connect(&names.resolver);
        let lookup = Lookup { number: 2, transport: Transport::Udp, message: query(2) };
        let _ = names.guest.write_all(&lookup.to_bytes());
        names.guest.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        if !matches!(names.guest.read(&mut [0]), Ok(0)) {
            break;
        }
    }
    names.guest.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    names.answer_one();
    assert_eq!(names.answered().number, 2);
}

#[test]
fn garbage_ends_the_connection() {
    let mut names = Names::new();
    names.guest.write_all(&[0xff; 64]).unwrap();
    assert_eq!(names.guest.read(&mut [0]).unwrap(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the guest asks and the server says, what the guest gets is answers to what it asked.
    #[test]
    fn no_message_of_either_side_does_harm(
        queries in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..80)), 1..12),
        said in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut names = Names::new();
        names.udp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        names.tcp.set_nonblocking(true).unwrap();
        for (number, (tcp, message)) in queries.iter().enumerate() {
            let transport = if *tcp { Transport::Tcp } else { Transport::Udp };
            let lookup = Lookup { number: number as u32, transport, message: message.clone() };
            names.guest.write_all(&lookup.to_bytes()).unwrap();
        }
        let mut message = [0; 512];
        while let Ok((_, from)) = names.udp.recv_from(&mut message) {
            names.udp.send_to(&said, from).unwrap();
        }
        while let Ok((mut stream, _)) = names.tcp.accept() {
            let _ = stream.write_all(&said);
        }
        // One that is certain to be answered: by a failure at least, for nobody listens any more.
        let Names { udp, tcp, mut guest, mut reader, resolver: _resolver } = names;
        drop((udp, tcp));
        let last = Lookup { number: 99, transport: Transport::Udp, message: query(99) };
        guest.write_all(&last.to_bytes()).unwrap();
        loop {
            let answers = reader.take().unwrap();
            for answer in &answers {
                let asked = queries.get(answer.number as usize).map_or(&last.message, |(_, message)| message);
                prop_assert!(is_query(asked) && answer.message.get(..2) == asked.get(..2), "{:?}", answer);
            }
            if answers.iter().any(|answer| answer.number == 99) {
                break;
            }
            let mut bytes = [0; 4096];
            let length = guest.read(&mut bytes).unwrap();
            prop_assert_ne!(length, 0, "the connection was closed");
            reader.push(&bytes[..length]);
        }
    }
}
