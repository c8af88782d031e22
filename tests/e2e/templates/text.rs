//! The text of the guest's kernel: machines that boot have it from the boot of a template's machine, and share its pages.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::{BOOTED, Templates, ensure_says, never_goes_on};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, eventually, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("what_boots_has_the_text_of_an_earlier_boot", what_boots_has_the_text_of_an_earlier_boot),
    ("a_text_that_is_damaged_is_dropped", a_text_that_is_damaged_is_dropped),
    ("a_text_that_does_not_work_costs_one_start", a_text_that_does_not_work_costs_one_start),
];

/// Which part of the file is mapped when the guest is up: of three equal ones that which is patched.
const PATCHED: u64 = 2;

impl Templates {
    /// The folder of the kernel's text.
    fn text(&self) -> Result<PathBuf> {
        let entries = fs::read_dir(self.store())?.flatten().map(|entry| entry.path());
        let mut texts = entries.filter(|path| path.extension().is_some_and(|extension| extension == "text"));
        texts.next().context("no text is kept")
    }

    /// Runs a bundle whose machine has to boot.
    fn boot(&self, log: &str) -> Result<Outcome> {
        let bundle = Bundle::new(&["uname", "-s"])?.edit(never_goes_on)?;
        self.rvm(&["--log", log, "run", "--timeline", "--bundle", bundle.path(), "story"])
    }
}

fn what_boots_has_the_text_of_an_earlier_boot() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    let file = templates.text()?.join("memory");
    let length = fs::metadata(&file)?.len() / 3;
    // Of the template's size, and of one that there is no template for.
    for memory in [None, Some(300 << 20)] {
        let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
            never_goes_on(config);
            if let Some(bytes) = memory {
                config["linux"]["resources"]["memory"] = serde_json::json!({ "limit": bytes });
            }
        })?;
        let mut run = templates.spawn(&bundle, "story")?;
        eventually("it runs", || Ok(rvm(&["state", "story"])?.text().contains("\"running\"")))?;
        let state = rvm(&["state", "story"])?.expect_code(0)?.text();
        let state: serde_json::Value = serde_json::from_str(&state)?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", state["pid"]))?;
        let kernels: Vec<_> = maps.lines().filter(|line| line.contains(&*file.to_string_lossy())).collect();
        let offsets = kernels.iter().filter_map(|line| u64::from_str_radix(line.split(' ').nth(2)?, 16).ok());
        let (patched, other): (Vec<_>, Vec<_>) = offsets.partition(|offset| *offset >= PATCHED * length);
        ensure!(!patched.is_empty() && other.is_empty(), "with {memory:?} its text is {kernels:?}");
        rvm(&["kill", "story", "KILL"])?.expect_code(0)?;
        run.wait()?;
    }
    templates.rvm(&["template", "rm", "--all"])?.expect_code(0)?;
    ensure!(templates.text().is_err(), "it goes with the templates");
    Ok(())
}

fn a_text_that_is_damaged_is_dropped() -> Result<()> {
    let templates = Templates::new()?;
    let log = templates.folder.path().join("log").display().to_string();
    templates.make()?;
    for damage in [
        "printf x | dd of=memory bs=1 seek=1000000 conv=notrunc",
        "truncate -s 1M memory",
        "printf x | dd of=state bs=1 seek=60 conv=notrunc",
        "chmod g+w memory",
    ] {
        let text = templates.text()?;
        shell(&format!("cd {} && {{ {damage}; }} 2>&1", text.display()))?.expect_code(0)?;
        let run = templates.boot(&log)?;
        ensure_says(&run, BOOTED)?;
        run.expect_text("Linux")?;
        let said = fs::read_to_string(&log)?;
        ensure!(said.contains("text of the guest's kernel is dropped"), "after `{damage}` it says {said}");
        fs::remove_file(&log)?;
        ensure!(templates.text().is_err(), "it is gone");
        // The next one that may begin with a template sees that it comes back.
        templates.run(&Bundle::new(&["true"])?)?;
        eventually("it is there again", || Ok(templates.text().is_ok()))?;
    }
    Ok(())
}

fn a_text_that_does_not_work_costs_one_start() -> Result<()> {
    let templates = Templates::new()?;
    let log = templates.folder.path().join("log").display().to_string();
    templates.make()?;
    let text = templates.text()?;
    super::damage::damage_unseen(&text)?;
    let failed = templates.boot(&log)?;
    failed.expect_failure(&["did not come up with the text that is kept of its kernel", "dropped"])?;
    templates.boot(&log)?.expect_text("Linux")?;
    Ok(())
}
