//! What the small host is made of: Debian's kernel, the modules a container runtime needs, busybox.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::progress::Progress;
use rvm_tests::support::{packages, process};

use crate::archive::Archive;
use crate::deb;

/// On the build machine. The small host's kernel itself is only unpacked, never installed.
pub const PACKAGES: &[&str] = &["busybox-static", "kmod", "qemu-system-x86", "xz-utils"];

/// The package that depends on the current kernel.
const KERNEL: &str = "linux-image-amd64";

/// The channel to the build machine, KVM on the emulated AMD processor, and what `rvm` asks of a host.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "kvm_amd",
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
const RECIPE: &str = "1";

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
    Ok(Image { kernel: entry.join("vmlinuz"), initramfs: entry.join("initramfs") })
}

fn build(entry: &Path) -> Result<()> {
    let progress = Progress::spinner("Making the small host");
    let tree = entry.join("tree");
    fs::create_dir(&tree)?;
    deb::unpack(&fetch_kernel(&tree)?, &tree)?;
    let release = release(&tree)?;
    progress.note("collecting modules");
    process::run(Command::new("depmod").arg("--basedir").arg(&tree).arg(&release))?;
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

/// The name of the one kernel below `tree`.
fn release(tree: &Path) -> Result<String> {
    let mut entries = fs::read_dir(tree.join("boot")).context("the kernel's package holds no /boot")?;
    let name = entries
        .find_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()));
    name.context("the kernel's package holds no kernel")
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
    for (index, path) in module_files(tree, release)?.iter().enumerate() {
        // The init loads them in the order of their names.
        archive.file(&format!("modules/{index:02}"), 0o644, &read_module(path)?)?;
    }
    archive.finish()?.into_inner().context("cannot write the initramfs")?;
    Ok(())
}

/// The modules' files, each after those it depends on.
fn module_files(tree: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in MODULES {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("--dirname").arg(tree).args(["--set-version", release, "--show-depends", module]);
        for path in insmod_paths(&process::text(&mut modprobe)?) {
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The files in what `modprobe --show-depends` prints; what is built into the kernel has none.
fn insmod_paths(output: &str) -> Vec<PathBuf> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("insmod ")?.split_whitespace().next())
        .map(PathBuf::from)
        .collect()
}

/// Reads a module, which newer releases of Debian compress, and busybox cannot decompress.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read the kernel module {}", path.display()));
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output()?;
    if !output.status.success() {
        bail!("cannot decompress the kernel module {}", path.display());
    }
    Ok(output.stdout)
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

    #[test]
    fn modules_have_files_unless_built_in() {
        let output = "builtin a\ninsmod /t/b.ko \ninsmod /t/c.ko.xz option=1\n";
        assert_eq!(insmod_paths(output), [Path::new("/t/b.ko"), Path::new("/t/c.ko.xz")]);
    }
}
