//! A driver of the socket device, and what it must and must not be able to do.

mod connections;
mod flow;
mod hostile;
mod transport;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::packet::{HEADER_LEN, HOST_CID, Header, Operation, TYPE_STREAM};
use super::{VsockDevice, VsockHandle, VsockListener};
use crate::event_loop::EventLoop;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Guest, Part};

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// The host's port that the tests listen on.
const PORT: u32 = 1024;
/// What the driver says it can buffer.
const BUF_ALLOC: u32 = 256 << 10;
/// Linux offers buffers of about this size.
const RX_BUFFER: u32 = 3776;

/// The driver.
struct Driver {
    guest: Guest,
    device: VsockDevice,
    handle: VsockHandle,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Driver {
    /// A driver with the whole receive queue filled.
    fn new() -> Driver {
        let mut driver = Driver::without_buffers(0);
        driver.offer_buffers(100);
        driver
    }

    fn without_buffers(features: u64) -> Driver {
        let events = EventLoop::spawn("test").unwrap().handle();
        let (mut device, handle) = VsockDevice::new(CID, events).unwrap();
        let guest = Guest::new(device.queue_sizes());
        guest.activate(&mut device, features);
        Driver { guest, device, handle, buf_alloc: BUF_ALLOC, fwd_cnt: 0 }
    }

    fn offer_buffers(&mut self, count: usize) {
        for _ in 0..count {
            self.guest.push(RX, &[Part::In(RX_BUFFER)]);
        }
        self.guest.kick(RX);
    }

    fn header(&self, operation: Operation, guest_port: u32, host_port: u32) -> Header {
        Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: guest_port,
            destination_port: host_port,
            len: 0,
            socket_type: TYPE_STREAM,
            operation: Some(operation),
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Sends a packet without data, and waits until the device took it.
    fn send(&mut self, operation: Operation, guest_port: u32) {
        self.send_header(self.header(operation, guest_port, PORT), &[]);
    }

    /// Sends data, and waits until the device took it.
    fn send_data(&mut self, guest_port: u32, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(Operation::ReadWrite, guest_port, PORT) };
        self.send_header(header, data);
    }

    fn shut_down(&mut self, guest_port: u32, flags: u32) {
        self.send_header(Header { flags, ..self.header(Operation::Shutdown, guest_port, PORT) }, &[]);
    }

    fn send_header(&mut self, header: Header, data: &[u8]) {
        let head = self.guest.push(TX, &[Part::Out(header.to_bytes().to_vec()), Part::Out(data.to_vec())]);
        self.guest.kick(TX);
        assert_eq!(self.guest.wait_used(TX).head, head);
    }

    /// Waits for a packet, and offers its buffer anew.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let packet = self.guest.wait_used(RX).data;
        self.offer_buffers(1);
        let (header, data) = packet.split_at(HEADER_LEN);
        let header = Header::from_bytes(header.try_into().unwrap());
        assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, CID));
        assert_eq!(header.len as usize, data.len());
        (header, data.to_vec())
    }

    /// Waits for a packet that has to be of this kind and for this port of the guest.
    fn expect(&mut self, operation: Operation, guest_port: u32) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!((header.operation, header.destination_port), (Some(operation), guest_port), "{header:?}");
        (header, data)
    }

    /// Connects to the listener, which accepts.
    fn connect(&mut self, listener: &VsockListener, guest_port: u32) -> UnixStream {
        self.send(Operation::Request, guest_port);
        self.expect(Operation::Response, guest_port);
        let stream = listener.accept().unwrap();
        patient(&stream);
        stream
    }

    fn listen(&self) -> VsockListener {
        self.handle.listen(PORT).unwrap()
    }

    /// Asserts that nothing came but an answer to what is sent now.
    fn expect_silence(&mut self) {
        self.send(Operation::ReadWrite, 9999);
        self.expect(Operation::Reset, 9999);
    }
}

/// Makes a test fail in place of waiting for ever.
fn patient(stream: &UnixStream) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
}

fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn read_to_end(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn write(mut stream: &UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
}

/// Bytes of which no two stretches are alike.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
