//! The test host's initramfs: busybox and the few kernel modules that stand between the kernel and its disk.

use std::fs;
use std::io::{Cursor, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType};

use super::recipe::INITRAMFS_INIT;
use crate::support::process;

/// Modules needed until the root file system is mounted; each brings those it depends on.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4"];

/// The release of the one kernel installed in `tree`.
pub fn kernel_release(tree: &Path) -> Result<String> {
    let directory = tree.join("lib/modules");
    let mut entries =
        fs::read_dir(&directory).with_context(|| format!("no kernel in {}", directory.display()))?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.file_name().to_string_lossy().into_owned()),
        _ => bail!("{} should hold the modules of exactly one kernel", directory.display()),
    }
}

/// Makes the initramfs for the kernel `release` in `tree`, as one newc archive.
pub fn build(tree: &Path, release: &str) -> Result<Vec<u8>> {
    let mut entries = vec![directory("dev"), directory("root"), directory("bin"), directory("modules")];
    entries.push(program(
        "bin/busybox",
        fs::read(tree.join("usr/bin/busybox")).context("no busybox in the tree")?,
    ));
    entries.push(program("init", INITRAMFS_INIT.into()));
    for (index, path) in module_files(tree, release)?.iter().enumerate() {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // The number keeps the order of loading when the init goes through them by name.
        entries.push(program(&format!("modules/{index:02}-{name}"), unpack(&tree.join(path))?));
    }
    let archive = cpio::write_cpio(entries.into_iter(), Vec::new()).context("cannot write the initramfs")?;
    Ok(archive)
}

/// The modules' files relative to `tree`, each after those it depends on.
fn module_files(tree: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in MODULES {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("--dirname").arg(tree).args(["--set-version", release, "--show-depends", module]);
        for path in insmod_paths(&process::text(&mut modprobe)?) {
            let path = Path::new(path);
            let path = path.strip_prefix(tree).unwrap_or(path).to_path_buf();
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// Picks the files out of what `modprobe --show-depends` prints; modules built into the kernel need none.
fn insmod_paths(output: &str) -> impl Iterator<Item = &str> {
    output.lines().filter_map(|line| line.strip_prefix("insmod ")?.split_whitespace().next())
}

/// The init's insmod knows no compression.
fn unpack(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output()?;
        if !output.status.success() {
            bail!("cannot unpack the kernel module {}", path.display());
        }
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("cannot read the kernel module {}", path.display()))
}

trait Content: Read + Seek {}
impl<T: Read + Seek> Content for T {}

fn directory(name: &str) -> (Builder, Box<dyn Content>) {
    let builder = Builder::new(name).mode(0o755).set_mode_file_type(ModeFileType::Directory);
    (builder, Box::new(Cursor::new(Vec::new())))
}

fn program(name: &str, content: Vec<u8>) -> (Builder, Box<dyn Content>) {
    let builder = Builder::new(name).mode(0o755).set_mode_file_type(ModeFileType::Regular);
    (builder, Box::new(Cursor::new(content)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_modules_and_options_are_left_out() {
        let output = "builtin virtio_pci\ninsmod /t/lib/crc16.ko.xz \ninsmod /t/lib/ext4.ko.xz option=1\n";
        assert_eq!(insmod_paths(output).collect::<Vec<_>>(), ["/t/lib/crc16.ko.xz", "/t/lib/ext4.ko.xz"]);
    }
}
