//! What the test host's image is made of. The hash of all this names the image, so any change here makes a new one.

use std::path::Path;

use anyhow::{Context, Result};

use crate::support::cache::Key;

/// The Debian release inside; the build machine may run another.
pub const RELEASE: &str = "trixie";

/// In the test host itself: kernel, engines, other runtimes to compare with, and what tests look with.
pub const HOST_PACKAGES: &[&str] = &[
    // The host: kernel, the way in, init.
    "linux-image-amd64",
    "openssh-server",
    "busybox-static",
    "kmod",
    "tini",
    // Engines and runtimes.
    "docker.io",
    "docker-cli",
    "docker-buildx",
    "docker-compose",
    "containerd",
    "runc",
    "crun",
    "runsc",
    "podman",
    "conmon",
    "dbus",
    "catatonit",
    "netavark",
    "aardvark-dns",
    "containernetworking-plugins",
    // Of the older engines.
    "libdevmapper1.02.1",
    // Network.
    "iproute2",
    "iptables",
    "nftables",
    "iputils-ping",
    "ethtool",
    "iperf3",
    "curl",
    // Tools of the tests.
    "jq",
    "lsof",
    "procps",
    "psmisc",
    "python3-minimal",
    "strace",
    "xz-utils",
];

/// Engines of an older Debian, below `/opt/RELEASE`: Docker 20.10 and containerd 1.6 want other things of a runtime.
pub const OLDER_PACKAGES: (&str, &[&str]) = ("bookworm", &["docker.io", "containerd", "runc"]);

/// In the container image `debian`: real programs to run in a microVM.
pub const DEBIAN_IMAGE_PACKAGES: &[&str] =
    &["curl", "gcc", "iperf3", "iproute2", "iputils-ping", "libc6-dev", "postgresql", "procps", "python3"];

/// The container images that engines have from the start; `load-image` in the test host loads others.
pub const LOADED_IMAGES: &[(&str, &[&str])] =
    &[("busybox", &["docker", "podman", "ctr"]), ("debian", &["docker"])];

/// A file of the project's own in the test host.
pub struct HostFile {
    /// Absolute path in the test host.
    pub path: &'static str,
    /// Permission bits.
    pub mode: u32,
    /// Everything in it.
    pub content: &'static str,
}

macro_rules! host_file {
    ($path:literal, $mode:literal, $source:literal) => {
        HostFile { path: $path, mode: $mode, content: include_str!(concat!("../../host/", $source)) }
    };
}

/// All files of the project's own in the test host.
pub const HOST_FILES: &[HostFile] = &[
    host_file!("/etc/inittab", 0o644, "files/inittab"),
    host_file!("/etc/ssh/sshd_config", 0o644, "files/sshd_config"),
    host_file!("/etc/docker/daemon.json", 0o644, "files/daemon.json"),
    host_file!("/etc/containers/containers.conf", 0o644, "files/containers.conf"),
    host_file!("/usr/lib/rvm-host/setup", 0o755, "files/setup"),
    host_file!("/usr/lib/rvm-host/service", 0o755, "files/service"),
    host_file!("/usr/lib/rvm-host/announce", 0o755, "files/announce"),
    host_file!("/usr/lib/rvm-host/stop-when-idle", 0o755, "files/stop-when-idle"),
    host_file!("/usr/lib/rvm-host/close-store", 0o755, "files/close-store"),
    host_file!("/usr/lib/rvm-host/run", 0o755, "files/run"),
    host_file!("/usr/lib/rvm-host/install-artefacts", 0o755, "files/install-artefacts"),
    host_file!("/usr/sbin/load-image", 0o755, "files/load-image"),
    HostFile { path: "/etc/hostname", mode: 0o644, content: "rvm-host\n" },
    HostFile { path: "/etc/hosts", mode: 0o644, content: "127.0.0.1 localhost rvm-host\n::1 localhost\n" },
    // The name server of QEMU's user network.
    HostFile { path: "/etc/resolv.conf", mode: 0o644, content: "nameserver 10.0.2.3\n" },
];

/// The first program of the initramfs.
pub const INITRAMFS_INIT: &str = include_str!("../../host/initramfs-init");

/// A script that drives a part of the build on the build machine.
#[derive(Clone, Copy)]
pub struct BuildScript {
    name: &'static str,
    content: &'static str,
}

/// Installs Debian packages in a tree.
pub const INSTALL_PACKAGES: BuildScript =
    BuildScript { name: "install-packages", content: include_str!("../../host/install-packages") };
/// Unpacks packages of another Debian release in a tree.
pub const UNPACK_OLDER_PACKAGES: BuildScript =
    BuildScript { name: "unpack-older-packages", content: include_str!("../../host/unpack-older-packages") };
/// Makes the tree of the container image `busybox`.
pub const MAKE_BUSYBOX_TREE: BuildScript =
    BuildScript { name: "make-busybox-tree", content: include_str!("../../host/make-busybox-tree") };
/// Packs a tree as an archive that every engine loads.
pub const MAKE_DOCKER_ARCHIVE: BuildScript =
    BuildScript { name: "make-docker-archive", content: include_str!("../../host/make-docker-archive") };

/// Loads container images into the engines of a tree.
pub const LOAD_IMAGES: BuildScript =
    BuildScript { name: "load-images", content: include_str!("../../host/load-images") };

const BUILD_SCRIPTS: &[BuildScript] =
    &[INSTALL_PACKAGES, UNPACK_OLDER_PACKAGES, MAKE_BUSYBOX_TREE, MAKE_DOCKER_ARCHIVE];

impl BuildScript {
    /// Writes the script into `directory` and returns its path.
    pub fn write_to(self, directory: &Path) -> Result<std::path::PathBuf> {
        let path = directory.join(self.name);
        std::fs::write(&path, self.content).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// The key of everything that comes from Debian packages.
pub fn packages_key() -> Key {
    let mut key = Key::new().with("release", RELEASE);
    key = key.with("host", HOST_PACKAGES.join(" ")).with("debian", DEBIAN_IMAGE_PACKAGES.join(" "));
    key = key.with(OLDER_PACKAGES.0, OLDER_PACKAGES.1.join(" "));
    for script in BUILD_SCRIPTS {
        key = key.with(script.name, script.content);
    }
    key
}

/// The key of the engines' disk.
pub fn store_key() -> Key {
    let steps = LOADED_IMAGES.iter().map(|(name, engines)| format!("{name} {}", engines.join(" ")));
    packages_key()
        .with("loaded", steps.collect::<Vec<_>>().join("\n"))
        .with(LOAD_IMAGES.name, LOAD_IMAGES.content)
}

/// The key of the system's disk.
pub fn key() -> Key {
    // The first is raised when the Rust code of the build changes what comes out of it.
    let mut key = packages_key().with("build", "1").with("initramfs", INITRAMFS_INIT);
    for file in HOST_FILES {
        key = key.with(file.path, format!("{:o} {}", file.mode, file.content));
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_of_the_host_is_executable_and_every_path_absolute() {
        for file in HOST_FILES {
            assert!(file.path.starts_with('/'), "{}", file.path);
            assert_eq!(file.mode == 0o755, file.content.starts_with("#!"), "{}", file.path);
        }
    }

    #[test]
    fn a_build_script_is_part_of_both_keys() {
        assert_ne!(packages_key().hex(), key().hex());
        assert_eq!(key().hex(), key().hex());
    }
}
