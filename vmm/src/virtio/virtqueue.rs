//! One virtqueue as a device's worker uses it: take chains, give them back, tell the driver.
//!
//! A driver can write anything into its rings. What leaves the queue usable (a chain that makes no sense) is for
//! the device to judge; what does not (an index beyond the queue, a ring outside of memory) is a [`QueueError`],
//! after which the device has to stop: to go on would mean to spin on, or to write to, something arbitrary.

use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt};
use crate::GuestMemory;

/// A chain of descriptors in the guest's memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;
/// The same for who keeps it.
pub(crate) type KeptChain = DescriptorChain<GuestMemory>;

/// Why a queue cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings make no sense.
    #[error("the driver corrupted virtqueue {queue}: {source}")]
    Corrupt {
        /// Number of the queue.
        queue: u16,
        /// What virtio-queue reported.
        source: Error,
    },
    /// An entry of the available ring cannot be read.
    #[error("the driver corrupted virtqueue {0}: its available ring cannot be read")]
    Unreadable(u16),
    /// A chain starts beyond the descriptor table.
    #[error("the driver corrupted virtqueue {queue}: a chain starts at descriptor {head}")]
    Head {
        /// Number of the queue.
        queue: u16,
        /// The index that is too large.
        head: u16,
    },
}

/// A queue with the event that tells of new buffers.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    /// How many buffers were used, modulo 2^16, when the driver was last considered for an interrupt.
    announced: u16,
}

impl From<ActiveQueue> for Virtqueue {
    fn from(active: ActiveQueue) -> Self {
        let announced = active.queue.next_used();
        Self { index: active.index, queue: active.queue, kick: active.kick, announced }
    }
}

impl AsRawFd for Virtqueue {
    fn as_raw_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }
}

impl Virtqueue {
    /// Clears the event of new buffers. To be done before looking for them, or a kick could get lost.
    pub fn acknowledge_kick(&self) {
        // It fails only when there was none.
        let _ = self.kick.read();
    }

    /// Makes the queue's event readable, as a kick of the driver does.
    pub fn kick_self(&self) {
        // A write to an eventfd fails only when its counter is full, and then it is readable already.
        let _ = self.kick.write(1);
    }

    /// The queue's number in the device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// The most chains that the driver can offer at a time.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain that the driver offers.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, QueueError> {
        self.pop_with(memory)
    }

    /// The same for a chain that may be kept.
    pub(crate) fn pop_kept(&mut self, memory: &GuestMemory) -> Result<Option<KeptChain>, QueueError> {
        self.pop_with(memory.clone())
    }

    fn pop_with<M: Deref<Target = GuestMemoryMmap> + Clone>(
        &mut self,
        memory: M,
    ) -> Result<Option<DescriptorChain<M>>, QueueError> {
        if self.is_empty(&memory)? {
            return Ok(None);
        }
        let queue = self.index;
        let corrupt = |source| QueueError::Corrupt { queue, source };
        // Something is on offer, so an iterator that yields nothing failed to read it, and would do so for ever.
        let chain = self.queue.iter(memory).map_err(corrupt)?.next().ok_or(QueueError::Unreadable(queue))?;
        if chain.head_index() >= self.queue.size() {
            return Err(QueueError::Head { queue, head: chain.head_index() });
        }
        Ok(Some(chain))
    }

    /// Gives a chain back to a driver that looks for it, so that no interrupt has to tell.
    pub(crate) fn push_used_unannounced(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        self.push_used(memory, head, len)?;
        self.announced = self.queue.next_used();
        Ok(())
    }

    /// Puts the chain that was taken last back to where it was.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Whether the driver offers nothing.
    pub fn is_empty(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        Ok(self.avail_index(memory)? == self.queue.next_avail())
    }

    /// How many chains the driver has offered in all, modulo 2^16.
    pub fn avail_index(&self, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        let index = self.queue.avail_idx(memory, Ordering::Acquire);
        index.map(|index| index.0).map_err(|source| self.corrupt(source))
    }

    /// Gives a chain back, with the number of bytes written to it.
    pub fn push_used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), QueueError> {
        self.push_used_together(memory, &[(head, len)])
    }

    /// Gives chains back at once: a driver that sees the first of them sees all. That matters where several carry
    /// one packet (virtio 1.2, section 5.1.6.4.1).
    pub(crate) fn push_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let mut next = self.queue.next_used();
        for &(head, len) in chains {
            if head >= self.queue.size() {
                return Err(self.corrupt(Error::InvalidDescriptorIndex));
            }
            let entry = 4 + 8 * u64::from(next % self.queue.size());
            let entry = self.address(self.queue.used_ring(), entry)?;
            // The head in the low half, the length in the high one.
            let element = u64::from(head) | u64::from(len) << 32;
            memory.write_obj(element.to_le(), entry).map_err(|source| self.inaccessible(source))?;
            next = next.wrapping_add(1);
        }
        let index = self.address(self.queue.used_ring(), 2)?;
        // Release: whoever sees the index has to see the elements and the data in the buffers.
        memory.store(next.to_le(), index, Ordering::Release).map_err(|source| self.inaccessible(source))?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Raises the interrupt if buffers were used since the last call and the driver wants to know.
    pub fn notify(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) -> Result<(), QueueError> {
        let used = self.queue.next_used();
        let announced = std::mem::replace(&mut self.announced, used);
        if used != announced && self.wants_interrupt(memory, announced, used)? {
            interrupt.used_buffers();
        }
        Ok(())
    }

    /// Whether the driver waits for one of the used buffers between these indices (virtio 1.2, section 2.7.10).
    fn wants_interrupt(&self, memory: &GuestMemoryMmap, from: u16, to: u16) -> Result<bool, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // The driver writes `used_event` and then looks at the index; here it is the other way round, and neither
        // may pass the other.
        fence(Ordering::SeqCst);
        let event = self.address(self.queue.avail_ring(), 4 + 2 * u64::from(self.queue.size()))?;
        // Relaxed: the fence orders it, and nothing else is read on its account.
        let event = memory.load(event, Ordering::Relaxed).map_err(|source| self.inaccessible(source))?;
        let event = u16::from_le(event);
        Ok(to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from))
    }

    /// Asks the driver not to kick: the device is looking anyway.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.queue.disable_notification(memory).map_err(|source| self.corrupt(source))
    }

    /// Asks the driver to kick for the next chain. Returns whether there is one already, for which no kick may
    /// come.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue.enable_notification(memory).map_err(|source| self.corrupt(source))
    }

    /// Asks the driver to kick for the next chain beyond the first `offered` ones, whether or not the device has
    /// taken those. Returns whether there is one already.
    pub fn enable_kicks_beyond(
        &mut self,
        memory: &GuestMemoryMmap,
        offered: u16,
    ) -> Result<bool, QueueError> {
        let taken = self.queue.next_avail();
        self.queue.set_next_avail(offered);
        let more = self.enable_kicks(memory);
        self.queue.set_next_avail(taken);
        more
    }

    fn address(&self, ring: u64, offset: u64) -> Result<GuestAddress, QueueError> {
        ring.checked_add(offset).map(GuestAddress).ok_or_else(|| self.corrupt(Error::AddressOverflow))
    }

    fn inaccessible(&self, source: vm_memory::GuestMemoryError) -> QueueError {
        self.corrupt(Error::GuestMemory(source))
    }

    fn corrupt(&self, source: Error) -> QueueError {
        QueueError::Corrupt { queue: self.index, source }
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

    use super::*;
    use crate::virtio::testing::{Descriptor, Guest, MEMORY, Part};

    fn queue(guest: &Guest) -> Virtqueue {
        guest.activation(0).queues.remove(0).into()
    }

    #[test]
    fn chains_come_in_order_and_can_be_put_back() {
        let mut guest = Guest::new(&[4]);
        let heads = [guest.push(0, &[Part::In(8)]), guest.push(0, &[Part::In(8), Part::In(8)])];
        let mut queue = queue(&guest);
        let memory = guest.memory.clone();
        assert_eq!(queue.pop(&memory).unwrap().unwrap().head_index(), heads[0]);
        queue.undo_pop();
        assert_eq!(queue.pop(&memory).unwrap().unwrap().head_index(), heads[0]);
        assert_eq!(queue.pop(&memory).unwrap().unwrap().head_index(), heads[1]);
        assert!(queue.pop(&memory).unwrap().is_none());
    }

    #[test]
    fn rings_wrap_around() {
        let mut guest = Guest::new(&[2]);
        let mut queue = queue(&guest);
        let memory = guest.memory.clone();
        for round in 0..70_000u32 {
            let head = guest.push(0, &[Part::In(4)]);
            assert_eq!(queue.pop(&memory).unwrap().unwrap().head_index(), head, "round {round}");
            queue.push_used(&memory, head, 4).unwrap();
            assert_eq!(guest.pop_used(0).unwrap().head, head);
        }
    }

    #[test]
    fn a_batch_interrupts_once_and_only_after_use() {
        let mut guest = Guest::new(&[4]);
        let mut queue = queue(&guest);
        let (memory, interrupt) = (guest.memory.clone(), guest.activation(0).interrupt);
        queue.notify(&memory, &interrupt).unwrap();
        assert!(!guest.interrupted());
        for _ in 0..2 {
            let head = guest.push(0, &[Part::In(4)]);
            queue.push_used(&memory, head, 0).unwrap();
        }
        queue.notify(&memory, &interrupt).unwrap();
        assert!(guest.interrupted());
        queue.notify(&memory, &interrupt).unwrap();
        assert!(!guest.interrupted());
    }

    #[test]
    fn chains_that_belong_together_become_visible_together() {
        let mut guest = Guest::new(&[4]);
        let mut active = guest.activation(0).queues.remove(0);
        // Of this ring only the first entry lies in memory, so the work ends after one element.
        let ring = GuestAddress(MEMORY - 12);
        active.queue.try_set_used_ring_address(ring).unwrap();
        let mut queue = Virtqueue::from(active);
        let heads = [guest.push(0, &[Part::In(4)]), guest.push(0, &[Part::In(4)])];
        let refused = queue.push_used_together(&guest.memory, &[(heads[0], 4), (heads[1], 4)]);
        assert!(matches!(refused, Err(QueueError::Corrupt { .. })));
        assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(MEMORY - 4)).unwrap(), 4, "it was written");
        assert_eq!(guest.memory.read_obj::<u16>(GuestAddress(MEMORY - 10)).unwrap(), 0, "and is not visible");
    }

    #[test]
    fn chains_used_together_count_one_by_one_for_the_interrupt() {
        let mut guest = Guest::new(&[4]);
        let mut queue = Virtqueue::from(guest.activation(1 << VIRTIO_RING_F_EVENT_IDX).queues.remove(0));
        let (memory, interrupt) = (guest.memory.clone(), guest.interrupt.clone());
        for (event, heard) in [(2_u16, true), (3, false)] {
            let chains = [0; 3].map(|_| (guest.push(0, &[Part::In(4)]), 0));
            let event_at = GuestAddress(guest.avail(0).0 + 4 + 2 * 4);
            memory.write_obj(queue.queue.next_used().wrapping_add(event), event_at).unwrap();
            queue.push_used_together(&memory, &chains).unwrap();
            queue.notify(&memory, &interrupt).unwrap();
            assert_eq!(guest.interrupted(), heard, "{event}");
            chains.iter().for_each(|(head, _)| assert_eq!(guest.pop_used(0).unwrap().head, *head));
        }
    }

    #[test]
    fn what_is_given_back_unannounced_counts_for_no_interrupt_then_or_later() {
        let mut guest = Guest::new(&[4]);
        let mut queue = Virtqueue::from(guest.activation(1 << VIRTIO_RING_F_EVENT_IDX).queues.remove(0));
        let (memory, interrupt) = (guest.memory.clone(), guest.interrupt.clone());
        // So many that a range of them could not be told from a short one.
        for _ in 0..70_000_u32 {
            let head = guest.push(0, &[Part::In(4)]);
            queue.push_used_unannounced(&memory, head, 0).unwrap();
            assert_eq!(guest.pop_used(0).unwrap().head, head);
        }
        queue.notify(&memory, &interrupt).unwrap();
        assert!(!guest.interrupted());
        let head = guest.push(0, &[Part::In(4)]);
        queue.push_used(&memory, head, 0).unwrap();
        queue.notify(&memory, &interrupt).unwrap();
        assert!(guest.interrupted());
    }

    #[test]
    fn an_available_index_beyond_the_queue_is_an_error() {
        let mut guest = Guest::new(&[4]);
        let mut queue = queue(&guest);
        guest.set_available(0, 5);
        assert!(matches!(queue.pop(&guest.memory), Err(QueueError::Corrupt { queue: 0, .. })));
    }

    #[test]
    fn a_head_beyond_the_table_is_an_error() {
        let mut guest = Guest::new(&[4]);
        let mut queue = queue(&guest);
        guest.offer(0, 4);
        assert!(matches!(queue.pop(&guest.memory), Err(QueueError::Head { queue: 0, head: 4 })));
    }

    #[test]
    fn a_ring_outside_of_memory_is_an_error() {
        let guest = Guest::new(&[4]);
        let mut active = guest.activation(0).queues.remove(0);
        active.queue.try_set_avail_ring_address(GuestAddress(MEMORY)).unwrap();
        assert!(matches!(Virtqueue::from(active).pop(&guest.memory), Err(QueueError::Corrupt { .. })));
    }

    #[test]
    fn a_loop_of_descriptors_ends() {
        let mut guest = Guest::new(&[4]);
        let mut queue = queue(&guest);
        guest.push_raw(0, &[Descriptor::new(0x10_0000, 1, 1, 1), Descriptor::new(0x10_0000, 1, 1, 0)]);
        assert_eq!(queue.pop(&guest.memory).unwrap().unwrap().count(), 4);
    }
}
