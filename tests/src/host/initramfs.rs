//! The test host's initramfs: busybox and the few kernel modules that stand between the kernel and its disk.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::recipe::INITRAMFS_INIT;
use crate::support::archive::Archive;
use crate::support::modules;

/// Modules needed until the root file system is mounted; each brings those it depends on.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4"];

/// Makes the initramfs for the kernel `release` in `tree`, as one newc archive.
pub fn build(tree: &Path, release: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for name in ["dev", "root", "bin", "modules"] {
        archive.directory(name)?;
    }
    let busybox = fs::read(tree.join("usr/bin/busybox")).context("no busybox in the tree")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, INITRAMFS_INIT.as_bytes())?;
    archive.modules(&modules::files(tree, release, MODULES)?)?;
    archive.finish()
}
