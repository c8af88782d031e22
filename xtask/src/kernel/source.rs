//! The kernel's source: Debian's package, fetched by the machine's own apt and checked against the project's pin.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::support::cache::{self, Key};
use rvm_tests::support::progress::Progress;
use rvm_tests::support::{mirror, packages, process};

use crate::deb;

const PACKAGE: &str = "linux-source-6.12";
/// Its name in its cache entry.
const FILE: &str = "source.deb";
const TARBALL: &str = "usr/src/linux-source-6.12.tar.xz";

/// What of the source no x86-64 machine without buses ever compiles: two files of three. Kconfig and make files stay, as
/// others refer to them.
const UNNEEDED: &[&str] = &[
    "*/Documentation/*/*",
    "*/arch/*/boot/dts/*",
    "*/arch/[!x]*/*.[chS]",
    "*/arch/xtensa/*.[chS]",
    "*/drivers/accel/*.[chS]",
    "*/drivers/clk/*.[chS]",
    "*/drivers/comedi/*.[chS]",
    "*/drivers/crypto/*.[chS]",
    "*/drivers/gpu/*.[chS]",
    "*/drivers/hid/*.[chS]",
    "*/drivers/hwmon/*.[chS]",
    "*/drivers/iio/*.[chS]",
    "*/drivers/infiniband/*.[chS]",
    "*/drivers/media/*.[chS]",
    "*/drivers/net/ethernet/*.[chS]",
    "*/drivers/net/wireless/*.[chS]",
    "*/drivers/pinctrl/*.[chS]",
    "*/drivers/platform/*.[chS]",
    "*/drivers/scsi/*.[chS]",
    "*/drivers/staging/*.[chS]",
    "*/drivers/usb/*.[chS]",
    "*/drivers/video/*.[chS]",
    "*/samples/*.[chS]",
    "*/sound/*.[chS]",
    "*/tools/perf/*",
    "*/tools/testing/*",
];

/// One version of the package that is known to be good.
#[derive(Clone, Debug, PartialEq)]
pub struct Pin {
    version: String,
    sha256: String,
}

/// Reads the pins: a line each, version and hash, `#` for comments.
pub fn parse_pins(text: &str) -> Result<Vec<Pin>> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [version, sha256] if sha256.len() == 64 => {
                Ok(Pin { version: version.into(), sha256: sha256.into() })
            }
            _ => bail!("source.pins: `{line}` is not a version and a SHA-256 hash"),
        })
        .collect()
}

/// Unpacks the source of the first available of `pins` in `work`; returns the root of the source tree.
pub fn unpack(pins: &[Pin], work: &Path) -> Result<PathBuf> {
    let package = package(pins)?;
    let progress = Progress::spinner("Unpacking the guest kernel's source");
    deb::unpack(&package, work)?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(work.join(TARBALL)).arg("-C").arg(work);
    process::run(tar.args(UNNEEDED.iter().map(|pattern| format!("--exclude={pattern}"))))?;
    progress.finish();
    let tree = work.join("linux-source-6.12");
    ensure!(tree.join("Kconfig").is_file(), "{PACKAGE} holds no kernel source where it is expected");
    Ok(tree)
}

/// Changes the source as a patch says. One that fits only nearly is refused: the pinned source has changed.
pub fn apply(patch: &str, tree: &Path) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new()?;
    std::io::Write::write_all(&mut file, patch.as_bytes())?;
    let mut command = Command::new("patch");
    command.args(["--strip=1", "--fuzz=0", "--batch", "--silent", "-d"]).arg(tree).arg("-i").arg(file.path());
    process::run(&mut command).context("a patch of the guest kernel does not fit its source")
}

/// The package's file, from the cache or else fetched. It has a cache entry of its own, so that neither a change of the
/// configuration nor an interrupted build downloads it again.
fn package(pins: &[Pin]) -> Result<PathBuf> {
    let cache = cache::cache_dir().join("kernel-source");
    let entry = |pin: &Pin| cache.join(Key::new().with("sha256", &pin.sha256).hex());
    let directory = match pins.iter().map(entry).find(|entry| entry.is_dir()) {
        // It returns at once, and notes that the entry is in use.
        Some(entry) => cache::build_once(&entry, |_| bail!("the kernel's source has gone from the cache"))?,
        None => match available(pins)? {
            Availability::Offered(pin) => {
                cache::build_once(&entry(pin), |directory| download(pin, directory))?
            }
            Availability::Replaced(offered) => {
                let fetched = pins.iter().find_map(|pin| {
                    cache::build_once(&entry(pin), |directory| from_pool(pin, directory)).ok()
                });
                fetched.with_context(|| not_to_be_had(pins, &offered))?
            }
        },
    };
    cache::remove_unused(&cache)?;
    Ok(directory.join(FILE))
}

/// Puts the package's file into `directory`, in a version that apt offers.
fn download(pin: &Pin, directory: &Path) -> Result<()> {
    let progress = Progress::spinner("Fetching the guest kernel's source (150 MB)");
    let package = deb::download(&format!("{PACKAGE}={}", pin.version), directory)?;
    let found = deb::sha256(&package)?;
    ensure!(
        found == pin.sha256,
        "{PACKAGE} {} is not the pinned one: its SHA-256 is {found}, kernels/source.pins says {}",
        pin.version,
        pin.sha256
    );
    fs::rename(&package, directory.join(FILE))?;
    progress.finish();
    Ok(())
}

/// The same for a version that apt's lists have no more, but that the archive's servers may still have.
fn from_pool(pin: &Pin, directory: &Path) -> Result<()> {
    let progress = Progress::spinner(&format!("Looking for the guest kernel's source {}", pin.version));
    for address in pool_addresses(&mirror::debian_archives()?, pin) {
        progress.note(&address);
        if deb::download_file(&address, &pin.sha256, &directory.join(FILE)).is_ok() {
            progress.finish();
            return Ok(());
        }
    }
    bail!("no server of apt's sources has {PACKAGE} {}", pin.version)
}

/// Where Debian's archives keep the file as long as any of their releases has it.
fn pool_addresses(archives: &[String], pin: &Pin) -> Vec<String> {
    // An epoch is no part of a file's name, and apt's servers take a tilde only as it is escaped in addresses.
    let version = pin.version.rsplit(':').next().unwrap_or_default().replace('~', "%7e");
    let mut addresses = Vec::new();
    for archive in archives {
        for pool in ["pool/main", "pool/updates/main"] {
            for source in ["linux", "linux-6.12"] {
                let archive = archive.trim_end_matches('/');
                addresses.push(format!("{archive}/{pool}/l/{source}/{PACKAGE}_{version}_all.deb"));
            }
        }
    }
    addresses
}

/// Whether apt has a pinned version.
enum Availability<'a> {
    /// This one.
    Offered(&'a Pin),
    /// None, but these.
    Replaced(Vec<String>),
}

/// Looks for the first pin that apt knows, after a refresh of its lists when it knows none.
fn available(pins: &[Pin]) -> Result<Availability<'_>> {
    if let Some(pin) = first_offered(pins, &offered()?) {
        return Ok(Availability::Offered(pin));
    }
    packages::update()?;
    let offered = offered()?;
    Ok(first_offered(pins, &offered).map_or(Availability::Replaced(offered), Availability::Offered))
}

/// What to do when no pinned version can be had.
fn not_to_be_had(pins: &[Pin], offered: &[String]) -> String {
    let wanted: Vec<_> = pins.iter().map(|pin| pin.version.as_str()).collect();
    let wanted = wanted.join(", ");
    match offered.first() {
        None => format!(
            "apt offers no {PACKAGE} at all (wanted: one of {wanted}). It is in Debian 13 and in the security updates of \
             Debian 12: add those to apt's sources, for Debian 12 this line:\n\n    \
             deb http://deb.debian.org/debian-security bookworm-security main\n"
        ),
        Some(newest) => format!(
            "Debian has replaced the pinned versions of {PACKAGE} ({wanted}); apt offers {}.\n\
             Pin a newer one, which takes this command, and then run the tests:\n\n    \
             cd /tmp && apt-get download {PACKAGE}={newest} && sha256sum {PACKAGE}_*.deb\n\n\
             and a line with `{newest}` and that sum at the top of the list in kernels/source.pins.",
            offered.join(", "),
        ),
    }
}

fn first_offered<'a>(pins: &'a [Pin], offered: &[String]) -> Option<&'a Pin> {
    pins.iter().find(|pin| offered.contains(&pin.version))
}

/// The versions of the package in apt's lists.
fn offered() -> Result<Vec<String>> {
    let listing = process::text(
        Command::new("apt-cache").args(["madison", PACKAGE]).stdin(Stdio::null()).env("LC_ALL", "C"),
    )?;
    Ok(versions(&listing))
}

/// Of lines like ` linux-source-6.12 | 6.12.117-1 | http://... main amd64 Packages`, the second column.
fn versions(madison: &str) -> Vec<String> {
    madison.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(version: &str) -> Pin {
        Pin { version: version.into(), sha256: "0".repeat(64) }
    }

    #[test]
    fn pins_are_versions_with_hashes() {
        let hash = "0".repeat(64);
        assert_eq!(parse_pins(&format!("# why\n\n 1-2~x  {hash}\n")).unwrap(), [pin("1-2~x")]);
        assert!(parse_pins("1-2").is_err());
        assert!(parse_pins("1-2 abc").is_err());
        assert!(!parse_pins(super::super::PINS).unwrap().is_empty());
    }

    #[test]
    fn the_first_pin_that_apt_offers_is_taken() {
        let listing = " linux-source-6.12 | 6.12.9-1 | http://a bookworm/main amd64 Packages\n \
                       linux-source-6.12 | 6.12.8-1 | http://a bookworm/main amd64 Packages\n";
        let pins = [pin("6.12.10-1"), pin("6.12.8-1"), pin("6.12.9-1")];
        assert_eq!(first_offered(&pins, &versions(listing)), Some(&pins[1]));
        assert_eq!(first_offered(&pins, &versions("")), None);
    }

    #[test]
    fn a_replaced_version_is_looked_for_in_the_pools() {
        let addresses = pool_addresses(&["http://a/debian/".into()], &pin("6.12.1-1~deb12u1"));
        assert_eq!(
            addresses[1],
            "http://a/debian/pool/main/l/linux-6.12/linux-source-6.12_6.12.1-1%7edeb12u1_all.deb"
        );
        assert!(
            addresses.iter().any(|address| address.starts_with("http://a/debian/pool/updates/main/l/linux/"))
        );
    }

    #[test]
    fn what_cannot_be_had_is_said_with_what_to_do() {
        let text = not_to_be_had(&[pin("1-1")], &["3-1".into(), "2-1".into()]);
        assert!(text.contains("apt-get download linux-source-6.12=3-1") && text.contains("(1-1)"), "{text}");
        let text = not_to_be_had(&[pin("1-1")], &[]);
        assert!(text.contains("bookworm-security main") && text.contains("1-1"), "{text}");
    }
}
