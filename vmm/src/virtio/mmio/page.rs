//! The registers that a driver reads, as memory that the guest may read and not write.
//!
//! A read of a register would otherwise leave the virtual machine for this process and come back, at each interrupt:
//! that is where the driver asks for its reason. The device's own configuration space begins on the next page, and
//! is read by such exits, since its bytes have to be seen together.

use std::sync::atomic::{AtomicU32, Ordering};

use super::registers::{self, Readable};
use crate::layout::REGISTERS_OFFSET;

/// Bytes of a page of the guest.
const PAGE: usize = 0x1000;
const WORDS: usize = PAGE / size_of::<u32>();

/// A page that ends with a slot's registers.
///
/// They are accessed SeqCst: seldom enough for it to cost nothing, and a driver may take their order across registers
/// for granted.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct RegisterPage {
    words: [AtomicU32; WORDS],
}

impl Default for RegisterPage {
    /// The registers of an empty slot.
    fn default() -> Self {
        let page = Self { words: [const { AtomicU32::new(0) }; WORDS] };
        page.clear();
        page
    }
}

impl RegisterPage {
    /// Where it lies in this process.
    pub(crate) fn address(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }

    /// How long it is.
    pub(crate) const fn len() -> u64 {
        PAGE as u64
    }

    /// The slot is empty.
    pub(super) fn clear(&self) {
        for offset in Readable::offsets() {
            let mut data = [0; 4];
            registers::read_empty(offset.into(), &mut data);
            self.store(offset, u32::from_le_bytes(data));
        }
    }

    /// What a driver reads at an offset from now on.
    pub(crate) fn store(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// What a driver reads at an offset.
    pub(crate) fn load(&self, offset: u32) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Sets bits of a register.
    pub(crate) fn add(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Clears bits of a register.
    pub(crate) fn remove(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    fn word(&self, offset: u32) -> Option<&AtomicU32> {
        self.words.get((REGISTERS_OFFSET as usize + offset as usize) / size_of::<u32>())
    }
}

const _: () = assert!(size_of::<RegisterPage>() == PAGE && align_of::<RegisterPage>() == PAGE);
const _: () = assert!(REGISTERS_OFFSET + registers::CONFIG == PAGE as u64);

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_mmio::*;

    use super::*;

    #[test]
    fn a_new_page_is_that_of_an_empty_slot() {
        let page = RegisterPage::default();
        assert_eq!(page.load(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!(page.load(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(page.load(VIRTIO_MMIO_DEVICE_ID), 0);
        page.store(VIRTIO_MMIO_DEVICE_ID, 4);
        assert_eq!(page.load(VIRTIO_MMIO_DEVICE_ID), 4);
        page.clear();
        assert_eq!(page.load(VIRTIO_MMIO_DEVICE_ID), 0);
    }

    #[test]
    fn the_configuration_space_is_not_on_it() {
        let page = RegisterPage::default();
        assert!(page.word(VIRTIO_MMIO_CONFIG_GENERATION).is_some());
        assert!(page.word(VIRTIO_MMIO_CONFIG).is_none());
    }
}
