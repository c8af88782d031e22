//! Mount options as `fstab` and the OCI runtime specification (config.md, "Mounts") write them.

use nix::mount::MsFlags;

use crate::sys::mount::{Change, attribute};

/// The attributes that say when the time of the last access is noted.
const ACCESS_TIMES: u64 = attribute::ATIME | attribute::NODIRATIME;

/// The options of one mount, taken apart by what they apply to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Attributes of the mount itself.
    pub attributes: Change,
    /// Attributes of the mount and of all below it.
    pub recursive_attributes: Change,
    /// Changes of the propagation, in their order, each with whether it applies to all below.
    pub propagation: Vec<(u64, bool)>,
    /// Options of the file system: keys with or without a value.
    pub file_system: Vec<(String, Option<String>)>,
    /// Whether this is a bind mount, and whether one of all that is below.
    pub bind: Option<Bind>,
    /// Whether a tmpfs starts with a copy of the directory that it covers.
    pub copy_up: bool,
}

/// The two kinds of bind mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// The one mount.
    Single,
    /// The mount and all below it.
    Recursive,
}

impl Options {
    /// Takes the options apart. Names the first one that cannot be honoured.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self, UnsupportedOption> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    /// Whether the mount ends up read-only.
    pub fn is_read_only(&self) -> bool {
        (self.attributes.set | self.recursive_attributes.set) & attribute::RDONLY != 0
    }

    /// Leaves how access times are kept as it is.
    pub fn keep_access_times(&mut self) {
        for change in [&mut self.attributes, &mut self.recursive_attributes] {
            change.set &= !ACCESS_TIMES;
            change.clear &= !ACCESS_TIMES;
        }
    }

    /// The value of the file system's option `key`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.file_system.iter().rev().find(|(name, _)| name == key)?.1.as_deref()
    }

    fn add(&mut self, option: &str) -> Result<(), UnsupportedOption> {
        match option {
            // What the mount is anyway, or what says nothing to a kernel.
            "" | "defaults" | "remount" | "loud" | "silent" | "async" | "nolazytime" | "nomand" => {}
            // Flags of mount(2) that fsconfig(2) knows no option for: the file system decides by itself.
            "acl" | "noacl" | "iversion" | "noiversion" => {}
            "bind" => self.bind = Some(Bind::Single),
            "rbind" => self.bind = Some(Bind::Recursive),
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => return Err(UnsupportedOption(option.to_owned())),
            _ => self.add_flag_or_data(option),
        }
        Ok(())
    }

    fn add_flag_or_data(&mut self, option: &str) {
        if let Some(flag) = propagation_flag(option.strip_prefix('r').unwrap_or(option)) {
            self.propagation.push((flag.bits(), option.starts_with('r')));
        } else if let Some((set, clear)) = mount_attribute(option) {
            amend(&mut self.attributes, set, clear);
        } else if let Some((set, clear)) = option.strip_prefix('r').and_then(mount_attribute) {
            amend(&mut self.recursive_attributes, set, clear);
        } else {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (option, None),
            };
            self.file_system.push((key.to_owned(), value));
        }
    }
}

/// An option that this runtime knows and cannot honour.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mount option {0:?} is not supported")]
pub struct UnsupportedOption(String);

/// The propagation that `rootfsPropagation` and mount options name.
pub fn propagation_flag(name: &str) -> Option<MsFlags> {
    Some(match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    })
}

/// What an option sets and clears.
fn mount_attribute(option: &str) -> Option<(u64, u64)> {
    use attribute::*;
    Some(match option {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "noatime" => (NOATIME, ATIME),
        "strictatime" => (STRICTATIME, ATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, ATIME),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        _ => return None,
    })
}

/// Later options win over earlier ones.
fn amend(change: &mut Change, set: u64, clear: u64) {
    change.set = (change.set & !clear) | set;
    // The field of access times must be cleared as a whole whenever it is set.
    change.clear = (change.clear & !(set & !attribute::ATIME)) | clear;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(options.iter().copied()).unwrap()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = parse(&["nosuid", "noexec", "strictatime", "mode=755", "size=65536k", "newinstance"]);
        assert_eq!(
            options.attributes,
            Change::attributes(
                attribute::NOSUID | attribute::NOEXEC | attribute::STRICTATIME,
                attribute::ATIME
            )
        );
        assert_eq!(options.value("mode"), Some("755"));
        assert_eq!(options.value("size"), Some("65536k"));
        assert!(options.file_system.contains(&("newinstance".into(), None)));
    }

    #[test]
    fn the_last_of_two_contrary_options_wins() {
        assert!(!parse(&["ro", "rw"]).is_read_only());
        assert!(parse(&["rw", "ro"]).is_read_only());
        assert_eq!(parse(&["rw", "ro"]).attributes, Change::attributes(attribute::RDONLY, 0));
        assert_eq!(parse(&["noatime", "relatime"]).attributes, Change::attributes(0, attribute::ATIME));
    }

    #[test]
    fn a_leading_r_means_all_mounts_below() {
        let options = parse(&["rbind", "rprivate", "rro", "nodev"]);
        assert_eq!(options.bind, Some(Bind::Recursive));
        assert_eq!(options.propagation, [(MsFlags::MS_PRIVATE.bits(), true)]);
        assert_eq!(options.recursive_attributes, Change::attributes(attribute::RDONLY, 0));
        assert_eq!(options.attributes, Change::attributes(attribute::NODEV, 0));
        assert!(options.is_read_only());
        // These start with an r by nature.
        assert_eq!(parse(&["ro", "relatime"]).recursive_attributes, Change::default());
    }

    #[test]
    fn access_times_can_be_left_alone() {
        let mut options = parse(&["noatime", "nodiratime", "rrelatime", "nosuid", "ro"]);
        options.keep_access_times();
        assert_eq!(options, parse(&["nosuid", "ro"]));
    }

    #[test]
    fn changes_of_propagation_keep_their_order() {
        let (slave, shared) = (MsFlags::MS_SLAVE.bits(), MsFlags::MS_SHARED.bits());
        assert_eq!(parse(&["slave", "rshared"]).propagation, [(slave, false), (shared, true)]);
    }

    #[test]
    fn flags_of_the_old_mount_call_are_no_options_of_the_file_system() {
        let options = ["silent", "loud", "iversion", "noiversion", "acl", "noacl", "remount"];
        assert_eq!(parse(&options), Options::default());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let refused = Options::parse(["ro", "idmap"]).unwrap_err();
        assert!(refused.to_string().contains("idmap"));
    }

    proptest! {
        #[test]
        fn no_option_is_lost_and_none_panics(options in proptest::collection::vec("[a-z=,0-9]{0,12}", 0..8)) {
            let parsed = Options::parse(options.iter().map(String::as_str));
            prop_assert!(parsed.is_ok() || options.iter().any(|option| option.ends_with("idmap")));
        }

        #[test]
        fn an_attribute_is_never_set_and_cleared_at_once(
            options in proptest::collection::vec(
                proptest::sample::select(vec!["ro", "rw", "suid", "nosuid", "noatime", "strictatime", "relatime"]),
                0..10,
            ),
        ) {
            let change = parse(&options).attributes;
            prop_assert_eq!(change.set & change.clear & !attribute::ATIME, 0);
            // Both at once would be a value that the kernel refuses.
            prop_assert_ne!(change.set & attribute::ATIME, attribute::NOATIME | attribute::STRICTATIME);
        }
    }
}
