//! Opening the host's block devices that become disks of the guest.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::makedev;

use super::MonitorError;
use crate::bundle::HostDisk;

/// A disk that is open.
#[derive(Debug)]
pub struct OpenDisk {
    /// The block device.
    pub device: File,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// Opens them, in their order. The host's `/dev` and `/sys` have to be in sight.
pub fn open_all(disks: &[HostDisk]) -> Result<Vec<OpenDisk>, MonitorError> {
    disks
        .iter()
        .map(|disk| {
            let what = format!("cannot open the host's block device {}:{}", disk.major, disk.minor);
            open(disk).map_err(MonitorError::system(&what))
        })
        .collect()
}

fn open(disk: &HostDisk) -> io::Result<OpenDisk> {
    let node = node(disk)?;
    let open = |write| OpenOptions::new().read(true).write(write).open(&node);
    let (device, read_only) = match open(!disk.read_only) {
        // A device that cannot be written to at all, whatever the rules say.
        Err(error) if is_unwritable(&error) && !disk.read_only => (open(false)?, true),
        opened => (opened?, disk.read_only),
    };
    let found = device.metadata()?;
    let number = makedev(disk.major.into(), disk.minor.into());
    if !found.file_type().is_block_device() || found.rdev() != number {
        return Err(io::Error::other(format!("{} is another device", node.display())));
    }
    Ok(OpenDisk { device, read_only })
}

fn is_unwritable(error: &io::Error) -> bool {
    [Errno::EACCES, Errno::EROFS, Errno::EPERM]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// The device's file below `/dev`, by the name that the kernel has for it.
fn node(disk: &HostDisk) -> io::Result<PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", disk.major, disk.minor))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(|name| Path::new("/dev").join(name))
        .ok_or_else(|| io::Error::other("the kernel has no name for it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some block device of this machine that its root can read.
    fn some_disk() -> Option<HostDisk> {
        let entries = std::fs::read_dir("/sys/dev/block").ok()?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let disks = names.filter_map(|name| {
            let (major, minor) = name.split_once(':')?;
            Some(HostDisk { major: major.parse().ok()?, minor: minor.parse().ok()?, read_only: true })
        });
        disks.into_iter().find(|disk| node(disk).is_ok_and(|node| File::open(node).is_ok()))
    }

    #[test]
    fn a_device_is_found_by_its_numbers() {
        let Some(disk) = some_disk() else {
            eprintln!("not tested: this machine shows no block device that can be read");
            return;
        };
        let opened = open_all(&[disk]).unwrap();
        assert!(opened[0].read_only);
        assert_eq!(
            opened[0].device.metadata().unwrap().rdev(),
            makedev(disk.major.into(), disk.minor.into())
        );
    }

    #[test]
    fn numbers_of_no_device_are_an_error_that_names_them() {
        let absent = HostDisk { major: 4095, minor: 7, read_only: false };
        let message = open_all(&[absent]).unwrap_err().to_string();
        assert!(message.starts_with("cannot open the host's block device 4095:7: "), "{message}");
    }
}
