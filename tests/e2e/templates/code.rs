//! What clones share of the kernel's code: all that is used most.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use serde_json::json;

use super::Templates;
use super::mappings::{Mapping, limit};
use crate::Story;
use crate::bundle::Bundle;

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
    let memory = templates.store().join(key).join("memory");
    let limits = json!({ "pids": { "limit": 100 }, "cpu": { "shares": 512 } });
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| limit(config, &limits))?;
    let (shared, copied) = templates.look_at(&bundle, &memory, pages)?;
    ensure!(shared > 100, "{shared} pages of the kernel's code are the template's");
    ensure!(copied == 0, "{copied} pages of the kernel's code are copies, beside {shared} of the template");
    Ok(())
}

/// How many pages of the kernel's code a process has of a template's file, and how many as copies of its own.
fn pages(pid: &str, mapped: &[Mapping]) -> Result<(u64, u64)> {
    let entries = File::open(format!("/proc/{pid}/pagemap"))?;
    let (mut shared, mut copied) = (0, 0);
    for Mapping { start, offset, length, .. } in mapped {
        for place in (0..*length).step_by(PAGE as usize).filter(|place| CODE.contains(&(offset + place))) {
            let mut entry = [0; 8];
            entries.read_exact_at(&mut entry, (start + place) / PAGE * 8)?;
            match u64::from_le_bytes(entry) {
                entry if entry & PRESENT == 0 => {}
                entry if entry & OF_FILE != 0 => shared += 1,
                _ => copied += 1,
            }
        }
    }
    Ok((shared, copied))
}
