//! The registers of a virtio-mmio device (virtio 1.2, section 4.2.2).

use virtio_bindings::virtio_mmio::*;

/// "virt", the value of the first register.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The register layout of virtio 1.x; 1 was the legacy one.
pub(super) const VERSION: u32 = 2;
/// "rvm", in the style of the magic value.
pub(super) const VENDOR: u32 = 0x006d_7672;
/// The device's own configuration space starts here.
pub(super) const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// What an absent shared memory region shows as its length and base.
pub(super) const NO_SHARED_MEMORY: u32 = u32::MAX;

/// A register that a driver may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readable {
    Magic,
    Version,
    DeviceId,
    VendorId,
    DeviceFeatures,
    QueueSizeMax,
    QueueReady,
    InterruptStatus,
    Status,
    SharedMemory,
    ConfigGeneration,
}

impl Readable {
    /// The offsets of all of them.
    pub(super) fn offsets() -> impl Iterator<Item = u32> {
        (0..CONFIG as u32).step_by(size_of::<u32>()).filter(|offset| Self::at((*offset).into()).is_some())
    }

    pub(super) fn at(offset: u64) -> Option<Self> {
        Some(match u32::try_from(offset).ok()? {
            VIRTIO_MMIO_MAGIC_VALUE => Self::Magic,
            VIRTIO_MMIO_VERSION => Self::Version,
            VIRTIO_MMIO_DEVICE_ID => Self::DeviceId,
            VIRTIO_MMIO_VENDOR_ID => Self::VendorId,
            VIRTIO_MMIO_DEVICE_FEATURES => Self::DeviceFeatures,
            VIRTIO_MMIO_QUEUE_NUM_MAX => Self::QueueSizeMax,
            VIRTIO_MMIO_QUEUE_READY => Self::QueueReady,
            VIRTIO_MMIO_INTERRUPT_STATUS => Self::InterruptStatus,
            VIRTIO_MMIO_STATUS => Self::Status,
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => Self::SharedMemory,
            VIRTIO_MMIO_CONFIG_GENERATION => Self::ConfigGeneration,
            _ => return None,
        })
    }
}

/// A register that a driver may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writable {
    DeviceFeaturesSelect,
    DriverFeatures,
    DriverFeaturesSelect,
    QueueSelect,
    Queue(QueueRegister),
    QueueNotify,
    InterruptAcknowledge,
    Status,
}

/// A register of the selected queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueRegister {
    Size,
    Ready,
    DescriptorLow,
    DescriptorHigh,
    AvailableLow,
    AvailableHigh,
    UsedLow,
    UsedHigh,
}

impl Writable {
    pub(super) fn at(offset: u64) -> Option<Self> {
        Some(match u32::try_from(offset).ok()? {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => Self::DeviceFeaturesSelect,
            VIRTIO_MMIO_DRIVER_FEATURES => Self::DriverFeatures,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => Self::DriverFeaturesSelect,
            VIRTIO_MMIO_QUEUE_SEL => Self::QueueSelect,
            VIRTIO_MMIO_QUEUE_NUM => Self::Queue(QueueRegister::Size),
            VIRTIO_MMIO_QUEUE_READY => Self::Queue(QueueRegister::Ready),
            VIRTIO_MMIO_QUEUE_DESC_LOW => Self::Queue(QueueRegister::DescriptorLow),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => Self::Queue(QueueRegister::DescriptorHigh),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => Self::Queue(QueueRegister::AvailableLow),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => Self::Queue(QueueRegister::AvailableHigh),
            VIRTIO_MMIO_QUEUE_USED_LOW => Self::Queue(QueueRegister::UsedLow),
            VIRTIO_MMIO_QUEUE_USED_HIGH => Self::Queue(QueueRegister::UsedHigh),
            VIRTIO_MMIO_QUEUE_NOTIFY => Self::QueueNotify,
            VIRTIO_MMIO_INTERRUPT_ACK => Self::InterruptAcknowledge,
            VIRTIO_MMIO_STATUS => Self::Status,
            _ => return None,
        })
    }
}

/// What an empty slot shows: a device ID of 0, for which a driver's probe ends without an error (virtio 1.2,
/// section 4.2.3.1.1).
pub(super) fn read_empty(offset: u64, data: &mut [u8]) {
    data.fill(0);
    let value = match Readable::at(offset) {
        Some(Readable::Magic) => MAGIC,
        Some(Readable::Version) => VERSION,
        _ => return,
    };
    if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
        *word = value.to_le_bytes();
    }
}
