//! What a running container's monitor has mapped of a template's file, or of a boot's.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Templates;
use crate::bundle::Bundle;
use crate::command::{eventually, rvm};

/// A mapping of a file, in bytes.
#[derive(Debug)]
pub struct Mapping {
    /// The address in the process.
    pub start: u64,
    pub offset: u64,
    pub length: u64,
    /// How much of it the process has written to.
    pub written: u64,
}

impl Templates {
    /// Looks at what the monitor of a bundle that sleeps has mapped of a file, while it runs; by its process ID, too.
    pub fn look_at<T>(
        &self,
        bundle: &Bundle,
        file: &Path,
        look: impl FnOnce(&str, &[Mapping]) -> Result<T>,
    ) -> Result<T> {
        let mut run = self.spawn(bundle, "story")?;
        eventually("it runs", || Ok(rvm(&["state", "story"])?.text().contains("\"running\"")))?;
        let state: Value = serde_json::from_str(&rvm(&["state", "story"])?.expect_code(0)?.text())?;
        let pid = state["pid"].to_string();
        let seen = look(&pid, &mappings(&pid, &file.to_string_lossy())?)?;
        rvm(&["kill", "story", "KILL"])?.expect_code(0)?;
        run.wait()?;
        Ok(seen)
    }
}

/// Gives a container these limits beside those that it has.
pub fn limit(config: &mut Value, limits: &Value) {
    for (kind, limit) in limits.as_object().into_iter().flatten() {
        config["linux"]["resources"][kind] = limit.clone();
    }
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
                let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
                found.push(Mapping {
                    start,
                    offset: hexadecimal(words[2])?,
                    length: end - start,
                    written: 0,
                });
            }
        } else if is_it && words[0] == "Anonymous:" {
            let last = found.last_mut().context("a mapping comes first")?;
            last.written = words[1].parse::<u64>()? << 10;
        }
    }
    Ok(found)
}
