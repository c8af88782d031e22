//! The virtio-mmio slots, and what the kernel made of the devices in them.
//!
//! Network devices are plugged while the guest runs. A slot that was empty when the kernel started has no driver bound to
//! it, for the device ID was 0. Binding makes the driver look again.

use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::error::{Context, Result, other};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// The name of the network interface in a slot, which is bound where it is not yet.
pub fn interface_of(slot: u8) -> Result<String> {
    let device = format!("virtio-mmio.{slot}");
    let directory = Path::new(DEVICES).join(&device);
    if !directory.join("driver").exists() {
        match fs::write(Path::new(DRIVER).join("bind"), &device) {
            // Bound in the meantime.
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
            bound => bound.context(|| format!("binding the driver to the device in slot {slot}"))?,
        }
    }
    find(&directory, "net").ok_or_else(|| other(format!("the device in slot {slot} is no network interface")))
}

/// Takes the driver from the device in a slot, which the host is about to pull out.
pub fn vacate(slot: u8) -> Result<()> {
    let device = format!("virtio-mmio.{slot}");
    match fs::write(Path::new(DRIVER).join("unbind"), &device) {
        // It has none.
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        unbound => unbound.context(|| format!("taking the driver from the device in slot {slot}")),
    }
}

/// Major and minor number of the disk in a slot.
pub fn disk_of(slot: u8) -> Result<(u32, u32)> {
    let directory = Path::new(DEVICES).join(format!("virtio-mmio.{slot}"));
    find(&directory, "block")
        .and_then(|name| fs::read_to_string(format!("/sys/class/block/{name}/dev")).ok())
        .and_then(|numbers| parse_numbers(&numbers))
        .ok_or_else(|| other(format!("the device in slot {slot} is no disk")))
}

/// `<device>/virtio<number>/<class>/<name>`
fn find(device: &Path, class: &str) -> Option<String> {
    entries(device)
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("virtio")))
        .flat_map(|path| entries(&path.join(class)).collect::<Vec<_>>())
        .find_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn parse_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_its_class() {
        let device = tempfile::tempdir().unwrap();
        assert_eq!(find(device.path(), "net"), None);
        fs::create_dir_all(device.path().join("virtio3/net/eth0")).unwrap();
        fs::create_dir_all(device.path().join("power")).unwrap();
        assert_eq!(find(device.path(), "net"), Some("eth0".into()));
        assert_eq!(find(device.path(), "block"), None);
    }

    #[test]
    fn the_numbers_of_a_disk_are_read() {
        assert_eq!(parse_numbers("254:16\n"), Some((254, 16)));
        for text in ["", "254", "254:", "a:b", "-1:0"] {
            assert_eq!(parse_numbers(text), None, "{text}");
        }
    }
}
