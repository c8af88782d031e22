//! The container: what the agent knows of it, and what the child makes around itself.
//!
//! The agent's half (limits, network sysctls, the root file system's device) is done before the fork, by
//! [`Container::prepare`]. The child's half is [`rootfs::build`], in namespaces that hold nothing else yet.

pub mod cgroup;
pub mod device_rules;
pub mod devices;
pub mod disks;
pub mod hooks;
pub mod mounts;
pub mod namespaces;
pub mod options;
pub mod processes;
pub mod rootfs;
pub mod sysctl;
pub mod tree;

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::mount::{MntFlags, MsFlags};
use nix::sys::stat;
use nix::unistd;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxResources, Process, Spec};
use rvm_protocol::{HostMount, ROOTFS_TAG, StartContainer};

use self::cgroup::Cgroup;
use self::disks::Disks;
use crate::error::{Context, Result, other};
use crate::sys::mount::FileSystem;
use crate::sys::process::Child;

/// How far files that are read in sequence are read ahead.
const READ_AHEAD_KIB: &str = "1024";

/// Where the container's root file system comes from.
#[derive(Clone, Debug)]
pub enum RootSource {
    /// The virtio-fs device of the guest.
    VirtioFs,
    /// A directory, for tests on a machine that is no guest.
    Directory(PathBuf),
}

/// The places that the agent works in.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the root file system comes from.
    pub source: RootSource,
    /// Mount point of the root file system as the host serves it; nothing is ever mounted over it.
    pub pristine: PathBuf,
    /// Mount point of the container's root, used in the container's mount namespace only.
    pub root: PathBuf,
    /// The cgroup below which the container's is made.
    pub cgroups: PathBuf,
}

impl Settings {
    /// The places in a guest.
    pub fn guest() -> Self {
        Self {
            source: RootSource::VirtioFs,
            pristine: "/rootfs".into(),
            root: "/container".into(),
            cgroups: "/sys/fs/cgroup".into(),
        }
    }
}

/// A container that has been prepared, and later runs.
pub struct Container {
    /// Its ID.
    pub id: String,
    /// Its state as JSON, which hooks are told.
    pub hook_state: String,
    /// Its configuration.
    pub spec: Spec,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its first process, once it has been forked.
    pub init: Option<Child>,
    /// A detached mount of sysfs for a container with a user namespace: sysfs belongs to the network
    /// namespace, which is the guest's, so the container's own root may not make one.
    pub sysfs: Option<OwnedFd>,
    /// Mounts of the host in its tree: those below its volumes, and those that are restricted.
    pub host_mounts: Vec<HostMount>,
    /// Its disks.
    disks: Disks,
    /// The program that decides which devices it may use.
    device_rules: OwnedFd,
    settings: Settings,
}

impl Container {
    /// Does what needs the agent's own privileges and namespaces, before the container's first fork.
    pub fn prepare(start: &StartContainer, settings: &Settings) -> Result<Self> {
        let mut spec: Spec = serde_json::from_str(&start.spec).context(|| "the container's configuration")?;
        let disks = Disks::find(&start.disks)?;
        disks.translate(&mut spec);
        let linux = spec.linux().as_ref();
        if let Some(values) = linux.and_then(|linux| linux.sysctl().as_ref()) {
            sysctl::write_network(values)?;
        }
        let cgroup = Cgroup::create(&settings.cgroups, &start.id)?;
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        if let Some(resources) = resources {
            cgroup.apply(resources)?;
        }
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        let device_rules = device_rules::enforce(&cgroup, rules, None)?;
        if let Some(limit) = start.memory_limit {
            cgroup.set_memory_limit(limit)?;
        }
        let sysfs = linux.is_some_and(namespaces::wants_user_namespace).then(make_sysfs).transpose()?;
        // Last, so that nothing is mounted where anything else fails.
        mount_pristine(settings)?;
        Ok(Self {
            id: start.id.clone(),
            hook_state: start.hook_state.clone(),
            spec,
            cgroup,
            init: None,
            sysfs,
            host_mounts: start.host_mounts.clone(),
            disks,
            device_rules,
            settings: settings.clone(),
        })
    }

    /// Changes its limits while it runs.
    pub fn update(&mut self, resources: &LinuxResources) -> Result<()> {
        self.cgroup.update(resources)?;
        if let Some(mut rules) = resources.devices().clone() {
            rules.iter_mut().for_each(|rule| self.disks.translate_rule(rule));
            self.device_rules = device_rules::enforce(&self.cgroup, &rules, Some(&self.device_rules))?;
        }
        Ok(())
    }

    /// Description of its first process.
    pub fn process(&self) -> Result<&Process> {
        self.spec.process().as_ref().ok_or_else(|| other("the container's configuration has no process"))
    }

    /// The places it is made in.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its user namespace's maps, of users and of groups; `None` where it has no user namespace of its own.
    pub fn id_maps(&self) -> Option<(&[LinuxIdMapping], &[LinuxIdMapping])> {
        let linux = self.spec.linux().as_ref()?;
        let users = linux.uid_mappings().as_deref().unwrap_or_default();
        let groups = linux.gid_mappings().as_deref().unwrap_or_default();
        (namespaces::wants_user_namespace(linux) && !users.is_empty()).then_some((users, groups))
    }

    /// What its clocks are set by, where it has a time namespace of its own.
    pub fn clocks(&self) -> Option<&Linux> {
        self.spec.linux().as_ref().filter(|linux| namespaces::wants_time_namespace(linux))
    }

    /// Ends what is left of a container whose first process has ended, and brings everything that was
    /// written to the host.
    pub fn finish(&self) {
        self.cgroup.kill_all();
        // The container's own copy of the mount went with its namespace, so this is the last: the kernel writes
        // what is dirty in mapped files before it returns. All else is on the host already, for virtio-fs caches
        // no writes. To ask the host for a sync would be to wait for all that the whole host has written.
        let _ = nix::mount::umount2(&self.settings.pristine, MntFlags::MNT_DETACH);
    }
}

/// Brings everything that was written to the host: in the root file system and in the volumes, each of which is
/// a file system of its own below it.
pub fn sync() {
    unistd::sync();
}

/// A sysfs whose source has the name that programs expect and mount tables show.
fn make_sysfs() -> Result<OwnedFd> {
    let make = || {
        let sysfs = FileSystem::open("sysfs")?;
        sysfs.set("source", Some("sysfs"))?;
        sysfs.mount()
    };
    make().context(|| "making a sysfs for the container")
}

/// Has files of the file system at a place be read ahead by as much as one request can carry. What is mounted below it
/// has the same device for this purpose.
fn read_ahead(place: &Path) -> io::Result<()> {
    let device = fs::metadata(place)?.dev();
    let (major, minor) = (stat::major(device), stat::minor(device));
    fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB)
}

fn mount_pristine(settings: &Settings) -> Result<()> {
    let none = None::<&str>;
    let place = &settings.pristine;
    match &settings.source {
        RootSource::VirtioFs => {
            nix::mount::mount(Some(ROOTFS_TAG), place, Some("virtiofs"), MsFlags::empty(), none)
                .context(|| format!("mounting the virtio-fs device {ROOTFS_TAG:?}"))?;
            read_ahead(place).context(|| "setting how far files are read ahead")
        }
        RootSource::Directory(path) => {
            nix::mount::mount(Some(path), place, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                .context(|| format!("mounting the directory {}", path.display()))
        }
    }
}
