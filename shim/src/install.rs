//! Where the guest kernel and the guest agent are found.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::cause::Cause;

/// File name of the guest kernel.
pub const KERNEL: &str = "vmlinux";
/// File name of the guest agent.
pub const AGENT: &str = "rvm-agent";

/// Names a folder that is looked at first.
const OVERRIDE: &str = "RVM_LIB";

/// Why a part of the installation cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Nothing of that name in any folder.
    #[error("the guest's {name} was not found; looked in {}; install it there or set {OVERRIDE}", list(.places))]
    Missing {
        /// What was looked for.
        name: &'static str,
        /// The folders.
        places: Vec<PathBuf>,
    },
    /// It is there but cannot be opened.
    #[error("cannot open {}: {source}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system reported.
        source: Cause,
    },
}

/// The opened files that a virtual machine boots from.
#[derive(Debug)]
pub struct Installation {
    /// The guest kernel, as ELF or bzImage.
    pub kernel: File,
    /// The agent's program.
    pub agent: File,
}

impl Installation {
    /// Opens kernel and agent; `kernel` overrides the installed one.
    pub fn open(kernel: Option<&Path>) -> Result<Installation, InstallError> {
        let kernel = match kernel {
            Some(path) => path.to_owned(),
            None => find(KERNEL)?,
        };
        Ok(Installation { kernel: open(kernel)?, agent: open(find(AGENT)?)? })
    }
}

/// The path of an installed file.
pub fn find(name: &'static str) -> Result<PathBuf, InstallError> {
    let places = places();
    places
        .iter()
        .map(|place| place.join(name))
        .find(|path| path.is_file())
        .ok_or(InstallError::Missing { name, places })
}

/// The folders that are searched, in their order.
pub fn places() -> Vec<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("lib/rvm")));
    std::env::var_os(OVERRIDE)
        .map(PathBuf::from)
        .into_iter()
        .chain(beside)
        .chain(["/usr/local/lib/rvm", "/usr/lib/rvm"].map(PathBuf::from))
        .collect()
}

fn open(path: PathBuf) -> Result<File, InstallError> {
    File::open(&path).map_err(|source| InstallError::Open { path, source: source.into() })
}

fn list(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_absent_is_named() {
        let error = Installation::open(Some(Path::new("/absent/kernel"))).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /absent/kernel: nothing is there (ENOENT)");
    }

    #[test]
    fn a_missing_part_says_where_it_was_looked_for() {
        let error = find("no-part-has-this-name").unwrap_err().to_string();
        assert!(error.contains("/usr/lib/rvm"), "{error}");
    }
}
