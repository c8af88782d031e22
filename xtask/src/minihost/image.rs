//! What the small host is made of: Debian's kernel, the modules a container runtime needs, busybox.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rvm_tests::support::archive::Archive;
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::progress::Progress;
use rvm_tests::support::{modules, packages};

use crate::deb;

/// On the build machine. The small host's kernel itself is only unpacked, never installed.
pub const PACKAGES: &[&str] = &["busybox-static", "kmod", "qemu-system-x86", "xz-utils"];

/// The package that depends on the current kernel.
const KERNEL: &str = "linux-image-amd64";

/// The channel to the build machine, KVM (one of the two fits the processor), and what `rvm` asks of a host.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "kvm_amd",
    "kvm_intel",
    "overlay",
    "fuse",
    "tun",
    "veth",
    "bridge",
    "sch_ingress",
    "act_mirred",
    "cls_u32",
    "cls_matchall",
];

const INIT: &str = include_str!("init");

/// Changes here when the steps below change in a way that the constants above do not show.
const RECIPE: &str = "2";

/// A kernel and the unchanging part of its initramfs.
pub struct Image {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// Init, modules and busybox, as a newc archive to which others may be appended.
    pub initramfs: PathBuf,
}

/// The image, made when it is not cached.
pub fn image() -> Result<Image> {
    packages::ensure(PACKAGES)?;
    let key = Key::new().with("modules", MODULES.join(" ")).with("init", INIT).with("recipe", RECIPE);
    let entry = cache::build_once(&cache::cache_dir().join("minihost").join(key.hex()), build)?;
    cache::remove_unused(&cache::cache_dir().join("minihost"))?;
    Ok(Image { kernel: entry.join("vmlinuz"), initramfs: entry.join("initramfs") })
}

fn build(entry: &Path) -> Result<()> {
    let progress = Progress::spinner("Making the small host");
    let tree = entry.join("tree");
    fs::create_dir(&tree)?;
    deb::unpack(&fetch_kernel(&tree)?, &tree)?;
    modules::link_folders(&tree)?;
    let release = modules::kernel_release(&tree)?;
    progress.note("collecting modules");
    modules::find_dependencies(&tree, &release)?;
    write_initramfs(&tree, &release, &entry.join("initramfs"))?;
    fs::rename(tree.join("boot").join(format!("vmlinuz-{release}")), entry.join("vmlinuz"))?;
    cache::remove(&tree)?;
    progress.finish();
    Ok(())
}

fn fetch_kernel(to: &Path) -> Result<PathBuf> {
    let package = match kernel_package()? {
        Some(package) => package,
        None => {
            packages::update()?;
            kernel_package()?.with_context(|| format!("apt offers no {KERNEL}: check the apt sources"))?
        }
    };
    deb::download(&package, to)
}

fn kernel_package() -> Result<Option<String>> {
    let mut command = Command::new("apt-cache");
    command
        .args(["depends", "--important", KERNEL])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let output = command.output().context("cannot run apt-cache")?;
    Ok(first_dependency(&String::from_utf8_lossy(&output.stdout)))
}

fn first_dependency(listing: &str) -> Option<String> {
    listing.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned)
}

fn write_initramfs(tree: &Path, release: &str, to: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(to)?));
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.directory("bin")?;
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read("/bin/busybox").context("busybox-static is not installed")?,
    )?;
    archive.directory("modules")?;
    archive.modules(&modules::files(tree, release, MODULES)?)?;
    archive.finish()?.into_inner().context("cannot write the initramfs")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_what_the_metapackage_depends_on() {
        let listing = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Depends: other\n";
        assert_eq!(first_dependency(listing).as_deref(), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(first_dependency(""), None);
    }
}
