//! Where the hierarchies are mounted, and where in them a container's cgroup is.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{CgroupError, Directory, HostCgroup, Version, write};
use crate::mountinfo::{self, MountEntry};

/// The hierarchies of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    version: Version,
    hierarchies: Vec<Hierarchy>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    controllers: BTreeSet<String>,
    mount_point: PathBuf,
    // The cgroup of this process, from the mount point on.
    own: PathBuf,
}

impl Layout {
    pub(super) fn read() -> Result<Layout, CgroupError> {
        let mounts = mountinfo::read().map_err(CgroupError::Unknown)?;
        let own =
            fs::read_to_string("/proc/self/cgroup").map_err(|error| CgroupError::Unknown(error.into()))?;
        Self::of(&mounts, &own).ok_or(CgroupError::None)
    }

    /// Version 2 counts where it is mounted in the usual place; beside version 1 it has no controllers.
    pub(super) fn of(mounts: &[MountEntry], own: &str) -> Option<Layout> {
        let unified = mounts.iter().rfind(|mount| {
            mount.file_system == "cgroup2" && mount.mount_point == Path::new("/sys/fs/cgroup")
        });
        if let Some(mount) = unified {
            let own = own_cgroup(own, &mount.root, |controllers| controllers.is_empty());
            let hierarchy =
                Hierarchy { controllers: BTreeSet::new(), mount_point: mount.mount_point.clone(), own };
            return Some(Layout { version: Version::V2, hierarchies: vec![hierarchy] });
        }
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        for mount in mounts.iter().filter(|mount| mount.file_system == "cgroup") {
            let controllers: BTreeSet<String> = mount
                .super_options
                .iter()
                .filter(|option| !NO_CONTROLLERS.contains(&option.as_str()))
                .filter(|option| !option.starts_with("release_agent="))
                .cloned()
                .collect();
            let own =
                own_cgroup(own, &mount.root, |list| list.split(',').any(|name| controllers.contains(name)));
            if hierarchies.iter().all(|other| other.controllers != controllers) {
                hierarchies.push(Hierarchy { controllers, mount_point: mount.mount_point.clone(), own });
            }
        }
        (!hierarchies.is_empty()).then_some(Layout { version: Version::V1, hierarchies })
    }

    /// Where a container's cgroup is: `linux.cgroupsPath`, from the root if absolute, or else from the cgroup that
    /// this process is in (version 1) or is a member of (version 2, where one with processes can have no children).
    pub(super) fn locate(&self, path: Option<&Path>, id: &str) -> Result<HostCgroup, CgroupError> {
        let default = PathBuf::from("/").join(id);
        let path = path.filter(|path| !path.as_os_str().is_empty()).unwrap_or(&default);
        let inner = clean(path);
        let mut directories = Vec::new();
        for hierarchy in &self.hierarchies {
            let base = match (path.is_absolute(), self.version) {
                (true, _) => Path::new(""),
                (false, Version::V1) => hierarchy.own.as_path(),
                (false, Version::V2) => hierarchy.own.parent().unwrap_or(Path::new("")),
            };
            if inner.as_os_str().is_empty() {
                return Err(CgroupError::Root(path.into()));
            }
            let path = hierarchy.mount_point.join(base).join(&inner);
            directories.push(Directory { controllers: hierarchy.controllers.clone(), path });
        }
        Ok(HostCgroup { version: self.version, directories, scope: None })
    }

    /// Makes a cgroup's directory and those above it, ready for limits. `made` notes what was not there before.
    pub(super) fn make_directory(&self, path: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
        let Some(hierarchy) = self.hierarchies.iter().find(|all| path.starts_with(&all.mount_point)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut here = hierarchy.mount_point.clone();
        for part in path.strip_prefix(&hierarchy.mount_point).unwrap_or(path).components() {
            if self.version == Version::V2 {
                hand_down_controllers(&here);
            }
            let parent = here.clone();
            here.push(part);
            match fs::create_dir(&here) {
                Ok(()) => made.push(here.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            if hierarchy.controllers.contains("cpuset") {
                inherit_cpuset(&parent, &here)?;
            }
        }
        Ok(())
    }
}

const NO_CONTROLLERS: [&str; 6] = ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode"];

/// The path of this process's cgroup below the directory that is mounted, from `/proc/self/cgroup`.
fn own_cgroup(text: &str, mounted: &Path, is_it: impl Fn(&str) -> bool) -> PathBuf {
    let path = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        fields.next().filter(|_| is_it(controllers))
    });
    let path = Path::new(path.unwrap_or("/"));
    clean(path.strip_prefix(mounted).unwrap_or(path))
}

/// Without `..`, which would lead out of the hierarchy, and without the leading slash.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Enables for the children what a cgroup has. A controller that cannot be handed down (one that a process of
/// this cgroup itself uses) is noticed when one of its limits is asked for.
fn hand_down_controllers(path: &Path) {
    let available = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(path.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if !enabled.split_whitespace().any(|name| name == controller) {
            let _ = write(&path.join("cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
}

/// A new cpuset of version 1 is empty, and takes no process before it has processors and memory nodes.
fn inherit_cpuset(parent: &Path, child: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let current = fs::read_to_string(child.join(file))?;
        if current.trim().is_empty() {
            write(&child.join(file), fs::read_to_string(parent.join(file))?.trim())?;
        }
    }
    Ok(())
}
