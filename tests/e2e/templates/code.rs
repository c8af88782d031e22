//! What clones share of the kernel's code: all of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Templates;
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{eventually, rvm};

pub const STORIES: &[(&str, Story)] =
    &[("clones_change_nothing_of_the_kernels_code", clones_change_nothing_of_the_kernels_code)];

/// Where the kernel's code is in the guest's memory, and so in a template's file: from its beginning, where it is used most.
const CODE: std::ops::Range<u64> = (16 << 20)..(20 << 20);
const PAGE: u64 = 4096;
/// Of an entry of a process's page map: the page is there, and belongs to a file (pagemap.rst).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

fn clones_change_nothing_of_the_kernels_code() -> Result<()> {
    let templates = Templates::new()?;
    let key = templates.make()?;
    let limits = json!({ "pids": { "limit": 100 }, "cpu": { "shares": 512 } });
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        for (kind, limit) in limits.as_object().into_iter().flatten() {
            config["linux"]["resources"][kind] = limit.clone();
        }
    })?;
    let mut run = templates.spawn(&bundle, "story")?;
    eventually("it runs", || Ok(rvm(&["state", "story"])?.text().contains("\"running\"")))?;
    let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.expect_code(0)?.text())?;
    let memory = templates.store().join(key.trim()).join("memory");
    let (shared, copied) = pages(&state["pid"].to_string(), &memory.to_string_lossy())?;
    ensure!(shared > 100, "{shared} pages of the kernel's code are the template's");
    ensure!(copied == 0, "{copied} pages of the kernel's code are copies, beside {shared} of the template");
    rvm(&["kill", "story", "KILL"])?.expect_code(0)?;
    run.wait()?;
    Ok(())
}

/// How many pages of the kernel's code a process has of a template's file, and how many as copies of its own.
fn pages(pid: &str, file: &str) -> Result<(u64, u64)> {
    let entries = File::open(format!("/proc/{pid}/pagemap"))?;
    let hexadecimal = |word: &str| u64::from_str_radix(word, 16);
    let (mut shared, mut copied) = (0, 0);
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        if words.last() != Some(&file) {
            continue;
        }
        let (start, end) = words[0].split_once('-').context("a mapping has a start and an end")?;
        let (start, end, offset) = (hexadecimal(start)?, hexadecimal(end)?, hexadecimal(words[2])?);
        let is_code = |address: &u64| CODE.contains(&(offset + address - start));
        for address in (start..end).step_by(PAGE as usize).filter(is_code) {
            let mut entry = [0; 8];
            entries.read_exact_at(&mut entry, address / PAGE * 8)?;
            match u64::from_le_bytes(entry) {
                entry if entry & PRESENT == 0 => {}
                entry if entry & OF_FILE != 0 => shared += 1,
                _ => copied += 1,
            }
        }
    }
    Ok((shared, copied))
}
