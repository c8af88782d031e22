//! The container's process list, as the container sees it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;

use nix::unistd::Pid;
use oci_spec::runtime::LinuxIdMapping;
use rvm_protocol::GuestProcess;

use super::Container;

/// A command line may be megabytes long; a list needs its beginning.
const MAX_COMMAND: usize = 1024;
/// So that the answer stays within a message: with the commands, some 2 MiB at most.
const MAX_PROCESSES: usize = 2048;

/// Lists the processes in the container's cgroup.
pub fn list(container: &Container) -> Vec<GuestProcess> {
    let maps = container.id_maps().map(|(users, _)| users);
    let found: Vec<(Pid, Status)> = container
        .cgroup
        .processes()
        .into_iter()
        .take(MAX_PROCESSES)
        .filter_map(|pid| Some((pid, Status::parse(&read(pid, "status")?)?)))
        .collect();
    let inner: HashMap<i32, i32> = found.iter().map(|(_, status)| (status.outer, status.inner)).collect();
    let line = |(pid, status): (Pid, Status)| GuestProcess {
        pid: status.inner,
        parent: inner.get(&status.parent).copied().unwrap_or(0),
        user: inside(maps, status.user),
        command: command(pid, &status.name),
    };
    found.into_iter().map(line).collect()
}

/// What `/proc/PID/status` says.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    name: String,
    /// Process id in the agent's namespace.
    outer: i32,
    /// Process id in the container's.
    inner: i32,
    /// Parent's process id in the agent's namespace.
    parent: i32,
    user: u32,
}

impl Status {
    /// `None` for what is no process of a container.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
        };
        // From the reader's pid namespace down; the container's is the second.
        let mut ids = field("NSpid")?.split_whitespace().map(str::parse);
        Some(Self {
            name: field("Name")?.to_owned(),
            outer: ids.next()?.ok()?,
            inner: ids.next()?.ok()?,
            parent: field("PPid")?.parse().ok()?,
            // Real, effective, saved, file system.
            user: field("Uid")?.split_whitespace().nth(1)?.parse().ok()?,
        })
    }
}

fn read(pid: Pid, file: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/{file}")).ok()
}

fn command(pid: Pid, name: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(format!("/proc/{pid}/cmdline")) {
        let _ = file.take(MAX_COMMAND as u64).read_to_end(&mut bytes);
    }
    match words(&bytes).trim_end() {
        // A zombie, or a kernel thread.
        "" => format!("[{name}]"),
        words => words.to_owned(),
    }
}

/// A command line as one line of text. What is no text is replaced by what may be longer, so it is cut again.
fn words(bytes: &[u8]) -> String {
    let mut words = String::from_utf8_lossy(bytes).replace('\0', " ");
    let end = (0..=MAX_COMMAND.min(words.len())).rev().find(|end| words.is_char_boundary(*end));
    words.truncate(end.unwrap_or(0));
    words
}

/// A user of the guest as the container's user namespace numbers it.
fn inside(maps: Option<&[LinuxIdMapping]>, user: u32) -> u32 {
    /// What the kernel shows for a user that a namespace does not know.
    const OVERFLOW: u32 = 65_534;
    let Some(maps) = maps else { return user };
    maps.iter()
        .find_map(|map| {
            let offset = user.checked_sub(map.host_id())?;
            (offset < map.size()).then(|| map.container_id().saturating_add(offset))
        })
        .unwrap_or(OVERFLOW)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxIdMappingBuilder;
    use proptest::prelude::*;

    use super::*;

    const STATUS: &str = "Name:\tsh\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t131\nPid:\t131\nPPid:\t1\n\
                          Uid:\t1000\t1001\t1000\t1000\nNSpid:\t131\t7\nNSpgid:\t131\t7\n";

    #[test]
    fn a_status_is_read_by_the_containers_ids() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!(status, Status { name: "sh".into(), outer: 131, inner: 7, parent: 1, user: 1001 });
    }

    #[test]
    fn a_process_outside_of_any_container_is_none_of_them() {
        assert_eq!(Status::parse(&STATUS.replace("NSpid:\t131\t7", "NSpid:\t131")), None);
    }

    #[test]
    fn the_longest_list_fits_a_message() {
        let command = words(&[0xff; MAX_COMMAND]);
        assert!(command.len() <= MAX_COMMAND && command.len() > MAX_COMMAND - 4);
        let line = GuestProcess { pid: i32::MIN, parent: i32::MIN, user: u32::MAX, command };
        assert!(rvm_protocol::frame::encode(&vec![line; MAX_PROCESSES]).is_ok());
    }

    #[test]
    fn users_are_numbered_as_the_user_namespace_does() {
        let map = LinuxIdMappingBuilder::default().container_id(0u32).host_id(100_000u32).size(10u32);
        let maps = [map.build().unwrap()];
        assert_eq!(inside(None, 5), 5);
        assert_eq!(inside(Some(&maps), 100_003), 3);
        assert_eq!(inside(Some(&maps), 100_010), 65_534);
        assert_eq!(inside(Some(&maps), 0), 65_534);
    }

    proptest! {
        #[test]
        fn no_status_causes_a_panic(text in "(Name|Uid|NSpid|PPid|:|\t|\n|[0-9-]){0,40}") {
            let _ = Status::parse(&text);
        }
    }
}
