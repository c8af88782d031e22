//! OCI bundles for the stories that speak to `rvm` without an engine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::shell;

/// A bundle with the busybox image's files as its root filesystem, removed when dropped.
pub struct Bundle {
    folder: TempDir,
    config: Value,
}

impl Bundle {
    /// A bundle that runs this command without a terminal, as `rvm spec` describes it otherwise.
    pub fn new(command: &[&str]) -> Result<Bundle> {
        let folder = tempfile::Builder::new().prefix("e2e-bundle").tempdir()?;
        let root = folder.path().join("rootfs");
        fs::create_dir(&root)?;
        shell(&format!("tar -xf {} -C {}", busybox_tree()?.display(), root.display()))?.expect_code(0)?;
        shell(&format!("cd {} && rvm spec", folder.path().display()))?.expect_code(0)?;
        let mut config: Value =
            serde_json::from_str(&fs::read_to_string(folder.path().join("config.json"))?)?;
        config["process"]["args"] = json!(command);
        config["process"]["terminal"] = json!(false);
        config["root"]["readonly"] = json!(false);
        let bundle = Bundle { folder, config };
        bundle.write()?;
        Ok(bundle)
    }

    /// Changes the configuration.
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Result<Bundle> {
        change(&mut self.config);
        self.write()?;
        Ok(self)
    }

    /// The bundle's folder.
    pub fn path(&self) -> &str {
        self.folder.path().to_str().unwrap_or_default()
    }

    /// Its `config.json`.
    pub fn config_path(&self) -> PathBuf {
        self.folder.path().join("config.json")
    }

    fn write(&self) -> Result<()> {
        Ok(fs::write(self.config_path(), serde_json::to_vec_pretty(&self.config)?)?)
    }
}

/// A mount as a configuration describes it.
pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// Adds mounts to a configuration, after those that it has.
pub fn add_mounts(config: &mut Value, added: impl IntoIterator<Item = Value>) {
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.extend(added);
    }
}

/// Adds a namespace of the container's own to a configuration.
pub fn add_namespace(config: &mut Value, kind: &str) {
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({ "type": kind }));
    }
}

/// The busybox image as one archive, made once for all stories.
pub fn busybox_tree() -> Result<&'static Path> {
    let archive = Path::new("/run/e2e-busybox.tar");
    if !archive.exists() {
        let export =
            "id=$(docker create busybox) && docker export -o /run/e2e-busybox.tar $id && docker rm $id";
        shell(export)?.expect_code(0).context("the busybox image can be exported")?;
    }
    Ok(archive)
}
