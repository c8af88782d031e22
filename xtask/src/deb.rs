//! Debian packages as files: downloaded by apt from wherever this machine gets its packages, unpacked but not installed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rvm_tests::support::process;
use sha2::{Digest, Sha256};

/// Downloads `package` (a name, or `name=version`) into the directory `to`; returns the file.
pub fn download(package: &str, to: &Path) -> Result<PathBuf> {
    let before = debs(to)?;
    // Root's apt would drop to a user who cannot write to the cache, and warn about it.
    process::run(
        Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(to)
            .stdin(Stdio::null()),
    )?;
    match debs(to)?.into_iter().find(|file| !before.contains(file)) {
        Some(file) => Ok(file),
        None => bail!("apt-get downloaded no file for {package}"),
    }
}

/// Downloads the file at `address`, which must have this SHA-256, through whatever proxy apt has.
pub fn download_file(address: &str, sha256: &str, to: &Path) -> Result<()> {
    let mut command = Command::new("/usr/lib/apt/apt-helper");
    command.args(["-qq", "-o", "APT::Sandbox::User=root", "download-file", address]).arg(to);
    process::run(command.arg(format!("SHA256:{sha256}")).stdin(Stdio::null()))
}

/// Unpacks the files of a package below `to`.
pub fn unpack(package: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(to))
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = HashWriter(Sha256::new());
    io::copy(&mut file, &mut hash).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hash.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

struct HashWriter(Sha256);

impl io::Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn debs(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_hashed_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("x.deb");
        fs::write(&file, "abc").unwrap();
        assert_eq!(
            sha256(&file).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(debs(directory.path()).unwrap(), [file]);
    }
}
