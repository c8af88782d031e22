//! Recognising a newer build of rvm, so that a running test host always tests the latest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::support::cache::Key;

/// Beside a running host's sockets: the stamp of what is installed in it.
const STAMP_FILE: &str = "artefacts";

/// A hash over name, size and time of change of every file below `directory`; the same when there is none.
pub fn stamp(directory: &Path) -> Result<String> {
    let mut files = Vec::new();
    if directory.is_dir() {
        collect(directory, &mut files)?;
    }
    files.sort();
    let key = files.iter().fold(Key::new(), |key, line| key.with("file", line));
    Ok(key.hex())
}

/// Whether the host in `run` has the artefacts with this stamp.
pub fn is_installed(run: &Path, stamp: &str) -> bool {
    fs::read_to_string(run.join(STAMP_FILE)).is_ok_and(|text| text == stamp)
}

/// Notes that the host in `run` has the artefacts with this stamp.
pub fn note_installed(run: &Path, stamp: &str) -> Result<()> {
    let file = run.join(STAMP_FILE);
    fs::write(&file, stamp).with_context(|| format!("cannot write {}", file.display()))
}

fn collect(directory: &Path, files: &mut Vec<String>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let data =
            fs::symlink_metadata(&path).with_context(|| format!("cannot look at {}", path.display()))?;
        if data.is_dir() {
            collect(&path, files)?;
        } else {
            let changed = (data.ctime(), data.ctime_nsec());
            files.push(format!("{} {} {} {changed:?}", path.display(), data.ino(), data.size()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stamp_changes_with_a_file_however_deep() {
        let dir = tempfile::tempdir().unwrap();
        let none = stamp(&dir.path().join("absent")).unwrap();
        assert_eq!(none, stamp(dir.path()).unwrap());
        fs::create_dir(dir.path().join("bin")).unwrap();
        let file = dir.path().join("bin/rvm");
        fs::write(&file, "a").unwrap();
        let first = stamp(dir.path()).unwrap();
        assert_ne!(first, none);
        assert_eq!(first, stamp(dir.path()).unwrap());
        fs::write(&file, "longer").unwrap();
        assert_ne!(first, stamp(dir.path()).unwrap());
    }
}
