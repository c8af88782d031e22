//! What machines that boot share: kernel, its text once it is patched, and initramfs, from the boot of a template's machine.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::{BOOTED, Templates, ensure_says, never_goes_on};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, eventually, rvm, shell};

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
    /// The folder of what machines share that boot.
    fn kept_boot(&self) -> Result<PathBuf> {
        let entries = fs::read_dir(self.store())?.flatten().map(|entry| entry.path());
        let mut boots = entries.filter(|path| path.extension().is_some_and(|extension| extension == "boot"));
        boots.next().context("no boot is kept")
    }

    /// Runs a bundle whose machine has to boot.
    fn boot(&self, log: &str) -> Result<Outcome> {
        let bundle = Bundle::new(&["uname", "-s"])?.edit(never_goes_on)?;
        self.rvm(&["--log", log, "run", "--timeline", "--bundle", bundle.path(), "story"])
    }
}

/// A mapping of a file, in bytes.
#[derive(Debug)]
struct Mapping {
    offset: u64,
    length: u64,
    /// How much of it the process has written to.
    written: u64,
}

/// How a process has mapped a file, in the order of addresses (proc_pid_smaps(5)).
fn mappings(pid: &str, file: &str) -> Result<Vec<Mapping>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let hexadecimal = |word: &str| u64::from_str_radix(word, 16);
    let mut found: Vec<Mapping> = Vec::new();
    let mut is_it = false;
    for line in maps.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        if let Some((start, end)) = words[0].split_once('-') {
            is_it = words.last() == Some(&file);
            if is_it {
                let length = hexadecimal(end)? - hexadecimal(start)?;
                found.push(Mapping { offset: hexadecimal(words[2])?, length, written: 0 });
            }
        } else if is_it && words[0] == "Anonymous:" {
            let last = found.last_mut().context("a mapping comes first")?;
            last.written = words[1].parse::<u64>()? << 10;
        }
    }
    Ok(found)
}

fn machines_that_boot_share_text_and_agent() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    let file = templates.kept_boot()?.join("memory");
    let length = fs::metadata(&file)?.len();
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
        let mapped = mappings(&state["pid"].to_string(), &file.to_string_lossy())?;
        let (sum, written) =
            mapped.iter().fold((0, 0), |(sum, written), map| (sum + map.length, written + map.written));
        let first = mapped.iter().map(|map| map.offset).min().context("something is mapped")?;
        ensure!(
            first + sum == length && sum < length / MOST_OF_FILE,
            "with {memory:?} of {length} bytes it has {mapped:x?}"
        );
        let agent =
            mapped.iter().find(|map| map.offset + map.length == length).context("the end is mapped")?;
        ensure!(agent.written < agent.length / SHARED, "with {memory:?} the agent is its own: {agent:?}");
        ensure!(written < sum / SHARED, "with {memory:?} it has its own pages: {mapped:x?}");
        rvm(&["kill", "story", "KILL"])?.expect_code(0)?;
        run.wait()?;
    }
    templates.rvm(&["template", "rm", "--all"])?.expect_code(0)?;
    ensure!(templates.kept_boot().is_err(), "it goes with the templates");
    Ok(())
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
    super::damage::damage_unseen(&kept)?;
    let failed = templates.boot(&log)?;
    failed.expect_failure(&["did not come up with what is kept for machines that boot", "dropped"])?;
    templates.boot(&log)?.expect_text("Linux")?;
    Ok(())
}
