//! The description as the agent gets it.

use std::path::PathBuf;

use oci_spec::runtime::{Hooks, Linux, Mount, Process, Root, Spec};

use super::error::BundleError;
use super::options::is_label;
use super::parse::MAX_BYTES;
use super::rlimits::inherit_limits;
use super::{field, is_bind};

/// Leaves out what is the host's business: its paths, its hooks, its security modules, and the seccomp profile,
/// which travels compiled. Adds what a process would inherit.
pub(super) fn spec_json(spec: &Spec) -> Result<String, BundleError> {
    let mut guest = spec.clone();
    guest.set_root(spec.root().as_ref().map(root)).set_hooks(spec.hooks().as_ref().and_then(hooks));
    guest.set_solaris(None).set_windows(None).set_vm(None).set_zos(None);
    guest.mounts_mut().iter_mut().flatten().for_each(mount);
    if let Some(description) = guest.process_mut() {
        process(description);
    }
    if let Some(description) = guest.linux_mut() {
        linux(description);
    }
    // Only a path that is no UTF-8 can fail here, and only in a description that was made in memory.
    let json = serde_json::to_string(&guest).map_err(|error| field("the document", error.to_string()))?;
    // The types write fields out that were left out of the file.
    if json.len() as u64 > MAX_BYTES {
        let problem = format!("it is longer than the {MAX_BYTES} bytes that the guest can be sent");
        return Err(field("the document", problem));
    }
    Ok(json)
}

fn root(root: &Root) -> Root {
    let mut guest = root.clone();
    guest.set_path(PathBuf::from("/"));
    guest
}

/// `startContainer` hooks run inside the container; all others were for the host.
fn hooks(hooks: &Hooks) -> Option<Hooks> {
    let inside = hooks.start_container().as_ref().filter(|list| !list.is_empty())?;
    let mut guest = Hooks::default();
    guest.set_start_container(Some(inside.clone()));
    Some(guest)
}

fn mount(mount: &mut Mount) {
    if is_bind(mount) {
        // Its content is at the destination already.
        mount.set_source(None);
    }
    let kept: Option<Vec<String>> = mount
        .options()
        .as_ref()
        .map(|options| options.iter().filter(|option| !is_label(option)).cloned().collect());
    mount.set_options(kept);
}

fn process(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    inherit_limits(process);
}

fn linux(linux: &mut Linux) {
    linux.set_seccomp(None).set_cgroups_path(None).set_mount_label(None);
    linux.set_intel_rdt(None).set_memory_policy(None).set_net_devices(None);
    linux.set_rootfs_propagation(linux.rootfs_propagation().clone().filter(|name| !name.is_empty()));
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        namespace.set_path(None);
    }
}
