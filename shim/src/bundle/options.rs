//! The vocabulary of a mount's options, as of mount(8), the OCI spec and runc.

use libc::{
    MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_STRICTATIME, MS_PRIVATE, MS_SHARED, MS_SLAVE,
    MS_UNBINDABLE,
};

/// All bits that say when access times are written; `relatime` is their absence.
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Attributes to set and to clear, in the terms of mount_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear.
    pub clear: u64,
}

impl Attributes {
    fn apply(&mut self, change: Change) {
        let Change { set, mut clear } = change;
        // The kernel wants the whole field of access times cleared before any of its values is set.
        if (set | clear) & ATIME != 0 {
            clear |= ATIME;
        }
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !(set & !ATIME)) | clear;
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A change of a mount's propagation (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`.
    pub kind: u64,
    /// Whether the mounts below change with it.
    pub recursive: bool,
}

/// A mount's options, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Whether this is a bind mount; `Some(true)` with the mounts below its source.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub attributes: Attributes,
    /// Attributes of the mount and all below it.
    pub recursive_attributes: Attributes,
    /// Changes of propagation, in order.
    pub propagation: Vec<Propagation>,
    /// What is left: options of the file system, or unknown words.
    pub data: Vec<String>,
}

impl MountOptions {
    /// Sorts the options by what they mean.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            match meaning(option) {
                Meaning::Bind { recursive } => {
                    parsed.bind = Some(recursive || parsed.bind.unwrap_or(false));
                }
                Meaning::Attribute(change) => parsed.attributes.apply(change),
                Meaning::RecursiveAttribute(change) => parsed.recursive_attributes.apply(change),
                Meaning::Propagation(propagation) => parsed.propagation.push(propagation),
                Meaning::Superblock => {}
                Meaning::Data => parsed.data.push(option.clone()),
            }
        }
        parsed
    }
}

#[derive(Clone, Copy)]
struct Change {
    set: u64,
    clear: u64,
}

enum Meaning {
    Bind { recursive: bool },
    Attribute(Change),
    RecursiveAttribute(Change),
    Propagation(Propagation),
    // Flags of a superblock, which bind mounts share with their source and the guest's own file systems honour.
    Superblock,
    Data,
}

fn meaning(option: &str) -> Meaning {
    if let Some(change) = attribute(option) {
        return Meaning::Attribute(change);
    }
    if let Some(propagation) = propagation(option) {
        return Meaning::Propagation(propagation);
    }
    match option {
        "bind" => return Meaning::Bind { recursive: false },
        "rbind" => return Meaning::Bind { recursive: true },
        "defaults" | "async" | "sync" | "dirsync" | "mand" | "nomand" | "iversion" | "noiversion"
        | "silent" | "loud" | "remount" | "acl" | "noacl" | "lazytime" | "nolazytime" => {
            return Meaning::Superblock;
        }
        _ => {}
    }
    match option.strip_prefix('r').and_then(attribute) {
        Some(change) => Meaning::RecursiveAttribute(change),
        None => Meaning::Data,
    }
}

fn attribute(option: &str) -> Option<Change> {
    let set = |set| Some(Change { set, clear: 0 });
    let clear = |clear| Some(Change { set: 0, clear });
    match option {
        "ro" => set(MOUNT_ATTR_RDONLY),
        "rw" => clear(MOUNT_ATTR_RDONLY),
        "nosuid" => set(MOUNT_ATTR_NOSUID),
        "suid" => clear(MOUNT_ATTR_NOSUID),
        "nodev" => set(MOUNT_ATTR_NODEV),
        "dev" => clear(MOUNT_ATTR_NODEV),
        "noexec" => set(MOUNT_ATTR_NOEXEC),
        "exec" => clear(MOUNT_ATTR_NOEXEC),
        "nosymfollow" => set(MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => clear(MOUNT_ATTR_NOSYMFOLLOW),
        "nodiratime" => set(MOUNT_ATTR_NODIRATIME),
        "diratime" => clear(MOUNT_ATTR_NODIRATIME),
        "noatime" => set(MOUNT_ATTR_NOATIME),
        "strictatime" => set(MOUNT_ATTR_STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => clear(ATIME),
        _ => None,
    }
}

fn propagation(option: &str) -> Option<Propagation> {
    let (kind, recursive) = match option {
        "shared" => (MS_SHARED, false),
        "rshared" => (MS_SHARED, true),
        "slave" => (MS_SLAVE, false),
        "rslave" => (MS_SLAVE, true),
        "private" => (MS_PRIVATE, false),
        "rprivate" => (MS_PRIVATE, true),
        "unbindable" => (MS_UNBINDABLE, false),
        "runbindable" => (MS_UNBINDABLE, true),
        _ => return None,
    };
    Some(Propagation { kind, recursive })
}

/// Whether this names a kind of propagation.
pub fn is_propagation(name: &str) -> bool {
    propagation(name).is_some()
}

/// Whether an option carries a label of a security module, which no guest of ours has.
pub fn is_label(option: &str) -> bool {
    ["context=", "fscontext=", "defcontext=", "rootcontext="].iter().any(|key| option.starts_with(key))
}

/// Whether the file system of this name, as the guest mounts it, knows the option.
pub fn known_to_file_system(file_system: &str, option: &str) -> bool {
    let key = option.split('=').next().unwrap_or(option);
    let keys: &[&str] = match file_system {
        "tmpfs" => &[
            "size",
            "nr_blocks",
            "nr_inodes",
            "mode",
            "uid",
            "gid",
            "huge",
            "mpol",
            "noswap",
            "inode32",
            "inode64",
            "tmpcopyup",
        ],
        "proc" => &["hidepid", "gid", "subset"],
        "devpts" => &["newinstance", "mode", "uid", "gid", "ptmxmode", "max"],
        "cgroup" | "cgroup2" => {
            &["nsdelegate", "favordynmods", "memory_localevents", "memory_recursiveprot", "pids_localevents"]
        }
        _ => &[],
    };
    keys.contains(&key)
}

/// Whether the guest has a file system that knows the option.
pub fn known_to_any_file_system(option: &str) -> bool {
    ["tmpfs", "proc", "devpts", "cgroup2"].iter().any(|kind| known_to_file_system(kind, option))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(&options.iter().map(|option| (*option).into()).collect::<Vec<_>>())
    }

    #[test]
    fn a_docker_volume_is_understood() {
        let options = parse(&["rbind", "rprivate", "ro", "nosuid"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.attributes, Attributes { set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, clear: 0 });
        assert_eq!(options.propagation, [Propagation { kind: MS_PRIVATE, recursive: true }]);
        assert_eq!(options.data, Vec::<String>::new());
    }

    #[test]
    fn of_two_opposite_options_the_later_wins() {
        assert_eq!(parse(&["ro", "rw"]).attributes, Attributes { set: 0, clear: MOUNT_ATTR_RDONLY });
        assert_eq!(parse(&["rw", "ro"]).attributes, Attributes { set: MOUNT_ATTR_RDONLY, clear: 0 });
    }

    #[test]
    fn a_choice_of_access_times_clears_the_whole_field_first() {
        let atime = parse(&["noatime"]).attributes;
        assert_eq!(atime, Attributes { set: MOUNT_ATTR_NOATIME, clear: ATIME });
        assert_eq!(parse(&["relatime"]).attributes, Attributes { set: 0, clear: ATIME });
        let last = parse(&["noatime", "strictatime"]).attributes;
        assert_eq!(last.set & ATIME, MOUNT_ATTR_STRICTATIME);
    }

    #[test]
    fn the_recursive_forms_are_kept_apart() {
        let options = parse(&["rbind", "rro", "rnoexec"]);
        assert!(options.attributes.is_empty());
        assert_eq!(options.recursive_attributes.set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOEXEC);
    }

    #[test]
    fn file_systems_know_their_own_options_only() {
        assert!(known_to_file_system("tmpfs", "size=64m"));
        assert!(!known_to_file_system("proc", "size=64m"));
        assert!(!known_to_file_system("bind", "mode=700"));
        assert_eq!(parse(&["ro", "sideways"]).data, ["sideways"]);
    }
}
