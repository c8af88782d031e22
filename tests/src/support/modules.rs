//! Kernel modules out of a tree with Debian's kernel, for an init that can load files and nothing else.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::process;

/// The release of the one kernel whose modules lie in `tree`.
pub fn kernel_release(tree: &Path) -> Result<String> {
    let directory = tree.join("lib/modules");
    let mut entries =
        fs::read_dir(&directory).with_context(|| format!("no kernel in {}", directory.display()))?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.file_name().to_string_lossy().into_owned()),
        _ => bail!("{} should hold the modules of exactly one kernel", directory.display()),
    }
}

/// Makes the modules of a package that is unpacked alone reachable wherever kmod looks for them: since Debian 13 a package
/// has them in /usr/lib instead of /lib, and only the base system has the link between the two.
pub fn link_folders(tree: &Path) -> Result<()> {
    let folders = [("lib/modules", "../usr/lib/modules"), ("usr/lib/modules", "../../lib/modules")];
    let present = folders.map(|(folder, _)| tree.join(folder).is_dir());
    ensure!(present.contains(&true), "the kernel's package holds no modules");
    for ((folder, other), _) in folders.into_iter().zip(present).filter(|(_, present)| !present) {
        let link = tree.join(folder);
        fs::create_dir_all(link.parent().unwrap_or(tree))?;
        symlink(other, &link).context("cannot link the kernel's modules")?;
    }
    Ok(())
}

/// Notes which module depends on which, as the installation of a kernel would.
pub fn find_dependencies(tree: &Path, release: &str) -> Result<()> {
    process::run(Command::new("depmod").arg("--basedir").arg(tree).arg(release))
}

/// The files of `modules` and of those they depend on, each after the ones that it needs.
pub fn files(tree: &Path, release: &str, modules: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in modules {
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
pub fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read the kernel module {}", path.display()));
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output()?;
    ensure!(output.status.success(), "cannot decompress the kernel module {}", path.display());
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_files_unless_built_in() {
        let output = "builtin a\ninsmod /t/b.ko \ninsmod /t/c.ko.xz option=1\n";
        assert_eq!(insmod_paths(output), [Path::new("/t/b.ko"), Path::new("/t/c.ko.xz")]);
    }

    /// A tree with the module `one`, below `folder`.
    fn tree(folder: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let modules = tree.path().join(folder).join("modules/6.0.0");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        // A module is an object file, and depmod asks no more of one.
        let mut compiler = Command::new("cc");
        compiler.args(["-c", "-x", "c", "/dev/null", "-o"]).arg(modules.join("kernel/one.ko"));
        process::run(&mut compiler).unwrap();
        tree
    }

    #[test]
    fn modules_are_found_in_packages_of_either_release() {
        for folder in ["lib", "usr/lib"] {
            let tree = tree(folder);
            link_folders(tree.path()).unwrap();
            assert_eq!(kernel_release(tree.path()).unwrap(), "6.0.0", "{folder}");
            find_dependencies(tree.path(), "6.0.0").unwrap();
            let files = files(tree.path(), "6.0.0", &["one"]).unwrap();
            assert_eq!(files.len(), 1, "{folder}");
            assert!(read(&files[0]).unwrap().starts_with(b"\x7fELF"), "{folder}");
        }
    }

    #[test]
    fn a_package_without_modules_is_refused() {
        assert!(link_folders(tempfile::tempdir().unwrap().path()).is_err());
    }
}
