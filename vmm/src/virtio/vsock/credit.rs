//! Flow control of one connection, both directions (virtio 1.2, section 5.10.6.3).
//!
//! Each side tells in every packet how much it can buffer (`buf_alloc`) and how much has left its buffer
//! (`fwd_cnt`). What the guest tells is its own loss when it is wrong: any value yields some credit between none
//! and 4 GiB, and it is only ever its own buffers that overflow.

use std::num::Wrapping;

use super::packet::Header;

/// Both sides' counters.
#[derive(Debug)]
pub struct Credit {
    /// What we are ready to buffer.
    buf_alloc: u32,
    /// Bytes that came from the guest.
    received: Wrapping<u32>,
    /// Those of them that left our buffer.
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that the guest knows.
    announced: Wrapping<u32>,
    /// Bytes that went to the guest.
    sent: Wrapping<u32>,
    /// What the guest is ready to buffer, as it says.
    peer_buf_alloc: u32,
    /// Bytes that left the guest's buffer, as it says.
    peer_forwarded: Wrapping<u32>,
}

impl Credit {
    /// The counters of a new connection whose guest may send `buf_alloc` bytes ahead.
    pub fn new(buf_alloc: u32) -> Self {
        let zero = Wrapping(0);
        Self {
            buf_alloc,
            received: zero,
            forwarded: zero,
            announced: zero,
            sent: zero,
            peer_buf_alloc: 0,
            peer_forwarded: zero,
        }
    }

    /// Learns from a packet of the guest.
    pub fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Puts our side into a packet for the guest.
    pub fn announce(&mut self, header: &mut Header) {
        header.buf_alloc = self.buf_alloc;
        header.fwd_cnt = self.forwarded.0;
        self.announced = self.forwarded;
    }

    /// How many bytes the guest can take now.
    pub fn available(&self) -> usize {
        let in_flight = (self.sent - self.peer_forwarded).0;
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Counts bytes that go to the guest.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u32;
    }

    /// Counts bytes that came from the guest. False if it exceeded what it was allowed.
    #[must_use]
    pub fn receive(&mut self, bytes: usize) -> bool {
        let allowed = bytes <= self.buf_alloc as usize - self.buffered() as usize;
        if allowed {
            self.received += bytes as u32;
        }
        allowed
    }

    /// Counts bytes of the guest that left our buffer.
    pub fn forward(&mut self, bytes: usize) {
        self.forwarded += bytes as u32;
    }

    /// Whether the guest knows of less than half of the room that it has, so that it should be told.
    pub fn is_worth_an_update(&self) -> bool {
        let unknown = (self.forwarded - self.announced).0;
        unknown > self.buf_alloc / 2
    }

    /// Bytes in our buffer: never more than `buf_alloc`, as `receive` sees to.
    fn buffered(&self) -> u32 {
        (self.received - self.forwarded).0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::vsock::packet::{Operation, TYPE_STREAM};

    fn header(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            source_cid: 3,
            destination_cid: 2,
            source_port: 1,
            destination_port: 1,
            len: 0,
            socket_type: TYPE_STREAM,
            operation: Some(Operation::CreditUpdate),
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    #[test]
    fn the_guest_gets_no_more_than_it_can_take() {
        let mut credit = Credit::new(1000);
        assert_eq!(credit.available(), 0, "nothing is known of the guest yet");
        credit.learn(&header(100, 0));
        assert_eq!(credit.available(), 100);
        credit.sent(60);
        assert_eq!(credit.available(), 40);
        credit.learn(&header(100, 50));
        assert_eq!(credit.available(), 90);
        credit.learn(&header(5, 50));
        assert_eq!(credit.available(), 0, "a buffer that shrinks below what is in flight");
    }

    #[test]
    fn a_guest_that_claims_to_have_read_what_was_never_sent_gets_nothing() {
        let mut credit = Credit::new(1000);
        credit.learn(&header(100, 1));
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_guest_may_send_as_much_as_was_granted() {
        let mut credit = Credit::new(1000);
        assert!(credit.receive(1000));
        assert!(!credit.receive(1));
        credit.forward(500);
        assert!(!credit.receive(501));
        assert!(!credit.is_worth_an_update());
        credit.forward(1);
        assert!(credit.is_worth_an_update());
        let mut packet = header(0, 0);
        credit.announce(&mut packet);
        assert_eq!((packet.buf_alloc, packet.fwd_cnt), (1000, 501));
        assert!(!credit.is_worth_an_update());
        assert!(credit.receive(501));
    }

    proptest! {
        #[test]
        fn counters_may_wrap(start in any::<u32>(), steps in prop::collection::vec((0..2000usize, 0..2000usize), 0..50)) {
            let mut credit = Credit::new(1000);
            credit.received = Wrapping(start);
            credit.forwarded = Wrapping(start);
            let mut buffered = 0;
            for (received, forwarded) in steps {
                prop_assert_eq!(credit.receive(received), buffered + received <= 1000);
                buffered += if buffered + received <= 1000 { received } else { 0 };
                credit.forward(forwarded.min(buffered));
                buffered -= forwarded.min(buffered);
                prop_assert_eq!(credit.buffered() as usize, buffered);
            }
        }

        #[test]
        fn no_claim_of_the_guest_grants_more_than_it_offers(buf_alloc in any::<u32>(), fwd_cnt in any::<u32>(), sent in any::<u32>()) {
            let mut credit = Credit::new(1000);
            credit.learn(&header(buf_alloc, fwd_cnt));
            credit.sent(sent as usize);
            prop_assert!(credit.available() <= buf_alloc as usize);
        }
    }
}
