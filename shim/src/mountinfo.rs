//! `/proc/thread-self/mountinfo` (proc_pid_mountinfo(5)): what is mounted where, as this thread sees it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::cause::Cause;

/// One mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of the mount.
    pub options: Vec<String>,
    /// Type of the file system.
    pub file_system: String,
    /// Options of the superblock.
    pub super_options: Vec<String>,
}

/// All mounts, in the order in which they were made.
pub(crate) fn read() -> Result<Vec<MountEntry>, Cause> {
    let text = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = path(fields.nth(3)?);
    let mount_point = path(fields.next()?);
    let options = words(fields.next()?);
    // Optional fields end with a lone hyphen.
    fields.find(|field| *field == b"-")?;
    let file_system = String::from_utf8_lossy(fields.next()?).into_owned();
    let super_options = words(fields.nth(1)?);
    Some(MountEntry { root, mount_point, options, file_system, super_options })
}

fn words(field: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(field).split(',').map(str::to_owned).collect()
}

/// The kernel writes blanks, newlines and backslashes of a path as three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        match octal(tail).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(digits.get(..3)?).ok()?;
    u8::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_is_understood_with_and_without_optional_fields() {
        let line =
            b"36 35 98:0 /mnt1 /mnt\\040two rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let entry = parse(line).unwrap();
        assert_eq!(entry.mount_point, PathBuf::from("/mnt two"));
        assert_eq!(entry.root, PathBuf::from("/mnt1"));
        assert_eq!(entry.file_system, "ext3");
        assert_eq!(entry.super_options, ["rw", "errors=continue"]);
        assert_eq!(parse(b"1 2 0:1 / / rw - tmpfs none rw,size=4k").unwrap().file_system, "tmpfs");
    }

    #[test]
    fn the_root_is_among_the_mounts() {
        assert!(read().unwrap().iter().any(|entry| entry.mount_point == std::path::Path::new("/")));
    }

    proptest! {
        #[test]
        fn no_line_causes_a_panic(line in proptest::collection::vec(any::<u8>(), 0..64)) {
            parse(&line);
            path(&line);
        }
    }
}
