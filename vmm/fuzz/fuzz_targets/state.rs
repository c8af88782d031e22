//! The state of a captured machine, of whatever bytes.
#![no_main]

use rvm_vmm::machine::MachineState;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(state) = MachineState::from_bytes(input) {
        assert!(state.vcpus() > 0 && state.devices().len() <= 16);
        state.to_bytes();
    }
});
