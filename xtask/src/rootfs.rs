//! A root file system of one program, busybox, for containers that need no image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::{packages, process};

/// What the build machine needs.
pub const PACKAGES: &[&str] = &["busybox-static"];

const BUSYBOX: &str = "/bin/busybox";
const DIRECTORIES: &[&str] = &["bin", "dev", "etc", "proc", "root", "sys", "tmp"];
const FILES: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
];

/// The directory, made when it is not cached.
pub fn busybox() -> Result<PathBuf> {
    packages::ensure(PACKAGES)?;
    let program = fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?;
    let key = Key::new().with("busybox", program).with("layout", format!("{DIRECTORIES:?} {FILES:?}"));
    // Two levels, so that the tree has a name of its own: `busybox`.
    let entry = cache::build_once(&cache::cache_dir().join("rootfs").join(key.hex()), |entry| {
        make(&entry.join("busybox"))
    })?;
    cache::remove_unused(&cache::cache_dir().join("rootfs"))?;
    Ok(entry.join("busybox"))
}

fn make(root: &Path) -> Result<()> {
    fs::create_dir(root)?;
    for directory in DIRECTORIES {
        fs::create_dir(root.join(directory))?;
    }
    for (name, content) in FILES {
        fs::write(root.join(name), content)?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    for applet in
        process::text(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|name| *name != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}
