//! Bundles: a directory with `config.json`, and the root file system that it names.
//!
//! A bundle is checked once, when it is loaded, for everything that can be known without starting anything.
//! What is senseless, unknown, or impossible in a virtual machine is refused in one sentence that names the field;
//! what merely has no effect there becomes a warning.

mod annotations;
mod capabilities;
mod disks;
mod error;
mod guest;
mod microvm;
pub mod options;
mod parse;
pub mod resources;
mod rlimits;
mod validate;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Process, Spec};

use annotations::Annotations;
pub use annotations::{NetworkRates, TEMPLATE};
pub use disks::{HostDisk, MAX_DISKS};
pub use error::BundleError;
pub use rlimits::inherit_limits;

use crate::cause::Cause;

/// Name of the description in a bundle.
pub const CONFIG: &str = "config.json";

const PROCESS: &str = "process.json";

/// A bundle that has been found good.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The bundle's directory, absolute and without symlinks.
    pub path: PathBuf,
    /// The description, with relative paths made absolute and mounts classified (see [`is_bind`]).
    pub spec: Spec,
    /// The directory that becomes the container's root, absolute and without symlinks.
    pub rootfs: PathBuf,
    /// The host's block devices that become disks of the guest.
    pub disks: Vec<HostDisk>,
    /// What the container's network is limited to.
    pub network_rates: NetworkRates,
    /// Whether the container's machine may go on from a template.
    pub may_use_template: bool,
    /// What the description asks for that has no effect in a microVM: one sentence each.
    pub warnings: Vec<String>,
    guest_spec: String,
}

/// Where the container's network namespace comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// A fresh one, which the engine fills through a hook or through the reported process id.
    New,
    /// One that the engine made and outlives the container.
    Existing(PathBuf),
}

impl Bundle {
    /// Reads and checks the bundle in a directory.
    pub fn load(directory: &Path) -> Result<Bundle, BundleError> {
        let path = canonical(directory)?;
        let mut warnings = Vec::new();
        let spec = parse::read(&path.join(CONFIG), CONFIG, "/process/capabilities", &mut warnings)?;
        Self::check(path, spec, warnings)
    }

    /// Checks a description that was made in memory as if it stood in the directory.
    pub fn from_spec(directory: &Path, spec: Spec) -> Result<Bundle, BundleError> {
        Self::check(canonical(directory)?, spec, Vec::new())
    }

    fn check(path: PathBuf, mut spec: Spec, mut warnings: Vec<String>) -> Result<Bundle, BundleError> {
        validate::spec(&mut spec, &path, &mut warnings)?;
        microvm::possible(&mut spec, &mut warnings)?;
        let disks = spec.linux().as_ref().map_or(Ok(Vec::new()), disks::of)?;
        let Annotations { network_rates, may_use_template } = annotations::read(&spec, &mut warnings)?;
        let rootfs = rootfs(&path, &spec)?;
        let guest_spec = guest::spec_json(&spec)?;
        Ok(Bundle { path, spec, rootfs, disks, network_rates, may_use_template, warnings, guest_spec })
    }

    /// The description as the agent gets it, without what concerns only the host.
    pub fn guest_spec_json(&self) -> String {
        self.guest_spec.clone()
    }

    /// The guest's kernel, where the description names one (`vm.kernel.path`).
    pub fn kernel(&self) -> Option<&Path> {
        self.spec.vm().as_ref().map(|vm| vm.kernel().path().as_path())
    }

    /// Where the container's network namespace comes from.
    pub fn network_namespace(&self) -> NetworkNamespace {
        self.spec
            .linux()
            .iter()
            .flat_map(|linux| linux.namespaces().iter().flatten())
            .filter(|namespace| namespace.typ() == LinuxNamespaceType::Network)
            .find_map(|namespace| namespace.path().clone())
            .map_or(NetworkNamespace::New, NetworkNamespace::Existing)
    }
}

/// Reads and checks the description of a further process of a container (`exec --process`).
pub fn load_process(path: &Path, warnings: &mut Vec<String>) -> Result<Process, BundleError> {
    let process = parse::read(path, PROCESS, "/capabilities", warnings)?;
    validate::process(&process, PROCESS, "", warnings)?;
    Ok(process)
}

/// Whether a mount of a loaded bundle shows a part of the host's file tree; all others are made in the guest.
pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
}

fn canonical(directory: &Path) -> Result<PathBuf, BundleError> {
    directory
        .canonicalize()
        .map_err(|error| BundleError::Directory { path: directory.into(), cause: error.into() })
}

fn rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf, BundleError> {
    let Some(root) = spec.root() else {
        return Err(field("root", "it is missing"));
    };
    if root.path().as_os_str().is_empty() {
        return Err(field("root.path", "it is empty"));
    }
    let path = bundle.join(root.path());
    let refused = |cause: Cause| BundleError::Rootfs { path: path.clone(), cause };
    let rootfs = path.canonicalize().map_err(|error| refused(error.into()))?;
    if !rootfs.is_dir() {
        return Err(refused(nix::errno::Errno::ENOTDIR.into()));
    }
    Ok(rootfs)
}

/// An error about a field of `config.json`.
fn field(field: impl Into<String>, problem: impl Into<String>) -> BundleError {
    BundleError::Field { file: CONFIG, field: field.into(), problem: problem.into() }
}

/// An error about a field of `config.json` that asks for what a microVM cannot do.
fn impossible(field: &str, problem: &str) -> BundleError {
    BundleError::Impossible { file: CONFIG, field: field.into(), problem: problem.into() }
}
