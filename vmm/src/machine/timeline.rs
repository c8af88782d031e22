//! When the phases of a start were reached, by the monotonic clock.

use std::time::Instant;

/// The instants of one start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeline {
    /// The virtual machine exists: memory, interrupt controllers, vCPUs.
    pub kvm_ready: Instant,
    /// Kernel and initramfs are in the guest's memory.
    pub kernel_loaded: Instant,
    /// The vCPUs were let into the guest; absent before the start.
    pub kernel_entry: Option<Instant>,
}

impl Timeline {
    pub(super) fn kvm_ready_now() -> Self {
        let now = Instant::now();
        Self { kvm_ready: now, kernel_loaded: now, kernel_entry: None }
    }

    pub(super) fn kernel_is_loaded(&mut self) {
        self.kernel_loaded = Instant::now();
    }

    pub(super) fn kernel_is_entered(&mut self) {
        self.kernel_entry = Some(Instant::now());
    }
}
