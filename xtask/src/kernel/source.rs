//! The kernel's source: Debian's package, fetched by the machine's own apt and checked against the project's pin.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::support::progress::Progress;
use rvm_tests::support::{packages, process};

use crate::deb;

const PACKAGE: &str = "linux-source-6.12";
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
#[derive(Debug, PartialEq)]
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

/// Gets the first available of `pins` and unpacks it in `work`; returns the root of the source tree.
pub fn unpack(pins: &[Pin], work: &Path) -> Result<PathBuf> {
    let progress = Progress::spinner("Fetching the guest kernel's source");
    let package = fetch(pins, work)?;
    progress.note("unpacking");
    deb::unpack(&package, work)?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(work.join(TARBALL)).arg("-C").arg(work);
    process::run(tar.args(UNNEEDED.iter().map(|pattern| format!("--exclude={pattern}"))))?;
    progress.finish();
    let tree = work.join("linux-source-6.12");
    ensure!(tree.join("Kconfig").is_file(), "{PACKAGE} holds no kernel source where it is expected");
    Ok(tree)
}

fn fetch(pins: &[Pin], work: &Path) -> Result<PathBuf> {
    let pin = available(pins)?;
    let package = deb::download(&format!("{PACKAGE}={}", pin.version), work)?;
    let found = deb::sha256(&package)?;
    ensure!(
        found == pin.sha256,
        "{PACKAGE} {} is not the pinned one: its SHA-256 is {found}, kernels/source.pins says {}",
        pin.version,
        pin.sha256
    );
    Ok(package)
}

/// The first pin that apt knows, after a refresh of its lists when it knows none.
fn available(pins: &[Pin]) -> Result<&Pin> {
    if let Some(pin) = first_offered(pins, &offered()?) {
        return Ok(pin);
    }
    packages::update()?;
    let offered = offered()?;
    first_offered(pins, &offered).with_context(|| {
        let wanted: Vec<_> = pins.iter().map(|pin| pin.version.as_str()).collect();
        format!(
            "apt offers no {PACKAGE} in a pinned version: wanted one of {}, offered: {}.\n\
             The package is in Debian 12 and 13 with their security updates: check the apt sources. \
             For another version, add its line to kernels/source.pins.",
            wanted.join(", "),
            if offered.is_empty() { "none".into() } else { offered.join(", ") },
        )
    })
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
}
