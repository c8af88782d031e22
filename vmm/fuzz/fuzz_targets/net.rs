//! The network device, with a few frames waiting for it.
#![no_main]

use rvm_vmm::virtio::hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (device, far) = hostile::net();
    for len in [13, 60, 1514] {
        // The wire takes as much as it takes.
        let _ = far.send(&vec![1; len]);
    }
    hostile::attack(device, input);
});
