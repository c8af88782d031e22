//! The device status and the order in which a driver may climb it (virtio 1.2, sections 2.1 and 3.1.1).
//!
//! A driver that activates queues before the features are settled, or twice, would find a device in a state that
//! nothing was written for. So each step is in a table, and what is not there is ignored.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

pub(super) const RESET: u32 = 0;
pub(super) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
pub(super) const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
/// The bit of a driver that gave up.
pub(super) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The bit of a device that cannot go on; set by the device alone.
pub(crate) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// Every step up. A reset is possible from everywhere, and so is giving up.
const STEPS: [(u32, u32, Step); 4] = [
    (RESET, ACKNOWLEDGE, Step::Noted),
    (ACKNOWLEDGE, DRIVER, Step::Noted),
    (DRIVER, FEATURES_OK, Step::SettleFeatures),
    (FEATURES_OK, DRIVER_OK, Step::Activate),
];

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Back to the start.
    Reset,
    /// Nothing to do but to remember the new status.
    Noted,
    /// The driver has chosen its features and asks whether the device can live with them.
    SettleFeatures,
    /// The driver is ready: start the device.
    Activate,
    /// Not a step that exists, or none at all: leave the status as it is.
    Ignored,
}

/// The step that a driver asks for by writing `wanted` over `current`.
pub(super) fn step(current: u32, wanted: u32) -> Step {
    // A driver sets bits in the status that it read, and so writes back the device's own.
    let (current, wanted) = (current & !NEEDS_RESET, wanted & !NEEDS_RESET);
    if wanted == RESET {
        return Step::Reset;
    }
    if current & FAILED != 0 {
        return Step::Ignored;
    }
    if wanted == current | FAILED {
        return Step::Noted;
    }
    STEPS
        .iter()
        .find(|(from, to, _)| (*from, *to) == (current, wanted))
        .map_or(Step::Ignored, |(_, _, step)| *step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verify_spec_3_1_1_the_way_up() {
        assert_eq!(step(RESET, ACKNOWLEDGE), Step::Noted);
        assert_eq!(step(ACKNOWLEDGE, DRIVER), Step::Noted);
        assert_eq!(step(DRIVER, FEATURES_OK), Step::SettleFeatures);
        assert_eq!(step(FEATURES_OK, DRIVER_OK), Step::Activate);
    }

    #[test]
    fn of_all_byte_pairs_only_the_listed_steps_do_something() {
        for current in [RESET, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK] {
            for wanted in 1..=u32::from(u8::MAX) {
                let meant = wanted & !NEEDS_RESET;
                let listed = STEPS.iter().any(|(from, to, _)| (*from, *to) == (current, meant));
                let expected = listed || meant == current | FAILED || meant == RESET;
                assert_eq!(step(current, wanted) != Step::Ignored, expected, "{current:#x} -> {wanted:#x}");
            }
        }
    }

    #[test]
    fn verify_spec_2_1_2_after_a_failure_only_a_reset_helps() {
        for wanted in 1..=u32::from(u8::MAX) {
            if wanted & !NEEDS_RESET != 0 {
                assert_eq!(step(DRIVER | FAILED, wanted), Step::Ignored);
            }
        }
        assert_eq!(step(DRIVER | FAILED, RESET), Step::Reset);
        assert_eq!(step(DRIVER_OK | NEEDS_RESET, RESET), Step::Reset);
    }

    #[test]
    fn the_device_s_own_bit_is_not_the_driver_s_to_set_or_clear() {
        assert_eq!(step(DRIVER_OK | NEEDS_RESET, DRIVER_OK | NEEDS_RESET | FAILED), Step::Noted);
        assert_eq!(step(DRIVER_OK | NEEDS_RESET, DRIVER_OK), Step::Ignored);
        assert_eq!(step(DRIVER_OK, DRIVER_OK | NEEDS_RESET), Step::Ignored);
    }
}
