//! The file server.
#![no_main]

use rvm_vmm::virtio::fs::hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::attack(input));
