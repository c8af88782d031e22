//! Making the test host's image: Debian trees, the container images, one disk with all of it, kernel and initramfs.
//!
//! Three cache entries, so that a changed script costs seconds. `packages-*` holds what comes from Debian packages;
//! `system-*` the disk made from that and the project's own files, with kernel and initramfs; `store-*` a disk with the
//! engines' state, the container images loaded, which takes a boot to make. None of this needs KVM.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::recipe::{self, BuildScript};
use super::{initramfs, ssh, store};
use crate::support::cache::{self, Key};
use crate::support::progress::Progress;
use crate::support::{mirror, modules, packages, process};

/// What the build machine needs to make an image and run it.
pub const TOOLS: &[&str] = &[
    "debian-archive-keyring",
    "debootstrap",
    "e2fsprogs",
    "kmod",
    "openssh-client",
    "qemu-system-x86",
    "xz-utils",
];

/// The test host's tree in the cache entry of the packages.
const HOST_TREE: &str = "host";

/// Size of each disk. They are sparse: only what is written takes room.
const DISK_SIZE: &str = "32G";

/// What a test host boots from.
#[derive(Clone, Debug)]
pub struct Image {
    /// Directory with `root.img`, `vmlinuz`, `initramfs`, and the keys to get in.
    pub system: PathBuf,
    /// Directory of the container images' archives.
    pub archives: PathBuf,
    /// The engines' disk.
    pub store: PathBuf,
}

/// The image of the current recipe, made as far as it is not in the cache. `load` boots an image whose engines' disk is
/// empty and has the container images loaded; see [`store::build`].
pub fn ensure(load: impl FnOnce(&Image) -> Result<()>) -> Result<Image> {
    packages::ensure(TOOLS)?;
    let cache = host_cache();
    let entry = |kind: &str, key: Key| cache.join(format!("{kind}-{}", key.hex()));
    let packages = cache::build_once(&entry("packages", recipe::packages_key()), build_trees)?;
    let archives = packages.join("images");
    let system =
        cache::build_once(&entry("system", recipe::key()), |directory| build_system(&packages, directory))?;
    let store = cache::build_once(&entry("store", recipe::store_key()), |directory| {
        store::build(&packages.join(HOST_TREE), &archives, directory, |disk| {
            load(&Image { system: system.clone(), archives: archives.clone(), store: disk.into() })
        })
    })?;
    cache::remove_unused(&cache)?;
    Ok(Image { store: store::file(&store), system, archives })
}

/// Whether [`ensure`] will have to make device files and change roots, which only root can.
pub fn needs_root() -> bool {
    let entry = |kind: &str, key: Key| host_cache().join(format!("{kind}-{}", key.hex())).is_dir();
    !entry("packages", recipe::packages_key())
        || !entry("system", recipe::key())
        || !entry("store", recipe::store_key())
}

fn host_cache() -> PathBuf {
    cache::cache_dir().join("host")
}

/// Fills `directory` with the tree `host` and with the container images' archives under `images`.
fn build_trees(directory: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "making the image of the test host needs root: debootstrap makes device files. Run this again with sudo"
        );
    }
    let build = Build { directory, log: directory.join("build.log") };
    let images = directory.join("images");
    fs::create_dir(&images)?;
    let (base, host, busybox) =
        (directory.join("base"), directory.join(HOST_TREE), directory.join("busybox"));
    build.debootstrap(&base)?;
    copy_tree(&base, &host)?;
    build.install("Packages of the test host", &host, recipe::HOST_PACKAGES)?;
    build.unpack_older(&host)?;
    // The base tree becomes the container image itself.
    build.install("Packages of the container image debian", &base, recipe::DEBIAN_IMAGE_PACKAGES)?;

    let progress = Progress::spinner("Container images");
    build.script(recipe::MAKE_BUSYBOX_TREE, &[host.join("usr/bin/busybox").as_ref(), &busybox])?;
    for (name, tree) in [("busybox", &busybox), ("debian", &base)] {
        build.script(
            recipe::MAKE_DOCKER_ARCHIVE,
            &[Path::new(name), tree, images.join(format!("{name}.tar")).as_ref()],
        )?;
        cache::remove(tree)?;
    }
    progress.finish();
    Ok(())
}

/// Fills `directory` with everything that a boot without engines needs.
fn build_system(packages: &Path, directory: &Path) -> Result<()> {
    let progress = Progress::spinner("Disk of the test host");
    let tree = directory.join("tree");
    copy_tree(&packages.join(HOST_TREE), &tree)?;
    for file in recipe::HOST_FILES {
        write_file(&tree.join(file.path.trim_start_matches('/')), file.mode, file.content.as_bytes())?;
    }
    ssh::make_keys(directory, &tree)?;

    let release = modules::kernel_release(&tree)?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), directory.join("vmlinuz"))?;
    fs::write(directory.join("initramfs"), initramfs::build(&tree, &release)?)?;
    make_disk(&directory.join("root.img"), "rvm-host", Some(&tree))?;
    cache::remove(&tree)?;
    progress.finish();
    Ok(())
}

/// Makes a disk with an ext4 file system, a copy of `tree` or empty.
pub fn make_disk(file: &Path, label: &str, tree: Option<&Path>) -> Result<()> {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-L", label]);
    // A disk that is thrown away needs no journal, and a sparse file is zero already.
    command.args(["-O", "^has_journal", "-E", "lazy_itable_init=1,assume_storage_prezeroed=1"]);
    if let Some(tree) = tree {
        command.arg("-d").arg(tree);
    }
    process::run(command.arg(file).arg(DISK_SIZE))
}

/// One build of trees, with its log.
struct Build<'a> {
    directory: &'a Path,
    log: PathBuf,
}

impl Build<'_> {
    fn debootstrap(&self, tree: &Path) -> Result<()> {
        let mirror = mirror::debian_mirror()?;
        let progress = Progress::spinner(&format!("Debian {} from {mirror}", recipe::RELEASE));
        let mut command = Command::new("debootstrap");
        if let Some(proxy) = mirror::apt_proxy()? {
            command.env("http_proxy", proxy);
        }
        command
            .args(["--variant=minbase", "--include=ca-certificates"])
            .arg("--keyring=/usr/share/keyrings/debian-archive-keyring.gpg")
            .arg(recipe::RELEASE)
            .arg(tree)
            .arg(mirror);
        process::run_logged(&mut command, &self.log, |line| progress.note(line))?;
        progress.finish();
        Ok(())
    }

    fn install(&self, title: &str, tree: &Path, packages: &[&str]) -> Result<()> {
        let mut progress = Progress::bar(title, 100);
        let mut steps = packages::Steps::default();
        let mut command = self.in_tree(recipe::INSTALL_PACKAGES, tree)?;
        command.args(packages);
        process::run_logged(&mut command, &self.log, |line| {
            progress.note(line);
            progress.set(steps.percent_after(line));
        })?;
        progress.finish();
        Ok(())
    }

    fn unpack_older(&self, tree: &Path) -> Result<()> {
        let (release, packages) = recipe::OLDER_PACKAGES;
        let progress = Progress::spinner(&format!("Engines of Debian {release}"));
        let mut command = self.in_tree(recipe::UNPACK_OLDER_PACKAGES, tree)?;
        command.args([&mirror::debian_mirror()?, release]).args(packages);
        process::run_logged(&mut command, &self.log, |line| progress.note(line))?;
        progress.finish();
        Ok(())
    }

    /// A script that has the tree's own apt work, with mounts that end with it.
    fn in_tree(&self, script: BuildScript, tree: &Path) -> Result<Command> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh"]);
        // That apt knows nothing of this machine's configuration.
        if let Some(proxy) = mirror::apt_proxy()? {
            command.env("http_proxy", proxy);
        }
        command.arg(script.write_to(self.directory)?).arg(tree);
        Ok(command)
    }

    fn script(&self, script: BuildScript, arguments: &[&Path]) -> Result<()> {
        process::run(Command::new("sh").arg(script.write_to(self.directory)?).args(arguments))
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    process::run(
        Command::new("cp").args(["--archive", "--reflink=auto", "--no-target-directory"]).arg(from).arg(to),
    )
}

fn write_file(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    let write = || {
        fs::create_dir_all(path.parent().unwrap_or(path))?;
        // A package's file of that name may be a link to elsewhere.
        let _ = fs::remove_file(path);
        fs::write(path, content)?;
        File::open(path)?.set_permissions(PermissionsExt::from_mode(mode))
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A name for the running hosts of this cache, so that those of another cache are left alone.
pub fn cache_name() -> String {
    Key::new().with("cache", cache::cache_dir().as_os_str().as_encoded_bytes()).hex()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_a_link_instead_of_following_it() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, path) = (dir.path().join("outside"), dir.path().join("etc/file"));
        fs::write(&outside, "kept").unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink(&outside, &path).unwrap();
        write_file(&path, 0o755, b"new").unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"kept");
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
    }
}
