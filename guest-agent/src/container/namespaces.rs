//! The namespaces of the container within the guest.
//!
//! A container always gets pid, mount, UTS, IPC and cgroup namespaces of its own, whether or not the
//! configuration names them: the agent and its mounts are no business of the container's. The network
//! namespace is the guest's only one. A user namespace and one of clocks are made where the configuration asks for them.

use std::fs::{self, File};
use std::os::fd::AsFd;

use nix::sched::{self, CloneFlags};
use nix::unistd::{self, Gid, Pid, Uid};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, LinuxTimeOffset};

use crate::error::{Context, Result};

/// A time namespace, whose clocks count from another moment than the guest's (time_namespaces(7)).
pub const TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// Whether the configuration asks for a user namespace.
pub fn wants_user_namespace(linux: &Linux) -> bool {
    wants(linux, LinuxNamespaceType::User)
}

/// Whether the configuration asks for a time namespace.
pub fn wants_time_namespace(linux: &Linux) -> bool {
    wants(linux, LinuxNamespaceType::Time)
}

fn wants(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind)
}

/// Has a fork made with the configuration's clocks. Only a namespace that nobody is in yet lets them be set, and that of
/// a process is made for its children: so the agent makes it, forks, and lets go of it.
pub fn with_clocks<T>(linux: &Linux, fork: impl FnOnce() -> Result<Option<T>>) -> Result<Option<T>> {
    let own = File::open("/proc/self/ns/time").context(|| "opening the agent's time namespace")?;
    sched::unshare(TIME).context(|| "making the time namespace")?;
    let forked = set_clocks(linux).and_then(|()| fork());
    if !matches!(forked, Ok(None)) {
        sched::setns(&own, TIME).context(|| "returning to the agent's time namespace")?;
    }
    forked
}

fn set_clocks(linux: &Linux) -> Result<()> {
    let offsets = linux.time_offsets().iter().flatten();
    let line = |(clock, offset): (&String, &LinuxTimeOffset)| {
        format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0))
    };
    let lines: String = offsets.map(line).collect();
    if lines.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", &lines)
        .context(|| format!("setting the container's clocks to {lines:?}"))
}

/// What the container's first process is forked into. The cgroup namespace is missing: its root is the
/// cgroup of whoever makes it, and a fork makes it before the child is in its cgroup.
pub fn for_fork(user_namespace: bool) -> CloneFlags {
    let mut flags = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    flags.set(CloneFlags::CLONE_NEWUSER, user_namespace);
    flags
}

/// Joins the namespaces of the container's first process, all but those that a fork is made into.
pub fn join(init: impl AsFd, user_namespace: bool) -> Result<()> {
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    flags.set(CloneFlags::CLONE_NEWUSER, user_namespace);
    sched::setns(init, flags).context(|| "joining the container's namespaces")
}

/// Writes the maps of a process that was forked into a new user namespace.
pub fn write_id_maps(pid: Pid, users: &[LinuxIdMapping], groups: &[LinuxIdMapping]) -> Result<()> {
    for (file, maps) in [("uid_map", users), ("gid_map", groups)] {
        let path = format!("/proc/{pid}/{file}");
        let lines = id_map(maps);
        fs::write(path, &lines).context(|| format!("writing the user namespace's {file} {lines:?}"))?;
    }
    Ok(())
}

fn id_map(maps: &[LinuxIdMapping]) -> String {
    let line = |map: &LinuxIdMapping| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size());
    maps.iter().map(line).collect()
}

/// The guest's number for what is `id` inside of the maps; `None` where they do not hold it.
pub fn outside(maps: &[LinuxIdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id())?;
        (offset < map.size()).then(|| map.host_id().checked_add(offset))?
    })
}

/// Becomes the user namespace's root, whose ids the files that are made from here on get.
pub fn become_root() -> Result<()> {
    unistd::setgroups(&[]).context(|| "dropping the supplementary groups in the user namespace")?;
    unistd::setgid(Gid::from_raw(0)).context(|| "becoming group 0 of the user namespace")?;
    unistd::setuid(Uid::from_raw(0)).context(|| "becoming user 0 of the user namespace")
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxIdMappingBuilder;

    use super::*;

    #[test]
    fn ids_of_the_container_are_found_in_the_maps() {
        let map = |inner: u32, outer: u32, size: u32| {
            LinuxIdMappingBuilder::default().container_id(inner).host_id(outer).size(size).build().unwrap()
        };
        let maps = [map(0, 100_000, 10), map(1000, 500, 1), map(2000, u32::MAX, 2)];
        assert_eq!(outside(&maps, 3), Some(100_003));
        assert_eq!(outside(&maps, 1000), Some(500));
        assert_eq!(outside(&maps, 10), None);
        assert_eq!(outside(&maps, 2001), None);
    }

    #[test]
    fn an_id_map_names_the_container_first() {
        let map = LinuxIdMappingBuilder::default().container_id(0u32).host_id(100_000u32).size(65_536u32);
        assert_eq!(id_map(&[map.build().unwrap()]), "0 100000 65536\n");
    }
}
