//! An initramfs in the making: a newc archive, written entry by entry.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::modules;

/// A newc archive on its way to `W`.
pub struct Archive<W: Write> {
    output: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An archive without entries.
    pub fn new(output: W) -> Self {
        Self { output, inode: 0 }
    }

    /// Adds a directory; its parent must have been added before.
    pub fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, ModeFileType::Directory, 0o755, &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(name, ModeFileType::Regular, mode, content)
    }

    /// Adds a symbolic link to `target`.
    pub fn link(&mut self, name: &str, target: &[u8]) -> Result<()> {
        self.entry(name, ModeFileType::Symlink, 0o777, target)
    }

    /// Adds the file or directory tree `from` under `name`.
    pub fn tree(&mut self, name: &str, from: &Path) -> Result<()> {
        let metadata = from.symlink_metadata().with_context(|| format!("cannot find {}", from.display()))?;
        if metadata.is_symlink() {
            return self.link(name, fs::read_link(from)?.as_os_str().as_bytes());
        }
        if metadata.is_file() {
            let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            return self.file(name, metadata.permissions().mode() & 0o7777, &content);
        }
        ensure!(metadata.is_dir(), "{} is no file, directory or link", from.display());
        self.directory(name)?;
        let mut children = fs::read_dir(from)?.collect::<Result<Vec<_>, _>>()?;
        children.sort_by_key(fs::DirEntry::file_name);
        for child in children {
            self.tree(&format!("{name}/{}", child.file_name().to_string_lossy()), &child.path())?;
        }
        Ok(())
    }

    /// Adds kernel modules below `modules`, named so that an init which goes through them by name keeps their order.
    pub fn modules(&mut self, files: &[PathBuf]) -> Result<()> {
        for (index, path) in files.iter().enumerate() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = name.split('.').next().unwrap_or_default();
            self.file(&format!("modules/{index:02}-{name}"), 0o644, &modules::read(path)?)?;
        }
        Ok(())
    }

    /// Writes the end mark.
    pub fn finish(self) -> Result<W> {
        trailer(self.output).context("cannot end the archive")
    }

    fn entry(&mut self, name: &str, kind: ModeFileType, mode: u32, content: &[u8]) -> Result<()> {
        // The kernel takes equal inode numbers with several links for one file.
        self.inode += 1;
        let size =
            u32::try_from(content.len()).with_context(|| format!("{name} is too large for an initramfs"))?;
        let builder = Builder::new(name).ino(self.inode).mode(mode).set_mode_file_type(kind);
        let mut writer = builder.write(&mut self.output, size);
        writer
            .write_all(content)
            .and_then(|()| writer.finish())
            .with_context(|| format!("cannot archive {name}"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("bin")).unwrap();
        fs::write(directory.path().join("bin/tool"), "abc").unwrap();
        fs::set_permissions(directory.path().join("bin/tool"), fs::Permissions::from_mode(0o750)).unwrap();
        std::os::unix::fs::symlink("tool", directory.path().join("bin/link")).unwrap();

        let mut archive = Archive::new(Vec::new());
        archive.tree("usr", directory.path()).unwrap();
        let bytes = archive.finish().unwrap();

        let mut found = Vec::new();
        let mut rest = &bytes[..];
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = String::new();
            std::io::Read::read_to_string(&mut reader, &mut content).unwrap();
            found.push((name, mode, content));
            rest = reader.finish().unwrap();
        }
        let entry = |name: &str, mode, content: &str| (name.to_owned(), mode, content.to_owned());
        assert_eq!(
            found,
            [
                entry("usr", 0o040_755, ""),
                entry("usr/bin", 0o040_755, ""),
                entry("usr/bin/link", 0o120_777, "tool"),
                entry("usr/bin/tool", 0o100_750, "abc"),
            ]
        );
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let error = Archive::new(Vec::new()).tree("x", Path::new("/no/such")).unwrap_err();
        assert!(error.to_string().contains("/no/such"));
    }
}
