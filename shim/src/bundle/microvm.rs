//! What runtimes that share the host's kernel can do and a microVM cannot: refused, or without effect.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::stat;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxResources, Spec,
};

use super::error::BundleError;
use super::{disks, field, impossible, resources};
use crate::cause::Cause;

/// Character devices that every guest has of its own: major and minor number.
const GUEST_DEVICES: [(i64, i64); 12] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
    (10, 237), // loop-control
];

/// Refuses what a microVM cannot do, drops what has no meaning there, and says so.
pub(super) fn possible(spec: &mut Spec, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    security_modules(spec, warnings);
    own_machine(spec)?;
    host_name(spec, warnings)?;
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    namespaces(linux, warnings)?;
    devices(linux, warnings)?;
    hardware(linux, warnings)?;
    personality(linux, warnings);
    linux.resources().as_ref().map_or(Ok(()), |limits| resources::check(limits, "linux.resources", warnings))
}

/// Of the specification's section about virtual machines the kernel is honoured (see [`super::Bundle::kernel`]).
fn own_machine(spec: &Spec) -> Result<(), BundleError> {
    let Some(vm) = spec.vm() else { return Ok(()) };
    if !vm.kernel().path().is_absolute() {
        let problem = format!("`{}` is not an absolute path", vm.kernel().path().display());
        return Err(field("vm.kernel.path", problem));
    }
    let refused = [
        ("vm.hypervisor", vm.hypervisor().is_some(), "run in another hypervisor than rvm's own"),
        ("vm.image", vm.image().is_some(), "boot from an image; the root file system is root.path"),
        (
            "vm.kernel.parameters",
            vm.kernel().parameters().as_ref().is_some_and(|list| !list.is_empty()),
            "take parameters for the guest's kernel, which rvm chooses",
        ),
        ("vm.kernel.initrd", vm.kernel().initrd().is_some(), "take an initrd; rvm's own holds its agent"),
    ];
    match refused.into_iter().find(|(_, present, _)| *present) {
        None => Ok(()),
        Some((name, _, problem)) => Err(impossible(name, problem)),
    }
}

/// Without a namespace of its own for names, the container shows the host's (`--uts=host`), or that of the namespace which
/// it joins.
fn host_name(spec: &mut Spec, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    let list = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let (whose, name) =
        match list.enumerate().find(|(_, namespace)| namespace.typ() == LinuxNamespaceType::Uts) {
            None => ("the host's", nix::unistd::gethostname().ok()),
            Some((index, namespace)) => {
                let Some(path) = namespace.path() else { return Ok(()) };
                let refused = |cause: Cause| {
                    field(
                        format!("linux.namespaces[{index}].path"),
                        format!("cannot use {}: {cause}", path.display()),
                    )
                };
                ("that namespace's", Some(name_within(path).map_err(refused)?))
            }
        };
    warnings.push(format!(
        "linux.namespaces: the container has {whose} name, but not its UTS namespace: a later change of the name, on \
         either side, does not reach the other"
    ));
    if spec.hostname().is_none() {
        spec.set_hostname(name.map(|name| name.to_string_lossy().into_owned()));
    }
    Ok(())
}

/// The host's name in a UTS namespace, which a thread enters to see it.
fn name_within(path: &Path) -> Result<OsString, Cause> {
    let namespace = File::open(path)?;
    let look = move || -> Result<OsString, Cause> {
        setns(namespace, CloneFlags::CLONE_NEWUTS)?;
        Ok(nix::unistd::gethostname()?)
    };
    std::thread::spawn(look).join().map_err(|_| Cause::from(io::Error::other("the thread for it failed")))?
}

fn personality(linux: &Linux, warnings: &mut Vec<String>) {
    let flags = linux.personality().as_ref().and_then(|personality| personality.flags().as_ref());
    if flags.is_some_and(|flags| !flags.is_empty()) {
        warnings.push("linux.personality.flags is ignored: the specification defines no flag".into());
    }
}

fn security_modules(spec: &Spec, warnings: &mut Vec<String>) {
    let process = spec.process().as_ref();
    let labels = [
        ("process.apparmorProfile", process.and_then(|process| process.apparmor_profile().as_deref())),
        ("process.selinuxLabel", process.and_then(|process| process.selinux_label().as_deref())),
        ("linux.mountLabel", spec.linux().as_ref().and_then(|linux| linux.mount_label().as_deref())),
    ];
    for (name, label) in labels {
        if label.is_some_and(|label| !label.is_empty() && label != "unconfined") {
            warnings.push(format!("{name} is ignored: the guest's kernel has no such security module"));
        }
    }
}

fn namespaces(linux: &Linux, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    let empty = Vec::new();
    let list = linux.namespaces().as_ref().unwrap_or(&empty);
    let required = [
        (LinuxNamespaceType::Pid, "share the host's processes (--pid=host)"),
        (LinuxNamespaceType::Ipc, "share the host's IPC objects (--ipc=host)"),
        (
            LinuxNamespaceType::Network,
            "share the host's network (--network=host); its network card is its own",
        ),
    ];
    for (kind, problem) in required {
        if !list.iter().any(|namespace| namespace.typ() == kind) {
            return Err(impossible("linux.namespaces", problem));
        }
    }
    for (index, namespace) in list.iter().enumerate() {
        if let Some(path) = namespace.path() {
            joined(namespace, path, &format!("linux.namespaces[{index}].path"), warnings)?;
        }
    }
    Ok(())
}

/// A namespace with a path is somebody else's; only a network namespace can be shared, since it ends at a cable.
fn joined(
    namespace: &LinuxNamespace,
    path: &Path,
    name: &str,
    warnings: &mut Vec<String>,
) -> Result<(), BundleError> {
    let problem = match namespace.typ() {
        LinuxNamespaceType::Network => return network(path, name),
        // What becomes of the name, `host_name` tells.
        LinuxNamespaceType::Uts => return Ok(()),
        LinuxNamespaceType::Cgroup => {
            warnings.push(format!(
                "{name} is the monitor's: the container has a namespace of the guest's to itself"
            ));
            return Ok(());
        }
        LinuxNamespaceType::Pid => "see the processes of another container or of the host",
        LinuxNamespaceType::Ipc => "share IPC objects with another container or with the host",
        LinuxNamespaceType::Mount => "share the mounts of another container or of the host",
        LinuxNamespaceType::User => "join a user namespace of the host; give ID mappings instead",
        LinuxNamespaceType::Time => "join a time namespace of the host",
    };
    Err(impossible(name, problem))
}

fn network(path: &Path, name: &str) -> Result<(), BundleError> {
    let unusable = |cause: Cause| field(name, format!("cannot use {}: {cause}", path.display()));
    let theirs = stat(path).map_err(|errno| unusable(errno.into()))?;
    let ours = stat("/proc/self/ns/net").map_err(|errno| unusable(errno.into()))?;
    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) {
        return Err(impossible(name, "share the host's network; its network card is its own"));
    }
    // Engines keep the namespaces that they make for a container in files of their own; a process's is that
    // of a container which runs already, and whose traffic would go to the new guest.
    if is_of_a_process(path) {
        return Err(impossible(name, "share the network of another container (--network=container:...)"));
    }
    Ok(())
}

fn is_of_a_process(path: &Path) -> bool {
    path.strip_prefix("/proc").is_ok_and(|rest| rest.ends_with("ns/net"))
}

fn devices(linux: &mut Linux, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    let privileged = linux.resources().as_ref().is_some_and(allows_every_device);
    let Some(list) = linux.devices().clone() else { return Ok(()) };
    if privileged {
        // Engines list each device of the host then. Privileged means the privileges of the guest.
        let (kept, dropped): (Vec<_>, Vec<_>) = list.into_iter().partition(is_possible);
        if !dropped.is_empty() {
            warnings.push(format!(
                "linux.devices: {} devices of the host are not given; a privileged container has the guest's",
                dropped.len()
            ));
        }
        linux.set_devices(Some(kept));
        return Ok(());
    }
    let rules = linux.resources().as_ref().and_then(|limits| limits.devices().as_deref()).unwrap_or_default();
    let is_refused = |device: &LinuxDevice| !is_possible(device) && disks::access(device, rules).is_none();
    match list.iter().position(is_refused) {
        None => Ok(()),
        Some(index) => {
            let problem = refusal(&list[index]);
            Err(impossible(&format!("linux.devices[{index}]"), &problem))
        }
    }
}

fn refusal(device: &LinuxDevice) -> String {
    let path = device.path().display();
    match device.typ() {
        LinuxDeviceType::B => {
            format!("pass the host's device {path}, which no rule of linux.resources.devices lets it read")
        }
        _ => format!("pass the host's device {path}; only block devices become devices of the guest"),
    }
}

fn allows_every_device(resources: &LinuxResources) -> bool {
    resources.devices().iter().flatten().any(|rule| {
        let any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        rule.allow() && any_type && rule.major().is_none_or(|major| major < 0)
    })
}

fn is_possible(device: &LinuxDevice) -> bool {
    is_of_the_guest(device) || !is_of_the_host(device)
}

fn is_of_the_guest(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => GUEST_DEVICES.contains(&(device.major(), device.minor())),
        LinuxDeviceType::P => true,
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

/// Whether the host has a device of these numbers. A node of others leads nowhere, here as there, and is no more than a node.
pub(super) fn is_of_the_host(device: &LinuxDevice) -> bool {
    let kind = match device.typ() {
        LinuxDeviceType::B => "block",
        LinuxDeviceType::C | LinuxDeviceType::U => "char",
        LinuxDeviceType::P => return false,
        LinuxDeviceType::A => return true,
    };
    let name = format!("/sys/dev/{kind}/{}:{}", device.major(), device.minor());
    // Where that cannot be seen the answer is the one that gives nothing away.
    !Path::new("/sys/dev").is_dir() || Path::new(&name).exists()
}

fn hardware(linux: &Linux, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(impossible("linux.netDevices", "take over network devices of the host"));
    }
    let ignored = [
        ("linux.intelRdt", linux.intel_rdt().is_some(), "it is about the host's hardware"),
        ("linux.memoryPolicy", linux.memory_policy().is_some(), "the guest's memory is one node"),
    ];
    for (name, present, why) in ignored {
        if present {
            warnings.push(format!("{name} is ignored: {why}"));
        }
    }
    Ok(())
}
