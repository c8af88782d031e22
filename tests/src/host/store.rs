//! The engines' disk: Docker's, containerd's and podman's state with the container images loaded.
//!
//! The engines themselves make it, from the test host's tree but on the build machine, where they run at full speed.
//! Where they cannot (no overlayfs in its kernel, or the cache itself on one), they do it in the test host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::image;
use super::recipe;
use crate::support::progress::Progress;
use crate::support::{cache, process};

/// The name of the disk's file system.
const LABEL: &str = "rvm-engines";

/// The disk's file in the directory of its cache entry.
pub fn file(directory: &Path) -> PathBuf {
    directory.join("store.img")
}

/// Makes the disk in `directory`. `tree` is the test host's, `archives` holds the container images; `load` boots the
/// test host with the disk, still empty, to have them loaded there.
pub fn build(
    tree: &Path,
    archives: &Path,
    directory: &Path,
    load: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let (disk, state) = (file(directory), directory.join("state"));
    let loaded = load_on_this_machine(tree, &state, archives);
    if let Err(error) = loaded {
        eprintln!(
            "The engines cannot load images on this machine, so they do it in the test host: {error:#}"
        );
        image::make_disk(&disk, LABEL, None)?;
        load(&disk)?;
    } else {
        image::make_disk(&disk, LABEL, Some(&state))?;
    }
    cache::remove(&state)
}

fn load_on_this_machine(tree: &Path, state: &Path, archives: &Path) -> Result<()> {
    std::fs::create_dir(state)?;
    let progress = Progress::spinner("Loading the container images");
    let work = state.parent().unwrap_or(state);
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child", "sh"]);
    command.arg(recipe::LOAD_IMAGES.write_to(work)?).args([tree, state, archives]);
    for (name, engines) in recipe::LOADED_IMAGES {
        command.args(engines.iter().flat_map(|engine| [*engine, *name]));
    }
    process::run_logged(&mut command, &work.join("load.log"), |line| progress.note(line))?;
    progress.finish();
    Ok(())
}
