//! Templates that are damaged: where it is seen, the machine boots, and where it is not, it is told what happened.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Whence, lseek};
use sha2::{Digest, Sha256};

use super::{BOOTED, RESUMED, Templates, ensure_says};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{eventually, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("what_is_damaged_is_made_anew", what_is_damaged_is_made_anew),
    ("a_guest_that_does_not_come_up_costs_one_start", a_guest_that_does_not_come_up_costs_one_start),
];

fn what_is_damaged_is_made_anew() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["true"])?);
    templates.make()?;
    for damage in [
        "printf x | dd of=memory bs=1 seek=1000000 conv=notrunc",
        "truncate -s 1M memory",
        "cp memory copy; mv copy memory",
        "truncate -s 100 state",
        "truncate -s 0 state",
        "printf x | dd of=state bs=1 seek=500 conv=notrunc",
        "printf '\\377' | dd of=state bs=1 seek=8 conv=notrunc",
        "chown 1234 state",
        "chmod g+w memory",
        "mv state /tmp/e2e-state; ln -s /tmp/e2e-state state",
    ] {
        let key = templates.await_one()?;
        let folder = templates.store().join(&key);
        shell(&format!("cd {} && {{ {damage}; }} 2>&1", folder.display()))?.expect_code(0)?;
        let log = templates.folder.path().join("log");
        let words =
            ["--log", &log.display().to_string(), "run", "--timeline", "--bundle", bundle.path(), "story"];
        let run = templates.rvm(&words)?.expect_code(0)?;
        let said = fs::read_to_string(&log)?;
        fs::remove_file(&log)?;
        let warnings = said.lines().filter(|line| line.contains("template")).count();
        ensure!(warnings == 1 && said.contains("is dropped"), "after `{damage}` it says {said}");
        ensure_says(&run, BOOTED)?;
        eventually("it is made anew", || {
            let list = templates.rvm(&["template", "list"])?.expect_code(0)?.text();
            Ok(list.contains(&key) && !list.contains("unusable"))
        })?;
        ensure_says(&templates.run(&bundle)?, RESUMED)?;
    }
    fs::remove_file("/tmp/e2e-state")?;
    Ok(())
}

fn a_guest_that_does_not_come_up_costs_one_start() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["echo", "hello"])?);
    let key = templates.make()?;
    damage_unseen(&templates.store().join(&key), 0)?;
    let log = templates.folder.path().join("log").display().to_string();
    let failed = templates.rvm(&["--log", &log, "run", "--bundle", bundle.path(), "story"])?;
    let failed = failed.expect_failure(&["did not come up", "template", "was dropped"])?;
    ensure!(failed.error_text().trim_end().lines().count() == 1, "it says {}", failed.error_text());
    ensure!(failed.text().is_empty(), "nothing of the container ran: {}", failed.text());
    rvm(&["state", "story"])?.expect_failure(&["does not exist"])?;
    let list = templates.rvm(&["template", "list"])?.expect_code(0)?.text();
    ensure!(!list.contains(&key) || list.contains("unusable"), "nobody goes on from it any more: {list}");
    let said = fs::read_to_string(&log)?;
    ensure!(said.contains("did not come up"), "the log says {said}");

    let next = templates.run(&bundle)?;
    ensure_says(&next, BOOTED)?;
    ensure!(next.text() == "hello", "it said {:?}", next.text());
    eventually("it is made anew", || Ok(templates.run(&bundle)?.error_text().contains(RESUMED)))
}

/// Overwrites all of the memory by this byte, and lets the state say that the file is to be like that: nothing but the
/// guest itself can tell.
pub(super) fn damage_unseen(folder: &Path, by: u8) -> Result<()> {
    let mut memory = File::options().write(true).open(folder.join("memory"))?;
    let mut at = 0;
    while let Ok(begin) = lseek(&memory, at, Whence::SeekData) {
        at = lseek(&memory, begin, Whence::SeekHole)?;
        memory.seek(SeekFrom::Start(begin as u64))?;
        memory.write_all(&vec![by; (at - begin) as usize])?;
    }
    memory.sync_all()?;

    // Behind the name and the version come a digest, and what it is of: first of all, what the memory's file looks like.
    const DIGEST: usize = 12;
    const BODY: usize = DIGEST + 32;
    let mut state = fs::read(folder.join("state"))?;
    let fields = state[BODY..].iter().enumerate().filter(|(_, byte)| **byte < 0x80);
    let (last, _) = fields.take(6).last().context("it has six numbers")?;
    let found = memory.metadata()?;
    let mut identity = [found.ino(), found.size()].map(number).concat();
    for part in [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()] {
        // None is negative; those that could be have their sign in the lowest bit.
        identity.extend(number(2 * part as u64));
    }
    state.splice(BODY..=BODY + last, identity);
    let digest = Sha256::digest(&state[BODY..]);
    state[DIGEST..BODY].copy_from_slice(&digest);
    Ok(fs::write(folder.join("state"), state)?)
}

/// A number as the state holds it: by seven bits, the lowest first, of which all but the last are marked.
fn number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
