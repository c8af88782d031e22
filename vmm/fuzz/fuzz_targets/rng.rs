//! The entropy device.
#![no_main]

use rvm_vmm::virtio::hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::attack(hostile::rng(), input));
