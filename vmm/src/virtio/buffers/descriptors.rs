//! The descriptors of a chain, with an error where it does not come to an orderly end.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestMemoryMmap;

use super::{ChainError, MAX_DESCRIPTORS};

/// An iterator over a chain. virtio-queue ends a chain that it cannot follow as if that were the end of it, so that
/// a part would pass for the whole.
pub(crate) struct Descriptors<M> {
    chain: DescriptorChain<M>,
    count: usize,
    /// Whether the driver promised another one. There is no chain without any.
    promised: bool,
}

impl<M> Descriptors<M> {
    /// The descriptors of this chain.
    pub(crate) fn of(chain: DescriptorChain<M>) -> Self {
        Self { chain, count: 0, promised: true }
    }
}

impl<M: Deref<Target = GuestMemoryMmap> + Clone> Iterator for Descriptors<M> {
    type Item = Result<Descriptor, ChainError>;

    fn next(&mut self) -> Option<Self::Item> {
        if !std::mem::take(&mut self.promised) {
            return None;
        }
        let Some(descriptor) = self.chain.next() else { return Some(Err(ChainError::Broken)) };
        self.count += 1;
        if self.count > MAX_DESCRIPTORS {
            return Some(Err(ChainError::TooLong));
        }
        self.promised = descriptor.has_next();
        Some(Ok(descriptor))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::{Guest, INDIRECT, MEMORY, NEXT, RawDescriptor, WRITE};
    use crate::virtio::virtqueue::Virtqueue;

    const BUFFER: u64 = 0x10_0000;

    /// How the walk over these descriptors, in a queue of 4, ends.
    fn walk(descriptors: &[Descriptor]) -> Result<usize, ChainError> {
        let mut guest = Guest::new(&[4]);
        guest.push_raw(0, descriptors);
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let chain = queue.pop(&guest.memory).unwrap().unwrap();
        Descriptors::of(chain).collect::<Result<Vec<_>, _>>().map(|all| all.len())
    }

    #[test]
    fn a_whole_chain_is_walked_to_its_end() {
        let parts = [Descriptor::new(BUFFER, 1, NEXT, 1), Descriptor::new(BUFFER, 0, WRITE, 3)];
        assert_eq!(walk(&parts), Ok(2));
    }

    #[test]
    fn a_chain_that_breaks_off_is_no_shorter_chain() {
        let broken = [
            [Descriptor::new(BUFFER, 1, NEXT, 4), Descriptor::new(0, 0, 0, 0)],
            [Descriptor::new(BUFFER, 1, NEXT, 1), Descriptor::new(BUFFER, 1, NEXT, 0)],
            [Descriptor::new(BUFFER, 1, NEXT, 1), Descriptor::new(BUFFER, 17, INDIRECT, 0)],
            [Descriptor::new(BUFFER, 1, NEXT, 1), Descriptor::new(MEMORY, 16, INDIRECT, 0)],
            [Descriptor::new(BUFFER, 0, INDIRECT, 0), Descriptor::new(0, 0, 0, 0)],
            [Descriptor::new(BUFFER, u32::MAX, NEXT, 1), Descriptor::new(BUFFER, 1, 0, 0)],
        ];
        for chain in broken {
            assert_eq!(walk(&chain), Err(ChainError::Broken), "{chain:?}");
        }
    }

    #[test]
    fn descriptors_without_bytes_count_as_well() {
        let mut guest = Guest::new(&[4]);
        let table = guest.alloc(16 * 2048);
        for entry in 0..2048 {
            let at = GuestAddress(table.0 + 16 * u64::from(entry));
            let descriptor = Descriptor::new(BUFFER, 0, NEXT, entry + 1);
            guest.memory.write_obj(RawDescriptor::from(descriptor), at).unwrap();
        }
        guest.push_raw(0, &[Descriptor::new(table.0, 16 * 2048, INDIRECT, 0)]);
        let mut queue = Virtqueue::from(guest.activation(0).queues.remove(0));
        let chain = queue.pop(&guest.memory).unwrap().unwrap();
        let mut walked = Descriptors::of(chain).skip(MAX_DESCRIPTORS);
        assert!(matches!(walked.next(), Some(Err(ChainError::TooLong))));
        assert!(walked.next().is_none());
    }
}
