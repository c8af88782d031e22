//! The device files of `/dev`.
//!
//! They are the guest's devices. Where the configuration does not mount a file system of its own on `/dev`,
//! or where a user namespace forbids making device files, the guest's own files are bound instead.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{self, Mode, SFlag};
use nix::unistd::{self, Gid, Uid};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::tree::Tree;
use crate::error::{Context, Result, other};
use crate::sys::mount;

/// A device file to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    path: PathBuf,
    kind: SFlag,
    major: u64,
    minor: u64,
    mode: u32,
    user: u32,
    group: u32,
}

/// The devices that every container has (OCI runtime specification, config-linux.md, "Default Devices").
const DEFAULT: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The links that every container has (OCI runtime specification, runtime-linux.md, "Dev symbolic links").
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Makes the devices and links, unless the configuration binds a `/dev` of its own.
pub fn make_all(spec: &Spec, root: &Tree) -> Result<()> {
    if binds_dev(spec) {
        return Ok(());
    }
    let extra = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    for device in wanted(extra)? {
        make(&device, root)?;
    }
    make_links(root)
}

fn binds_dev(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        let bind = |option: &String| option == "bind" || option == "rbind";
        mount.destination() == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind))
    })
}

/// The default devices, each replaced by the configuration's where that names it, and the others of the
/// configuration. `/dev/ptmx` is a link into the container's own devpts, whoever names it.
fn wanted(extra: &[LinuxDevice]) -> Result<Vec<Device>> {
    let mut devices: Vec<Device> = DEFAULT
        .iter()
        .map(|&(path, major, minor)| Device {
            path: path.into(),
            kind: SFlag::S_IFCHR,
            major,
            minor,
            mode: 0o666,
            user: 0,
            group: 0,
        })
        .collect();
    for device in extra.iter().filter(|device| device.path() != Path::new("/dev/ptmx")) {
        let device = translate(device)?;
        devices.retain(|known| known.path != device.path);
        devices.push(device);
    }
    Ok(devices)
}

fn translate(device: &LinuxDevice) -> Result<Device> {
    let path = device.path().clone();
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(other(format!("the device {} is of no type that can be made", path.display())));
        }
    };
    let number = |value: i64| {
        u64::try_from(value)
            .map_err(|_| other(format!("the device {} has a negative number", path.display())))
    };
    Ok(Device {
        kind,
        major: number(device.major())?,
        minor: number(device.minor())?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        user: device.uid().unwrap_or(0),
        group: device.gid().unwrap_or(0),
        path,
    })
}

fn make(device: &Device, root: &Tree) -> Result<()> {
    let shown = device.path.display();
    let (Some(parent), Some(name)) = (device.path.parent(), device.path.file_name()) else {
        return Err(other(format!("a device cannot be made at {shown}")));
    };
    let parent =
        root.make_directory(parent).context(|| format!("making the directory of the device {shown}"))?;
    let mode = Mode::from_bits_truncate(device.mode);
    let number = libc::makedev(device.major as u32, device.minor as u32);
    match stat::mknodat(&parent, name, device.kind, mode, number) {
        // The umask is empty meanwhile, so the mode is exact.
        Ok(()) if device.user == 0 && device.group == 0 => Ok(()),
        Ok(()) => {
            let (user, group) = (Uid::from_raw(device.user), Gid::from_raw(device.group));
            unistd::fchownat(&parent, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)
                .context(|| format!("setting the owner of the device {shown}"))
        }
        Err(Errno::EEXIST) if is_the_same(device, root) => Ok(()),
        Err(Errno::EPERM | Errno::EACCES | Errno::EEXIST | Errno::EROFS | Errno::EOPNOTSUPP) => {
            bind_own(device, root)
        }
        Err(errno) => Err(errno).context(|| format!("making the device {shown}")),
    }
}

fn is_the_same(device: &Device, root: &Tree) -> bool {
    let found = root.find_no_follow(&device.path).and_then(stat::fstat);
    found.is_ok_and(|found| {
        found.st_mode & SFlag::S_IFMT.bits() == device.kind.bits()
            && found.st_rdev == libc::makedev(device.major as u32, device.minor as u32)
    })
}

/// Binds the guest's own file of the same path.
fn bind_own(device: &Device, root: &Tree) -> Result<()> {
    let what = || format!("binding the device {}", device.path.display());
    let guest = Tree::open(Path::new("/")).context(what)?;
    let own = guest.find(&device.path).context(what)?;
    let place = root.make_file(&device.path).context(what)?;
    let mount = mount::clone_mount(own, false).context(what)?;
    mount::attach(mount, place).context(what)
}

fn make_links(root: &Tree) -> Result<()> {
    let directory = super::mounts::reopen_directory(root, Path::new("/dev"))
        .context(|| "opening the container's /dev")?;
    for (target, name) in LINKS {
        match unistd::symlinkat(target, &directory, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).context(|| format!("making the link /dev/{name}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxDeviceBuilder, MountBuilder, SpecBuilder};

    use super::*;

    fn device(path: &str, kind: LinuxDeviceType) -> LinuxDevice {
        LinuxDeviceBuilder::default()
            .path(path)
            .typ(kind)
            .major(10i64)
            .minor(200i64)
            .file_mode(0o600u32)
            .build()
            .unwrap()
    }

    #[test]
    fn the_configuration_replaces_and_adds_devices() {
        let extra = [
            device("/dev/null", LinuxDeviceType::C),
            device("/dev/net/tun", LinuxDeviceType::U),
            device("/dev/ptmx", LinuxDeviceType::C),
        ];
        let devices = wanted(&extra).unwrap();
        assert_eq!(devices.len(), DEFAULT.len() + 1);
        let null = devices.iter().find(|device| device.path == Path::new("/dev/null")).unwrap();
        assert_eq!((null.major, null.minor, null.mode), (10, 200, 0o600));
    }

    #[test]
    fn a_device_of_no_type_is_refused() {
        assert!(wanted(&[device("/dev/x", LinuxDeviceType::A)]).is_err());
    }

    #[test]
    fn a_dev_of_the_hosts_is_left_alone() {
        let spec = |kind: &str| {
            let mount = MountBuilder::default().destination("/dev").typ(kind).build().unwrap();
            SpecBuilder::default().mounts(vec![mount]).build().unwrap()
        };
        assert!(binds_dev(&spec("bind")));
        assert!(!binds_dev(&spec("tmpfs")));
    }
}
