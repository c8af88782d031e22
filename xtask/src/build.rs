//! The artefacts: rvm as it would be installed, in one directory outside the work tree.
//!
//! `bin/rvm`, `lib/rvm/rvm-agent` and `lib/rvm/vmlinux`. The programs are static, because the agent is alone in its
//! initramfs and because `rvm` must run on hosts older than the machine that built it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::support::cache;
use rvm_tests::support::packages;

use crate::kernel;

/// What the programs link against. libseccomp comes as a static library in its development package.
pub const PACKAGES: &[&str] = &["gcc", "libc6-dev", "libseccomp-dev"];

/// Naming the target keeps `RUSTFLAGS` away from build scripts and procedural macros, which cannot be static.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The programs are not moved when they are executed: docs/decisions/0013. Random bytes come from the system call: the
/// monitor's root is the container's, and has no device to read them from.
const RUSTFLAGS: &str =
    "-C target-feature=+crt-static -C relocation-model=static --cfg getrandom_backend=\"linux_getrandom\"";
const LIBSECCOMP: &[(&str, &str)] =
    &[("LIBSECCOMP_LINK_TYPE", "static"), ("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu")];

/// A program of the workspace, and where it goes.
struct Program {
    package: &'static str,
    binary: &'static str,
    profile: &'static str,
    installed: &'static str,
}

/// Profile of all but the agent.
pub const RELEASE: &str = "release";
/// As small as can be: see `Cargo.toml`.
const AGENT: &str = "agent";

/// What users install.
const PRODUCT: &[Program] = &[
    Program { package: "rvm", binary: "rvm", profile: RELEASE, installed: "bin/rvm" },
    Program { package: "rvm-agent", binary: "rvm-agent", profile: AGENT, installed: "lib/rvm/rvm-agent" },
];

/// The guest's kernel among the installed files.
const KERNEL: &str = "lib/rvm/vmlinux";

/// The same kernel in another format, for the suites.
const BZIMAGE: &str = "lib/rvm-tests/bzImage";

/// The end-to-end suites.
const SUITES: Program =
    Program { package: "rvm-tests", binary: "rvm-e2e", profile: RELEASE, installed: "bin/rvm-e2e" };

/// What the measurements of files run inside of containers.
const WORKLOAD: Program = Program {
    package: "rvm-tests",
    binary: "rvm-workload",
    profile: RELEASE,
    installed: "lib/rvm-tests/workload",
};

/// Builds kernel and programs as far as they are not up to date; returns the directory that holds them.
pub fn artefacts() -> Result<PathBuf> {
    let root = cache::artefacts_dir();
    install(&kernel::vmlinux()?, &root.join(KERNEL), 0o644)?;
    programs(PRODUCT)?;
    Ok(root)
}

/// As [`artefacts`], with the end-to-end suites.
pub fn with_suites() -> Result<PathBuf> {
    let root = artefacts()?;
    install(&kernel::bzimage()?, &root.join(BZIMAGE), 0o644)?;
    programs(&[SUITES])?;
    Ok(root)
}

/// As [`artefacts`], with what the measurements run inside of containers; returns where the test host has that.
pub fn with_workload() -> Result<String> {
    artefacts()?;
    programs(&[WORKLOAD])?;
    Ok(format!("/usr/local/{}", WORKLOAD.installed))
}

/// A program of unit tests among the artefacts.
pub struct TestProgram {
    /// Package and target, for people.
    pub name: String,
    /// Where it is in the test host.
    pub path: String,
}

/// The unit tests that find more in the test host than on most machines (KVM, taps, every control group), and how they are
/// selected. Those of a whole command line stay out: they know their program only by where it was built.
const UNIT_TESTS: &[&str] =
    &["--package", "rvm-vmm", "--package", "rvm", "--package", "rvm-agent", "--lib", "--test", "container"];

/// Builds the unit tests that run in the test host, too, and installs them among the artefacts.
pub fn unit_tests() -> Result<Vec<TestProgram>> {
    packages::ensure(PACKAGES)?;
    let mut command = static_cargo("test", RELEASE);
    command.arg("--no-run").args(UNIT_TESTS).arg("--message-format=json-render-diagnostics");
    let output =
        command.stderr(Stdio::inherit()).output().context("cannot start the build of the unit tests")?;
    ensure!(output.status.success(), "the build of the unit tests failed: {}", output.status);
    let root = cache::artefacts_dir();
    let mut programs = Vec::new();
    for (name, executable) in test_executables(&String::from_utf8_lossy(&output.stdout)) {
        let installed = format!("lib/rvm-tests/{name}");
        install(&executable, &root.join(&installed), 0o755)?;
        programs.push(TestProgram { path: format!("/usr/local/{installed}"), name });
    }
    ensure!(!programs.is_empty(), "the build of the unit tests made no program");
    Ok(programs)
}

/// Names and files of the test programs in cargo's messages.
fn test_executables(messages: &str) -> Vec<(String, PathBuf)> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let executable = PathBuf::from(message["executable"].as_str()?);
            let target = &message["target"];
            Some((format!("{}-{}", target["name"].as_str()?, target["kind"][0].as_str()?), executable))
        })
        .collect()
}

/// Builds everything and installs it below `prefix`, such as `/usr/local`.
pub fn install_below(prefix: &Path) -> Result<()> {
    // Before the minutes that the build takes.
    may_install_below(prefix)?;
    let artefacts = artefacts()?;
    install(&artefacts.join(KERNEL), &prefix.join(KERNEL), 0o644)?;
    for program in PRODUCT {
        install(&artefacts.join(program.installed), &prefix.join(program.installed), 0o755)?;
    }
    Ok(())
}

/// Whether the files can be written. Where they cannot, the error says how.
fn may_install_below(prefix: &Path) -> Result<()> {
    for program in PRODUCT {
        let place = prefix.join(program.installed);
        let directory = place.parent().unwrap_or(prefix);
        let tried = fs::create_dir_all(directory).and_then(|()| tempfile::NamedTempFile::new_in(directory));
        if let Err(error) = tried {
            bail!(
                "cannot write to {}: {error}; as root it works: {}",
                directory.display(),
                packages::again_as_root()
            );
        }
    }
    Ok(())
}

/// The directory of the artefacts, as the last build left it.
pub fn directory() -> Result<PathBuf> {
    let root = cache::artefacts_dir();
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    Ok(root)
}

/// Builds `programs` and installs them among the artefacts.
fn programs(programs: &[Program]) -> Result<()> {
    packages::ensure(PACKAGES)?;
    for profile in [RELEASE, AGENT] {
        let programs: Vec<_> = programs.iter().filter(|program| program.profile == profile).collect();
        if programs.is_empty() {
            continue;
        }
        let mut command = static_cargo("build", profile);
        for program in &programs {
            command.args(["--package", program.package, "--bin", program.binary]);
        }
        checked(&mut command, "the build")?;
        let built = target_directory()?.join(TARGET).join(profile);
        for program in programs {
            install(&built.join(program.binary), &cache::artefacts_dir().join(program.installed), 0o755)?;
        }
    }
    Ok(())
}

/// cargo's `subcommand` for static programs.
pub fn static_cargo(subcommand: &str, profile: &str) -> Command {
    let mut command = cargo();
    command.args([subcommand, "--profile", profile, "--target", TARGET]).env("RUSTFLAGS", RUSTFLAGS);
    command.envs(LIBSECCOMP.iter().copied());
    command
}

/// The cargo that runs this program, at the root of the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(workspace());
    command
}

/// Runs `command` with its output on the terminal.
pub fn checked(command: &mut Command, what: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {what}"))?;
    ensure!(status.success(), "{what} failed: {status}");
    Ok(())
}

fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Where cargo puts what it builds, whatever the user's configuration says.
fn target_directory() -> Result<PathBuf> {
    let output = cargo().args(["metadata", "--format-version=1", "--no-deps", "--offline"]).output()?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let directory =
        metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(directory))
}

/// Puts a copy of `from` at `to` in one step, or leaves `to` alone (and its time stamp) when it is the same already.
fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let directory = to.parent().unwrap_or(to);
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    std::io::Write::write_all(&mut file, &content)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    file.persist(to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_install_is_told_who_may() {
        let folder = tempfile::tempdir().unwrap();
        may_install_below(folder.path()).unwrap();
        // No directory can be made below a file, not even by root.
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = may_install_below(&file).unwrap_err().to_string();
        assert!(error.contains("cannot write to") && error.contains("cargo xtask"), "{error}");
    }

    #[test]
    fn installing_the_same_again_touches_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("lib/to"));
        fs::write(&from, "one").unwrap();
        install(&from, &to, 0o755).unwrap();
        let first = fs::metadata(&to).unwrap();
        assert_eq!(first.permissions().mode() & 0o777, 0o755);
        install(&from, &to, 0o755).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().modified().unwrap(), first.modified().unwrap());
        fs::write(&from, "two").unwrap();
        install(&from, &to, 0o755).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"two");
    }

    #[test]
    fn test_programs_are_found_among_what_cargo_says() {
        let messages = r#"
            {"reason":"compiler-artifact","target":{"name":"a","kind":["lib"]},"profile":{"test":false},"executable":null}
            {"reason":"compiler-artifact","target":{"name":"a","kind":["lib"]},"profile":{"test":true},"executable":"/t/a-1"}
            {"reason":"compiler-artifact","target":{"name":"a","kind":["bin"]},"profile":{"test":false},"executable":"/t/a"}
            {"reason":"build-finished","success":true}"#;
        assert_eq!(test_executables(messages), [("a-lib".to_owned(), PathBuf::from("/t/a-1"))]);
    }

    #[test]
    fn the_workspace_is_where_the_lock_file_is() {
        assert!(workspace().join("Cargo.lock").is_file());
    }
}
