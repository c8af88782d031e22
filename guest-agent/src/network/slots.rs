//! The virtio-mmio slots, into which the host plugs network devices while the guest runs.
//!
//! A slot that was empty when the kernel started has no driver bound to it, for the device ID was 0. Binding
//! makes the driver look again.

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
    find_interface(&directory)
        .ok_or_else(|| other(format!("the device in slot {slot} is no network interface")))
}

/// `<device>/virtio<number>/net/<interface>`
fn find_interface(device: &Path) -> Option<String> {
    entries(device)
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("virtio")))
        .flat_map(|path| entries(&path.join("net")).collect::<Vec<_>>())
        .find_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The hardware address of an interface.
pub fn hardware_address(interface: &str) -> Option<[u8; 6]> {
    parse_hardware_address(&fs::read_to_string(format!("/sys/class/net/{interface}/address")).ok()?)
}

fn parse_hardware_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_read() {
        assert_eq!(parse_hardware_address("02:42:ac:11:00:02\n"), Some([2, 0x42, 0xac, 0x11, 0, 2]));
        for text in ["", "02:42", "02:42:ac:11:00:02:03", "x:42:ac:11:00:02", "100:42:ac:11:00:02"] {
            assert_eq!(parse_hardware_address(text), None, "{text}");
        }
    }

    #[test]
    fn the_interface_is_found_below_its_device() {
        let device = tempfile::tempdir().unwrap();
        assert_eq!(find_interface(device.path()), None);
        fs::create_dir_all(device.path().join("virtio3/net/eth0")).unwrap();
        fs::create_dir_all(device.path().join("power")).unwrap();
        assert_eq!(find_interface(device.path()), Some("eth0".into()));
    }
}
