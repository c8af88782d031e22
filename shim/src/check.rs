//! `rvm check`: is this host fit to run microVMs? One line each, with the remedy for what is missing.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use serde_json::json;

/// Space that the state folder should have, in bytes: logs and state of many containers fit.
const STATE_SPACE: u64 = 16 << 20;

/// Modules that connecting a container's network takes.
const NETWORK_MODULES: [&str; 4] = ["tun", "sch_ingress", "act_mirred", "cls_u32"];

/// What the checks look at. `kernel` and `agent`: the path where it was found, or a sentence why it was not.
#[derive(Debug)]
pub struct Subject<'a> {
    /// The folder for the containers' state.
    pub state_root: &'a Path,
    /// The guest kernel's image.
    pub kernel: Result<PathBuf, String>,
    /// The guest's agent.
    pub agent: Result<PathBuf, String>,
}

/// What came out of one check: what is there, or what is missing and what to do about it.
#[derive(Debug)]
struct Finding {
    subject: &'static str,
    outcome: Result<String, String>,
}

/// What came out of all of them.
#[derive(Debug)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// Whether the host is fit.
    pub fn ok(&self) -> bool {
        self.findings.iter().all(|finding| finding.outcome.is_ok())
    }

    /// One line a check.
    pub fn to_text(&self, colours: bool) -> String {
        let paint = |colour: &str, word: &str| {
            if colours { format!("\u{1b}[{colour}m{word}\u{1b}[0m") } else { word.to_owned() }
        };
        let mut text = String::new();
        for Finding { subject, outcome } in &self.findings {
            let (mark, words) = match outcome {
                Ok(words) => (paint("32", "ok     "), words),
                Err(words) => (paint("31", "missing"), words),
            };
            text.push_str(&format!("{mark}  {subject:<9} {words}\n"));
        }
        text
    }

    /// The same for machines.
    pub fn to_json(&self) -> serde_json::Value {
        let findings: Vec<_> = self
            .findings
            .iter()
            .map(|Finding { subject, outcome }| {
                let (Ok(words) | Err(words)) = outcome;
                json!({"check": subject, "ok": outcome.is_ok(), "message": words})
            })
            .collect();
        json!({"ok": self.ok(), "checks": findings})
    }
}

/// Looks at everything.
pub fn run(subject: &Subject<'_>) -> Report {
    let shown = |found: &Result<PathBuf, String>| {
        found.as_ref().map(|path| path.display().to_string()).map_err(Clone::clone)
    };
    let findings = vec![
        Finding { subject: "KVM", outcome: kvm() },
        Finding { subject: "kernel", outcome: shown(&subject.kernel) },
        Finding { subject: "agent", outcome: shown(&subject.agent) },
        Finding { subject: "cgroups", outcome: cgroups(Path::new("/sys/fs/cgroup")) },
        Finding { subject: "network", outcome: network() },
        Finding { subject: "space", outcome: space(subject.state_root) },
    ];
    Report { findings }
}

fn kvm() -> Result<String, String> {
    let support = rvm_vmm::host_support().map_err(|error| error.to_string())?;
    Ok(format!("/dev/kvm works, {:?}, up to {} vCPUs a microVM", support.virtualization, support.max_vcpus))
}

fn cgroups(root: &Path) -> Result<String, String> {
    if let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) {
        let lacking: Vec<_> = ["cpu", "memory"]
            .into_iter()
            .filter(|wanted| !controllers.split_whitespace().any(|controller| controller == *wanted))
            .collect();
        return if lacking.is_empty() {
            Ok("version 2".to_owned())
        } else {
            Err(format!(
                "the controllers {} are not available: enable them on the kernel's command line",
                lacking.join(", ")
            ))
        };
    }
    if root.join("memory").is_dir() && root.join("cpu").is_dir() {
        return Ok("version 1".to_owned());
    }
    Err(format!("no control groups at {}: mount them (mount -t cgroup2 none {0})", root.display()))
}

/// As root by trying it, which also loads the modules; otherwise by what the kernel says it has.
fn network() -> Result<String, String> {
    if nix::unistd::geteuid().is_root() {
        return match crate::network::probe() {
            Ok(()) => Ok("taps and traffic control work".to_owned()),
            Err(error) => Err(format!("{error} (containers without a network work all the same)")),
        };
    }
    let lacking: Vec<_> = NETWORK_MODULES.into_iter().filter(|module| !has_module(module)).collect();
    if lacking.is_empty() {
        Ok(NETWORK_MODULES.join(", "))
    } else {
        Err(format!(
            "run `modprobe -a {}` (containers without a network work all the same)",
            lacking.join(" ")
        ))
    }
}

/// Whether a module is loaded, built in, or there to be loaded by the kernel when it is first used.
fn has_module(module: &str) -> bool {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let listed = |list: &str| {
        let text = fs::read_to_string(format!("/lib/modules/{release}/{list}")).unwrap_or_default();
        lists_module(&text, module)
    };
    Path::new("/sys/module").join(module).exists() || listed("modules.builtin") || listed("modules.dep")
}

/// Whether a line of `modules.builtin` or `modules.dep` begins with the module's file, compressed or not.
fn lists_module(text: &str, module: &str) -> bool {
    text.lines().any(|line| {
        let path = line.split([':', ' ']).next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split('.').next().is_some_and(|name| name.replace('-', "_") == module)
    })
}

fn space(folder: &Path) -> Result<String, String> {
    // The folder itself may not exist yet; what counts is the file system that will hold it.
    let existing = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let status =
        statvfs(existing).map_err(|error| format!("{} cannot be examined: {error}", existing.display()))?;
    let free = status.blocks_available() as u64 * status.fragment_size() as u64;
    let shown = format!("{} MiB free for {}", free >> 20, folder.display());
    if free >= STATE_SPACE {
        Ok(shown)
    } else {
        Err(format!("{shown}: make room, or name another folder with --root"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(root: &Path) -> Subject<'_> {
        Subject {
            state_root: root,
            kernel: Err("no kernel image: build one".into()),
            agent: Ok("/x/agent".into()),
        }
    }

    #[test]
    fn what_is_missing_makes_the_host_unfit_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let report = run(&subject(folder.path()));
        assert!(!report.ok());
        let text = report.to_text(false);
        assert_eq!(text.lines().count(), 6);
        assert!(text.contains("missing  kernel    no kernel image: build one"), "{text}");
        assert!(text.contains("ok       agent     /x/agent"), "{text}");
        assert!(!text.contains('\u{1b}'));
        assert!(report.to_text(true).contains('\u{1b}'));
        assert_eq!(report.to_json()["ok"], false);
        assert_eq!(report.to_json()["checks"].as_array().unwrap().len(), 6);
    }

    #[test]
    fn space_is_looked_for_where_the_folder_will_be() {
        let folder = tempfile::tempdir().unwrap();
        let words = space(&folder.path().join("not/yet/there")).unwrap_or_else(|words| words);
        assert!(words.contains("MiB free"), "{words}");
    }

    #[test]
    fn control_groups_of_both_versions_are_known() {
        let folder = tempfile::tempdir().unwrap();
        assert!(cgroups(folder.path()).unwrap_err().contains("mount"));
        fs::create_dir(folder.path().join("memory")).unwrap();
        fs::create_dir(folder.path().join("cpu")).unwrap();
        assert_eq!(cgroups(folder.path()).unwrap(), "version 1");
        fs::write(folder.path().join("cgroup.controllers"), "cpuset cpu io memory\n").unwrap();
        assert_eq!(cgroups(folder.path()).unwrap(), "version 2");
        fs::write(folder.path().join("cgroup.controllers"), "cpuset io memory\n").unwrap();
        assert!(cgroups(folder.path()).unwrap_err().contains("cpu"));
    }

    #[test]
    fn modules_are_found_by_their_file() {
        let dep = "kernel/net/sched/act_mirred.ko.xz: kernel/x.ko\nkernel/net/cls-u32.ko:\n";
        assert!(lists_module(dep, "act_mirred") && lists_module(dep, "cls_u32"));
        assert!(!lists_module(dep, "x"));
    }
}
