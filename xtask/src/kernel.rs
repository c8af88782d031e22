//! The guest kernel: pinned source, the project's configuration, one uncompressed ELF image. The same kernel as a bzImage
//! is for the tests: users may bring one of their own.
//!
//! The result is cached by a hash of everything that went in (pins, configuration, recipe), so it is built once a machine and
//! once a change.

mod config;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::progress::Progress;
use rvm_tests::support::{packages, process};

const CONFIG: &str = include_str!("../../kernels/guest-x86_64.config");
const PINS: &str = include_str!("../../kernels/source.pins");
/// Changes of the source, in the order in which they are made.
const PATCHES: &[&str] = &[
    include_str!("../../kernels/patches/fuse-submounts.patch"),
    include_str!("../../kernels/patches/fuse-killpriv.patch"),
    include_str!("../../kernels/patches/fuse-directory-access.patch"),
    include_str!("../../kernels/patches/fuse-readdir.patch"),
    include_str!("../../kernels/patches/fuse-notices.patch"),
    include_str!("../../kernels/patches/fuse-tag.patch"),
    include_str!("../../kernels/patches/fuse-at-once.patch"),
    include_str!("../../kernels/patches/fuse-create-first.patch"),
    include_str!("../../kernels/patches/fuse-lazy.patch"),
    include_str!("../../kernels/patches/fuse-past-cache.patch"),
    include_str!("../../kernels/patches/fuse-read-unopened.patch"),
    include_str!("../../kernels/patches/fuse-no-ioctl.patch"),
    include_str!("../../kernels/patches/boot-io-apic.patch"),
    include_str!("../../kernels/patches/boot-text.patch"),
    include_str!("../../kernels/patches/boot-host-text.patch"),
    include_str!("../../kernels/patches/boot-init-memory.patch"),
    include_str!("../../kernels/patches/boot-cpuid.patch"),
    include_str!("../../kernels/patches/initramfs-in-place.patch"),
    include_str!("../../kernels/patches/slab-sysfs.patch"),
    include_str!("../../kernels/patches/page-reporting.patch"),
];

/// What the build needs from Debian.
pub const PACKAGES: &[&str] = &[
    "bc",
    "binutils",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "patch",
    "perl",
    "xz-utils",
];

/// Given to every `make`. Date, user and host are compiled into the kernel: fixed, so that equal input gives equal output.
const MAKE_VARIABLES: &[&str] = &[
    "ARCH=x86_64",
    "KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 2026",
    "KBUILD_BUILD_USER=rvm",
    "KBUILD_BUILD_HOST=rvm",
];

/// `vmlinux` keeps its notes (the PVH entry point is one), and loses its symbols: System.map lies beside it.
const STRIP: &[&str] = &["--strip-all"];

/// The files of the two images in the cache's entry.
const VMLINUX: &str = "vmlinux";
const BZIMAGE: &str = "bzImage";

/// Changes here when the steps below change in a way that the constants above do not show.
const RECIPE: &str = "2";

/// The lines that `make` prints for one build: the length of the progress bar, no more.
const MAKE_LINES: u64 = 1894;

/// The guest kernel image, built when it is not cached.
pub fn vmlinux() -> Result<PathBuf> {
    Ok(built()?.join(VMLINUX))
}

/// The same kernel, compressed and with the header of a boot loader's protocol.
pub fn bzimage() -> Result<PathBuf> {
    Ok(built()?.join(BZIMAGE))
}

fn built() -> Result<PathBuf> {
    let built = cache::build_once(&entry(), build)?;
    cache::remove_unused(&cache::cache_dir().join("kernel"))?;
    Ok(built)
}

/// The packages that [`vmlinux`] will need: none when the kernel is cached.
pub fn packages() -> &'static [&'static str] {
    if entry().is_dir() { &[] } else { PACKAGES }
}

fn entry() -> PathBuf {
    cache::cache_dir().join("kernel").join(key().hex())
}

fn key() -> Key {
    Key::new()
        .with("pins", PINS)
        .with("patches", PATCHES.concat())
        .with("config", CONFIG)
        .with("make", MAKE_VARIABLES.join("\n"))
        .with("strip", STRIP.join("\n"))
        .with("recipe", RECIPE)
}

/// Builds in `entry`, and leaves there both images, the symbols, its configuration and the log.
fn build(entry: &Path) -> Result<()> {
    packages::ensure(PACKAGES)?;
    let work = entry.join("work");
    fs::create_dir(&work)?;
    let tree = source::unpack(&source::parse_pins(PINS)?, &work)?;
    PATCHES.iter().try_for_each(|patch| source::apply(patch, &tree))?;
    configure(&tree)?;
    compile(&tree, &entry.join("build.log"))?;
    strip(&tree.join("vmlinux"), &entry.join(VMLINUX))?;
    fs::copy(tree.join("arch/x86/boot/bzImage"), entry.join(BZIMAGE))?;
    fs::copy(tree.join("System.map"), entry.join("System.map"))?;
    fs::copy(tree.join(".config"), entry.join("config"))?;
    cache::remove(&work)
}

fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    // Variables of the caller's own builds must not leak in.
    command.env_remove("MAKEFLAGS").env_remove("CFLAGS").env("LC_ALL", "C");
    command.arg("-C").arg(tree).args(MAKE_VARIABLES);
    command
}

fn configure(tree: &Path) -> Result<()> {
    let fragment = tree.join("rvm.config");
    fs::write(&fragment, CONFIG)?;
    process::run(make(tree).arg(format!("KCONFIG_ALLCONFIG={}", fragment.display())).arg("allnoconfig"))?;
    let resolved =
        fs::read_to_string(tree.join(".config")).context("the kernel's configuration was not written")?;
    let dropped = config::dropped(CONFIG, &resolved);
    ensure!(
        dropped.is_empty(),
        "this kernel does not take these lines of the configuration (a dependency is off, or the name is unknown):\n{}",
        dropped.join("\n")
    );
    Ok(())
}

fn compile(tree: &Path, log: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut progress = Progress::bar("Building the guest kernel", MAKE_LINES);
    process::run_logged(make(tree).arg(format!("-j{jobs}")).arg("bzImage"), log, |line| {
        progress.step();
        progress.note(line);
    })?;
    progress.finish();
    Ok(())
}

fn strip(from: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("strip").args(STRIP).arg("-o").arg(to).arg(from))
}
