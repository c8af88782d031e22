//! The host's block devices that the container was given: the spec calls them by the host's numbers, and here they are
//! disks with numbers of the guest's.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use rvm_protocol::Disk;

use crate::error::Result;
use crate::slots;

/// Which number of the host is which of the guest.
#[derive(Clone, Debug, Default)]
pub struct Disks(Vec<Numbers>);

#[derive(Clone, Copy, Debug)]
struct Numbers {
    host: (i64, i64),
    guest: (i64, i64),
}

impl Disks {
    /// Finds the disks in their slots.
    pub fn find(disks: &[Disk]) -> Result<Self> {
        let numbers = |disk: &Disk| {
            let (major, minor) = slots::disk_of(disk.slot)?;
            let host = (disk.major.into(), disk.minor.into());
            Ok(Numbers { host, guest: (major.into(), minor.into()) })
        };
        disks.iter().map(numbers).collect::<Result<_>>().map(Self)
    }

    /// Has a configuration name the guest's numbers.
    pub fn translate(&self, spec: &mut Spec) {
        let Some(linux) = spec.linux_mut() else { return };
        for device in linux.devices_mut().iter_mut().flatten() {
            self.translate_device(device);
        }
        let resources = linux.resources_mut().as_mut();
        for rule in resources.and_then(|limits| limits.devices_mut().as_mut()).into_iter().flatten() {
            self.translate_rule(rule);
        }
    }

    fn translate_device(&self, device: &mut LinuxDevice) {
        let host = (device.major(), device.minor());
        if let Some((major, minor)) = self.guest(device.typ(), host) {
            device.set_major(major).set_minor(minor);
        }
    }

    /// Has a rule name the guest's numbers. One that names no device in particular holds here as it stands.
    pub fn translate_rule(&self, rule: &mut LinuxDeviceCgroup) {
        let (Some(kind), Some(major), Some(minor)) = (rule.typ(), rule.major(), rule.minor()) else { return };
        if let Some((major, minor)) = self.guest(kind, (major, minor)) {
            rule.set_major(Some(major)).set_minor(Some(minor));
        }
    }

    fn guest(&self, kind: LinuxDeviceType, host: (i64, i64)) -> Option<(i64, i64)> {
        let known = self.0.iter().find(|numbers| kind == LinuxDeviceType::B && numbers.host == host);
        known.map(|numbers| numbers.guest)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn devices_and_rules_name_the_guests_numbers() {
        let disks = Disks(vec![Numbers { host: (7, 3), guest: (254, 16) }]);
        let spec = json!({ "ociVersion": "1.2.0", "linux": {
            "devices": [
                { "path": "/dev/xvdc", "type": "b", "major": 7, "minor": 3 },
                { "path": "/dev/c", "type": "c", "major": 7, "minor": 3 },
            ],
            "resources": { "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 7, "minor": 3, "access": "rw" },
                { "allow": true, "type": "b", "major": 7, "access": "m" },
            ] },
        } });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        disks.translate(&mut spec);
        let told = serde_json::to_value(&spec).unwrap();
        let numbers = |pointer: &str| {
            let place = told.pointer(pointer).unwrap();
            (place["major"].as_i64(), place["minor"].as_i64())
        };
        assert_eq!(numbers("/linux/devices/0"), (Some(254), Some(16)));
        assert_eq!(numbers("/linux/devices/1"), (Some(7), Some(3)));
        assert_eq!(numbers("/linux/resources/devices/1"), (Some(254), Some(16)));
        assert_eq!(numbers("/linux/resources/devices/2"), (Some(7), None));
    }
}
