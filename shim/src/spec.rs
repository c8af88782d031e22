//! The description that `rvm spec` writes: a shell in `rootfs`, as a start for one's own.

use std::collections::HashSet;
use std::path::PathBuf;

use nix::unistd::{getegid, geteuid};
use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType,
    LinuxResources, Mount, Process, Root, Spec, get_default_maskedpaths, get_default_mounts,
    get_default_readonly_paths,
};

/// Version of the OCI runtime specification that rvm follows, in what it reads and in what it writes.
pub const OCI_VERSION: &str = "1.2.1";

/// The description; with `rootless`, the container's root is the calling user.
pub fn default_spec(rootless: bool) -> Spec {
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.into());
    spec.set_hostname(Some("rvm".into()));
    spec.set_annotations(None);
    spec.set_process(Some(process()));
    let mut root = Root::default();
    root.set_path(PathBuf::from("rootfs")).set_readonly(Some(true));
    spec.set_root(Some(root));
    spec.set_mounts(Some(mounts(rootless)));
    spec.set_linux(Some(linux(rootless)));
    spec
}

fn process() -> Process {
    let mut process = Process::default();
    let granted = HashSet::from([Capability::AuditWrite, Capability::Kill, Capability::NetBindService]);
    let mut capabilities = LinuxCapabilities::default();
    capabilities.set_bounding(Some(granted.clone()));
    capabilities.set_effective(Some(granted.clone()));
    capabilities.set_permitted(Some(granted));
    capabilities.set_inheritable(None).set_ambient(None);
    process.set_terminal(Some(true)).set_capabilities(Some(capabilities));
    process
}

fn mounts(rootless: bool) -> Vec<Mount> {
    let mut mounts = get_default_mounts();
    if rootless {
        // The group of terminals is not among the mapped ones.
        for mount in &mut mounts {
            let kept = mount.options().as_ref().map(|options| {
                options.iter().filter(|option| *option != "gid=5").cloned().collect::<Vec<_>>()
            });
            mount.set_options(kept);
        }
    }
    mounts
}

fn linux(rootless: bool) -> Linux {
    let mut linux = match rootless {
        true => Linux::rootless(geteuid().as_raw(), getegid().as_raw()),
        false => Linux::default(),
    };
    if rootless {
        // Other runtimes share the host's network then, which a microVM cannot.
        let mut network = LinuxNamespace::default();
        network.set_typ(LinuxNamespaceType::Network);
        linux.namespaces_mut().get_or_insert_default().push(network);
    } else {
        let mut nothing = LinuxDeviceCgroup::default();
        nothing.set_allow(false).set_access(Some("rwm".into()));
        let mut resources = LinuxResources::default();
        resources.set_devices(Some(vec![nothing]));
        linux.set_resources(Some(resources));
    }
    let mut masked = get_default_maskedpaths();
    masked.push("/sys/devices/virtual/powercap".into());
    linux.set_masked_paths(Some(masked)).set_readonly_paths(Some(get_default_readonly_paths()));
    linux
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn both_descriptions_are_good_bundles() {
        for rootless in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            std::fs::create_dir(directory.path().join("rootfs")).unwrap();
            let json = serde_json::to_string(&default_spec(rootless)).unwrap();
            std::fs::write(directory.path().join("config.json"), json).unwrap();
            let bundle = Bundle::load(directory.path()).unwrap();
            assert_eq!(bundle.warnings, Vec::<String>::new());
            assert_eq!(bundle.spec.process().as_ref().unwrap().args().as_ref().unwrap(), &["sh"]);
        }
    }
}
