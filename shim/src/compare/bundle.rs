//! The bundles that the runtimes start: the user's own with another program, or the least there can be.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::CompareError;
use crate::bundle::{CONFIG, TEMPLATE};
use crate::programs;
use crate::spec::default_spec;

/// A container that can be started with templates and without, which differs by an annotation.
#[derive(Debug)]
pub struct TestBundle {
    folder: PathBuf,
}

impl TestBundle {
    /// Whose process is `program`, over a root filesystem.
    fn write(
        folder: &Path,
        rootfs: &Path,
        mut config: Value,
        program: Option<&str>,
    ) -> Result<TestBundle, CompareError> {
        config["root"]["path"] = json!(rootfs);
        config["process"]["terminal"] = json!(false);
        if let Some(program) = program {
            config["process"]["args"] = json!([program]);
        }
        let bundle = TestBundle { folder: folder.to_owned() };
        for cold in [false, true] {
            if cold {
                config["annotations"][TEMPLATE] = json!("off");
            }
            let path = bundle.path(cold);
            fs::create_dir_all(&path)
                .and_then(|()| fs::write(path.join(CONFIG), config.to_string()))
                .map_err(CompareError::system(format!("cannot write the bundle {}", path.display())))?;
        }
        Ok(bundle)
    }

    /// The bundle's folder.
    pub fn path(&self, cold: bool) -> PathBuf {
        self.folder.join(if cold { "cold" } else { "warm" })
    }
}

/// The bundles whose program ends at once and whose program stays, in a folder of this process's own. With a bundle of
/// the user's, everything is as it says but the program.
pub fn make(work: &Path, given: Option<&Path>) -> Result<(TestBundle, TestBundle), CompareError> {
    let config = match given {
        Some(bundle) => read(bundle)?,
        None => serde_json::to_value(default_spec(false))
            .map_err(|error| CompareError::Config(work.to_owned(), error))?,
    };
    let rootfs = work.join("rootfs");
    // The programs are beside the files of the user's bundle, in a root filesystem that is thrown away.
    match given {
        Some(bundle) => copy(&root_of(bundle, &config), &rootfs)?,
        None => fs::create_dir_all(&rootfs).map_err(CompareError::system("cannot make a root filesystem"))?,
    }
    for (name, program) in
        [("true", programs::succeed()), ("pause", programs::pause()), ("kernel", programs::kernel())]
    {
        let path = rootfs.join(name);
        fs::write(&path, program)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .map_err(CompareError::system(format!("cannot write {}", path.display())))?;
    }
    // With a bundle of the user's it is that program which is started and timed.
    let short = given.is_none().then_some("/true");
    Ok((
        TestBundle::write(&work.join("short"), &rootfs, config.clone(), short)?,
        TestBundle::write(&work.join("long"), &rootfs, config, Some("/pause"))?,
    ))
}

fn read(bundle: &Path) -> Result<Value, CompareError> {
    let path = bundle.join(CONFIG);
    let text = fs::read(&path).map_err(CompareError::system(format!("cannot read {}", path.display())))?;
    serde_json::from_slice(&text).map_err(|error| CompareError::Config(path, error))
}

fn root_of(bundle: &Path, config: &Value) -> PathBuf {
    bundle.join(config["root"]["path"].as_str().unwrap_or("rootfs"))
}

/// Copies a tree as it is; `cp` knows of links, devices, attributes and sparse files.
fn copy(from: &Path, to: &Path) -> Result<(), CompareError> {
    let done = std::process::Command::new("cp")
        .args(["-a", "--reflink=auto", "--"])
        .args([from, to])
        .output()
        .map_err(CompareError::system("cannot start cp"))?;
    match done.status.success() {
        true => Ok(()),
        false => {
            Err(CompareError::Copy(from.to_owned(), String::from_utf8_lossy(&done.stderr).trim().to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_bundle_has_three_programs_and_differs_by_an_annotation() {
        let work = tempfile::tempdir().unwrap();
        let (short, long) = make(work.path(), None).unwrap();
        let config = |bundle: &TestBundle, cold| read(&bundle.path(cold)).unwrap();
        assert_eq!(config(&short, false)["process"]["args"], json!(["/true"]));
        assert_eq!(config(&long, true)["process"]["args"], json!(["/pause"]));
        assert_eq!(config(&long, true)["annotations"][TEMPLATE], "off");
        assert!(config(&long, false)["annotations"].get(TEMPLATE).is_none());
        assert!(work.path().join("rootfs/kernel").is_file());
    }

    #[test]
    fn a_bundle_of_ones_own_is_copied_and_keeps_its_program() {
        let own = tempfile::tempdir().unwrap();
        fs::create_dir(own.path().join("files")).unwrap();
        fs::write(own.path().join("files/data"), "x").unwrap();
        let config = json!({ "ociVersion": "1.2.0", "root": { "path": "files" }, "process": { "args": ["/bin/mine"] } });
        fs::write(own.path().join(CONFIG), config.to_string()).unwrap();
        let work = tempfile::tempdir().unwrap();
        let (short, long) = make(work.path(), Some(own.path())).unwrap();
        assert_eq!(read(&short.path(false)).unwrap()["process"]["args"], json!(["/bin/mine"]));
        assert_eq!(read(&long.path(false)).unwrap()["process"]["args"], json!(["/pause"]));
        assert!(work.path().join("rootfs/data").is_file());
        assert!(!own.path().join("files/true").exists(), "the user's files stay as they are");

        let missing = make(work.path(), Some(Path::new("/no/such/bundle"))).unwrap_err().to_string();
        assert!(missing.contains("/no/such/bundle/config.json"), "{missing}");
    }
}
