//! What runc passes and rvm cannot, or must not, each with its reason. Whoever adds a line here says why no work on rvm could
//! help. Where a case passes after all, or is in no suite any more, `cargo xtask conformance` fails.

/// Cases of one program or group that rvm cannot pass, for one reason.
pub struct Impossible {
    /// The suite, as [`super::suites`] names it.
    pub suite: &'static str,
    /// The program or group.
    pub part: &'static str,
    /// The cases in it.
    pub cases: &'static [&'static str],
    /// Why, in one sentence.
    pub reason: &'static str,
}

const NO_NAMESPACE_OF_THE_HOST: &str = "A guest cannot be in the host's pid, IPC and network namespaces, so a container that inherits one is refused.";
const NO_DESCRIPTORS: &str =
    "A file descriptor of the host means nothing in the guest, so `--preserve-fds` is refused.";

/// The list.
pub const LIST: &[Impossible] = &[
    Impossible {
        suite: "validation",
        part: "linux_cgroups_network",
        cases: &["comes to its end"],
        reason: "A guest cannot be in the host's network namespace, so the program's containers that inherit it are refused.",
    },
    Impossible {
        suite: "validation",
        part: "linux_ns_itype",
        cases: &[
            "inherit namespace cgroup without type",
            "inherit namespace ipc without type",
            "inherit namespace mnt without type",
            "inherit namespace net without type",
            "inherit namespace pid without type",
            "inherit namespace user without type",
            "inherit namespace uts without type",
        ],
        reason: NO_NAMESPACE_OF_THE_HOST,
    },
    Impossible {
        suite: "validation",
        part: "linux_ns_nopath",
        cases: &["create namespace pid without path", "create namespace user without path"],
        reason: "The process that the host sees is the monitor; the container's pid and user namespaces are in the guest.",
    },
    Impossible {
        suite: "validation",
        part: "linux_ns_path",
        cases: &["set ipc namespace by path", "set mnt namespace by path", "set pid namespace by path"],
        reason: "Processes, IPC objects and mounts of two kernels cannot see each other, so joining is refused.",
    },
    Impossible {
        suite: "validation",
        part: "linux_ns_path",
        cases: &["set net namespace by path"],
        reason: "A guest has a loopback and sockets of its own and would take a running process's traffic, so joining that process's network is refused.",
    },
    Impossible {
        suite: "validation",
        part: "mounts",
        cases: &[
            "mounts[9] (/mnt/etc-shared) found in order",
            "mounts[10] (/mnt/etc-rshared) found in order",
            "mounts[11] (/mnt/etc-slave) found in order",
            "mounts[12] (/mnt/etc-rslave) found in order",
            "mounts[13] (/mnt/etc-private) found in order",
            "mounts[14] (/mnt/etc-rprivate) found in order",
            "mounts[15] (/mnt/etc-unbindable) found in order",
            "mounts[16] (/mnt/etc-runbindable) found in order",
        ],
        reason: "A volume is part of the virtio-fs tree, so the guest's table of mounts shows its place there and not the host's folder.",
    },
    Impossible {
        suite: "contest",
        part: "exec",
        cases: &["mount_test"],
        reason: "The case looks for /proc/acpi, and the guest's kernel has no ACPI.",
    },
    Impossible { suite: "contest", part: "exec", cases: &["preserve_fds_test"], reason: NO_DESCRIPTORS },
    Impossible { suite: "contest", part: "fd_control", cases: &["pass_single_fd"], reason: NO_DESCRIPTORS },
    Impossible {
        suite: "contest",
        part: "hooks",
        cases: &["hooks"],
        reason: "The case lets a startContainer hook fail and expects `start` not to notice, where the specification wants an error.",
    },
    Impossible {
        suite: "contest",
        part: "memory_policy",
        cases: &["default_with_missing_nodes_ok"],
        reason: "The guest's memory is one node, and its kernel has no NUMA and so no /proc/PID/numa_maps.",
    },
    Impossible {
        suite: "contest",
        part: "net_devices",
        cases: &["back_device"],
        reason: "Network devices of the host cannot move into the guest, so `linux.netDevices`, which runc 1.1 ignores, is refused.",
    },
    Impossible { suite: "contest", part: "ns_itype", cases: &["ns_itype"], reason: NO_NAMESPACE_OF_THE_HOST },
    Impossible {
        suite: "contest",
        part: "root_readonly",
        cases: &["root_readonly_true_in_userns_test"],
        reason: "A guest cannot be in the host's network namespace, so a container that inherits it is refused.",
    },
    Impossible {
        suite: "contest",
        part: "seccomp_notify",
        cases: &["seccomp_notify"],
        reason: "The listener lives on the host and the system call in the guest, so SCMP_ACT_NOTIFY is refused.",
    },
    Impossible {
        suite: "contest",
        part: "update",
        cases: &["update_cgroup_v2_common_limits_test", "update_cgroup_v2_resources_via_unified_map_test"],
        reason: "The host's cgroup limits the virtual machine with its overhead, and processes are counted in the guest, so these numbers are others.",
    },
];

impl Impossible {
    /// Whether it is about this case.
    pub fn names(&self, suite: &str, part: &str, case: &str) -> bool {
        self.suite == suite && self.part == part && self.cases.contains(&case)
    }
}

/// The entry of a case.
pub fn entry(suite: &str, part: &str, case: &str) -> Option<&'static Impossible> {
    LIST.iter().find(|entry| entry.names(suite, part, case))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_explained_to_users_too() {
        let page = include_str!("../../../docs/conformance.md");
        for Impossible { suite, part, cases, reason } in LIST {
            assert!(reason.ends_with('.'), "{reason}");
            let row = format!("| {suite} | {part} | {} | {reason} |", cases.join("<br>"));
            assert!(page.contains(&row), "docs/conformance.md has no line\n{row}");
        }
    }
}
