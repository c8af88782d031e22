//! Block devices of the host that the container is given (`docker run --device /dev/sdb`): each becomes a disk of the
//! virtual machine, which reaches that device's sectors and nothing else of the host.

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use serde::{Deserialize, Serialize};

use super::error::BundleError;
use super::impossible;

/// How many of them a virtual machine has slots for.
pub const MAX_DISKS: usize = 8;

/// A block device of the host that becomes a disk of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDisk {
    /// The host's numbers of the device.
    pub major: u32,
    /// The minor one.
    pub minor: u32,
    /// Whether the rules keep the container from writing to it.
    pub read_only: bool,
}

/// What the rules (`linux.resources.devices`) let the container do with a block device, if it may read it. Each access is
/// decided by the last rule that speaks of it; without one it is denied.
pub(super) fn access(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> Option<HostDisk> {
    if device.typ() != LinuxDeviceType::B {
        return None;
    }
    let (major, minor) = (u32::try_from(device.major()).ok()?, u32::try_from(device.minor()).ok()?);
    let may = |letter| {
        let speaking = rules.iter().rev().find(|rule| speaks_of(rule, device, letter));
        speaking.is_some_and(LinuxDeviceCgroup::allow)
    };
    may('r').then(|| HostDisk { major, minor, read_only: !may('w') })
}

fn speaks_of(rule: &LinuxDeviceCgroup, device: &LinuxDevice, access: char) -> bool {
    let is_any = |number: Option<i64>, own: i64| number.is_none_or(|number| number == -1 || number == own);
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        // As in the kernel, such a rule is about every device and every access.
        LinuxDeviceType::A => true,
        LinuxDeviceType::B => {
            is_any(rule.major(), device.major())
                && is_any(rule.minor(), device.minor())
                && rule.access().as_deref().unwrap_or_default().contains(access)
        }
        _ => false,
    }
}

/// The disks of a description whose devices have been checked. One with two names is one disk.
pub(super) fn of(linux: &Linux) -> Result<Vec<HostDisk>, BundleError> {
    let rules = linux.resources().as_ref().and_then(|limits| limits.devices().as_deref()).unwrap_or_default();
    let mut disks: Vec<HostDisk> = Vec::new();
    for device in linux.devices().iter().flatten().filter(|device| super::microvm::is_of_the_host(device)) {
        let Some(disk) = access(device, rules) else { continue };
        if !disks.contains(&disk) {
            disks.push(disk);
        }
    }
    if disks.len() > MAX_DISKS {
        let problem = format!("have {} disks; {MAX_DISKS} is the most", disks.len());
        return Err(impossible("linux.devices", &problem));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seen(rules: serde_json::Value) -> Option<bool> {
        let device = json!({ "path": "/dev/x", "type": "b", "major": 7, "minor": 3 });
        let device: LinuxDevice = serde_json::from_value(device).unwrap();
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        access(&device, &rules).map(|disk| disk.read_only)
    }

    #[test]
    fn the_last_rule_about_an_access_decides() {
        let none = json!({ "allow": false, "access": "rwm" });
        let rule = |allow: bool, minor: i64, access: &str| json!({ "allow": allow, "type": "b", "major": 7, "minor": minor, "access": access });
        assert_eq!(seen(json!([])), None);
        assert_eq!(seen(json!([none])), None);
        assert_eq!(seen(json!([none, rule(true, 3, "rwm")])), Some(false));
        assert_eq!(seen(json!([none, rule(true, 3, "r")])), Some(true));
        assert_eq!(seen(json!([none, rule(true, 3, "w")])), None);
        assert_eq!(seen(json!([none, rule(true, 4, "rwm")])), None);
        assert_eq!(seen(json!([none, rule(true, -1, "rwm"), rule(false, 3, "w")])), Some(true));
        assert_eq!(seen(json!([rule(true, 3, "rwm"), none])), None);
    }
}
