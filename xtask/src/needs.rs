//! What the chores need of this machine, asked for at once and before anything takes long.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rvm_tests::support::{kvm, packages};

use crate::{build, kernel, minihost, rootfs, test};

/// Where Debian keeps what only root usually runs, kmod and mke2fs among it. A user's search path has none of them, nor
/// has that of a root who came by plain `su`.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Sees to all that the demo needs.
pub fn demo() -> Result<()> {
    let mut list = [build::PACKAGES, kernel::packages(), rootfs::PACKAGES].concat();
    if !kvm::is_usable() || !nix::unistd::geteuid().is_root() {
        list.extend(minihost::PACKAGES);
    }
    packages::ensure(&list)
}

/// Sees to all that the tests need: static checks and unit tests, the suites in the test host, or both.
pub fn tests(checks: bool, suites: bool) -> Result<()> {
    let mut list = Vec::new();
    if suites {
        rvm_tests::host::may_make_image()?;
        list.extend([build::PACKAGES, kernel::packages(), rvm_tests::host::PACKAGES].concat());
    }
    if checks {
        list.extend(test::PACKAGES);
    }
    packages::ensure(&list)
}

/// The search path `present` with the system's folders at its end, as far as it lacks them.
pub fn search_path(present: &OsStr) -> OsString {
    let mut folders: Vec<PathBuf> = std::env::split_paths(present).collect();
    for folder in SYSTEM_FOLDERS.map(Path::new) {
        if !folders.iter().any(|present| present == folder) {
            folders.push(folder.to_path_buf());
        }
    }
    // What was split at colons can be joined by them.
    std::env::join_paths(folders).unwrap_or_else(|_| present.to_os_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINKER: &str = include_str!("../linker");

    /// The words of a variable in the linker's script.
    fn linker_packages(variable: &str) -> Vec<&'static str> {
        let line = LINKER.lines().find_map(|line| line.strip_prefix(&format!("{variable}=\"")));
        line.unwrap().trim_end_matches('"').split(' ').collect()
    }

    #[test]
    fn system_folders_are_added_once_and_last() {
        let path = search_path(OsStr::new("/home/me/bin:/usr/bin:/usr/sbin"));
        assert_eq!(path, "/home/me/bin:/usr/bin:/usr/sbin:/usr/local/sbin:/sbin");
        assert_eq!(search_path(&path), path);
    }

    #[test]
    fn cargo_links_by_the_script_that_installs_a_linker() {
        let configuration = include_str!("../../.cargo/config.toml");
        assert!(configuration.contains("[target.x86_64-unknown-linux-gnu]\nlinker = \"xtask/linker\"\n"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("linker");
        let mode = std::os::unix::fs::PermissionsExt::mode(&script.metadata().unwrap().permissions());
        assert_eq!(mode & 0o111, 0o111);
    }

    #[test]
    fn the_linker_names_all_that_demo_and_checks_need() {
        let mut named = [linker_packages("packages"), linker_packages("others")].concat();
        let mut needed =
            [kernel::PACKAGES, build::PACKAGES, rootfs::PACKAGES, minihost::PACKAGES, test::PACKAGES]
                .concat();
        named.sort_unstable();
        needed.sort_unstable();
        needed.dedup();
        assert_eq!(named, needed);
    }

    /// Runs the linker's script with a search path of its own, as the user who is 1 in `id`.
    fn link(programs: &[(&str, &str)]) -> std::process::Output {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in programs {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("linker");
        let mut command = std::process::Command::new("/bin/sh");
        command.arg(script).arg("-o").env("PATH", folder.path()).output().unwrap()
    }

    #[test]
    fn a_user_without_a_linker_is_told_one_command() {
        let output = link(&[("id", "echo 1")]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert_eq!(words.matches("apt-get update && apt-get install").count(), 1, "{words}");
        assert!(words.contains("gcc") && words.contains("qemu-system-x86"), "{words}");
    }

    #[test]
    fn where_there_is_a_linker_it_is_run_with_the_same_arguments() {
        let output = link(&[("cc", "echo linked \"$@\"")]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "linked -o\n");
    }
}
