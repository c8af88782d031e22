//! Kernel parameters of the container.
//!
//! Those of the network belong to the guest's only network namespace and are written by the agent. The rest
//! is written by the child, whose namespaces some of them belong to. In a virtual machine even parameters
//! that are the whole kernel's may be set: the kernel is the container's own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result, other};

const NETWORK: &str = "/proc/sys/net";

/// Writes the parameters of the network.
pub fn write_network(values: &HashMap<String, String>) -> Result<()> {
    write(values, |path| path.starts_with(NETWORK))
}

/// Writes all others.
pub fn write_others(values: &HashMap<String, String>) -> Result<()> {
    write(values, |path| !path.starts_with(NETWORK))
}

fn write(values: &HashMap<String, String>, wanted: impl Fn(&Path) -> bool) -> Result<()> {
    for (name, value) in values {
        // Told apart by their files, for a name can be written in two ways.
        let path = path(name).ok_or_else(|| other(format!("sysctl {name:?} is no valid name")))?;
        if wanted(&path) {
            std::fs::write(&path, value).context(|| format!("writing sysctl {name} = {value:?}"))?;
        }
    }
    Ok(())
}

/// The file of a parameter. As with sysctl(8), a dot separates, and a slash stands for a dot within a name,
/// unless the first separator is a slash: then it is the other way round.
fn path(name: &str) -> Option<PathBuf> {
    let first = name.find(['.', '/'])?;
    let parts: Vec<String> = if name.as_bytes()[first] == b'/' {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|part| part.replace('/', ".")).collect()
    };
    let valid = parts.iter().all(|part| !part.is_empty() && part != "." && part != "..");
    valid.then(|| Path::new("/proc/sys").join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_ways_of_writing_a_name_work() {
        let expected = Some(PathBuf::from("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net.ipv4.ip_forward"), expected);
        assert_eq!(path("net/ipv4/ip_forward"), expected);
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding"),
            Some(PathBuf::from("/proc/sys/net/ipv4/conf/eth0.1/forwarding"))
        );
    }

    #[test]
    fn a_parameter_of_the_network_is_one_however_it_is_written() {
        for name in ["net.no_such.x", "net/no_such/x"] {
            let values = [(name.to_owned(), "1".to_owned())].into();
            assert!(write_network(&values).unwrap_err().message.contains(name), "it tried to write it");
            assert!(write_others(&values).is_ok(), "{name}");
        }
    }

    #[test]
    fn no_name_leaves_the_directory() {
        for name in ["kernel/../../x", "kernel..x", "x", "", ".a", "a.", "/etc/passwd", "kernel.//.x"] {
            assert_eq!(path(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn every_path_stays_below(name in "[a-z./]{0,20}") {
            if let Some(path) = path(&name) {
                prop_assert!(path.starts_with("/proc/sys"));
                prop_assert!(path.components().all(|part| part != std::path::Component::ParentDir));
            }
        }
    }
}
