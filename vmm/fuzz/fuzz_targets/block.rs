//! A disk, read-only or not as the input's first byte says.
#![no_main]

use rvm_vmm::virtio::hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let read_only = input.first().is_some_and(|byte| byte & 1 == 1);
    hostile::attack(hostile::block(read_only), input);
});
