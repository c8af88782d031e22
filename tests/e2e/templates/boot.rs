//! What machines that boot share: kernel, its text once it is patched, and initramfs, from the boot of a template's machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::mappings::limit;
use super::{BOOTED, Templates, ensure_says, never_goes_on};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, eventually, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("machines_that_boot_share_text_and_agent", machines_that_boot_share_text_and_agent),
    ("a_kept_boot_that_is_damaged_is_dropped", a_kept_boot_that_is_damaged_is_dropped),
    ("a_kept_boot_that_does_not_work_costs_one_start", a_kept_boot_that_does_not_work_costs_one_start),
];

/// What machines map of the kept file is its end: the patched text, and the initramfs. Its beginning are the kernel as it is loaded,
/// which is longer than its text, and the text before it is patched.
const MOST_OF_FILE: u64 = 2;
/// A mapping of which less than a tenth was written to is shared.
const SHARED: u64 = 10;

impl Templates {
    /// The folders of what machines share that boot: with one processor, and with several.
    fn kept_boots(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.store())?.flatten().map(|entry| entry.path());
        Ok(entries.filter(|path| path.extension().is_some_and(|extension| extension == "boot")).collect())
    }

    /// The only one.
    fn kept_boot(&self) -> Result<PathBuf> {
        self.kept_boots()?.pop().context("no boot is kept")
    }

    /// Runs a bundle whose machine has to boot.
    fn boot(&self, log: &str) -> Result<Outcome> {
        let bundle = Bundle::new(&["uname", "-s"])?.edit(never_goes_on)?;
        self.rvm(&["--log", log, "run", "--timeline", "--bundle", bundle.path(), "story"])
    }
}

fn machines_that_boot_share_text_and_agent() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    let one = templates.kept_boot()?;
    // Of the template's size, and of one that there is no template for.
    ensure_is_shared(&templates, &one, json!({}))?;
    ensure_is_shared(&templates, &one, json!({ "memory": { "limit": 300 << 20 } }))?;
    // With several processors it is another one.
    templates.rvm(&["template", "create", "--cpus", "2"])?.expect_code(0)?;
    let several =
        templates.kept_boots()?.into_iter().find(|path| *path != one).context("there is another")?;
    ensure_is_shared(&templates, &several, json!({ "cpu": { "quota": 200_000, "period": 100_000 } }))?;

    templates.rvm(&["template", "rm", "--all"])?.expect_code(0)?;
    ensure!(templates.kept_boots()?.is_empty(), "it goes with the templates");
    Ok(())
}

/// Boots a container with such limits, and looks at what it has mapped of what is kept.
fn ensure_is_shared(templates: &Templates, kept: &Path, limits: Value) -> Result<()> {
    let file = kept.join("memory");
    let length = fs::metadata(&file)?.len();
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        never_goes_on(config);
        limit(config, &limits);
    })?;
    templates.look_at(&bundle, &file, |_, mapped| {
        let (sum, written) =
            mapped.iter().fold((0, 0), |(sum, written), map| (sum + map.length, written + map.written));
        let first = mapped.iter().map(|map| map.offset).min().context("something is mapped")?;
        ensure!(
            first + sum == length && sum < length / MOST_OF_FILE,
            "with {limits} of {length} bytes it has {mapped:x?}"
        );
        let agent =
            mapped.iter().find(|map| map.offset + map.length == length).context("the end is mapped")?;
        ensure!(agent.written < agent.length / SHARED, "with {limits} the agent is its own: {agent:?}");
        ensure!(written < sum / SHARED, "with {limits} it has its own pages: {mapped:x?}");
        Ok(())
    })
}

fn a_kept_boot_that_is_damaged_is_dropped() -> Result<()> {
    let templates = Templates::new()?;
    let log = templates.folder.path().join("log").display().to_string();
    templates.make()?;
    for damage in [
        "printf x | dd of=memory bs=1 seek=1000000 conv=notrunc",
        "truncate -s 1M memory",
        "printf x | dd of=state bs=1 seek=60 conv=notrunc",
        "chmod g+w memory",
    ] {
        let kept = templates.kept_boot()?;
        shell(&format!("cd {} && {{ {damage}; }} 2>&1", kept.display()))?.expect_code(0)?;
        let run = templates.boot(&log)?;
        ensure_says(&run, BOOTED)?;
        run.expect_text("Linux")?;
        let said = fs::read_to_string(&log)?;
        ensure!(
            said.contains("what is kept for machines that boot is dropped"),
            "after `{damage}` it says {said}"
        );
        fs::remove_file(&log)?;
        ensure!(templates.kept_boot().is_err(), "it is gone");
        // The next one that may begin with a template sees that it comes back.
        templates.run(&Bundle::new(&["true"])?)?;
        eventually("it is there again", || Ok(templates.kept_boot().is_ok()))?;
    }
    Ok(())
}

fn a_kept_boot_that_does_not_work_costs_one_start() -> Result<()> {
    let templates = Templates::new()?;
    let log = templates.folder.path().join("log").display().to_string();
    templates.make()?;
    let kept = templates.kept_boot()?;
    // No processor executes that, where it would execute zeros for minutes.
    super::damage::damage_unseen(&kept, 0xff)?;
    let failed = templates.boot(&log)?;
    failed.expect_failure(&["did not come up with what is kept for machines that boot", "dropped"])?;
    templates.boot(&log)?.expect_text("Linux")?;
    Ok(())
}
