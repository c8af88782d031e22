//! Templates: what boots once, and what all the containers that begin with it do not share.

pub mod boot;
pub mod clocks;
pub mod clones;
pub mod code;
pub mod damage;
mod mappings;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, eventually, finish, shell, wait_for};

pub const STORIES: &[(&str, Story)] = &[
    ("the_second_container_does_not_boot", the_second_container_does_not_boot),
    ("a_clone_without_a_network_has_no_name_server", a_clone_without_a_network_has_no_name_server),
    ("a_template_is_made_by_hand", a_template_is_made_by_hand),
    ("many_first_containers_make_one_template", many_first_containers_make_one_template),
    ("a_full_disk_costs_the_template_alone", a_full_disk_costs_the_template_alone),
    ("a_template_in_use_can_be_removed", a_template_in_use_can_be_removed),
    ("each_shape_has_its_own", each_shape_has_its_own),
    ("templates_can_be_switched_off", templates_can_be_switched_off),
    ("a_folder_that_cannot_be_made_is_told", a_folder_that_cannot_be_made_is_told),
];

/// What the timeline says of a machine that boots, and of one that does not.
const BOOTED: &str = "kernel entered";
const RESUMED: &str = "guest resumed";

/// A folder for the templates of one story.
struct Templates {
    folder: TempDir,
}

impl Templates {
    fn new() -> Result<Templates> {
        Ok(Templates { folder: tempfile::Builder::new().prefix("e2e-templates").tempdir()? })
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("rvm");
        command.args(arguments).env("RVM_TEMPLATES", self.store());
        command
    }

    fn rvm(&self, arguments: &[&str]) -> Result<Outcome> {
        finish(self.command(arguments), &[])
    }

    /// Runs a bundle, and returns what came of it with the timeline on standard error.
    fn run(&self, bundle: &Bundle) -> Result<Outcome> {
        self.rvm(&["run", "--timeline", "--bundle", bundle.path(), "story"])?.expect_code(0)
    }

    fn spawn(&self, bundle: &Bundle, id: &str) -> Result<Child> {
        self.spawn_at(bundle.path(), id)
    }

    /// Starts the bundle in a folder.
    fn spawn_at(&self, folder: &str, id: &str) -> Result<Child> {
        use std::os::unix::process::CommandExt;
        use std::process::Stdio;
        let mut command = self.command(&["run", "--bundle", folder, id]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command.spawn().context("rvm could not be started")
    }

    fn keys(&self) -> Result<Vec<String>> {
        let list = self.rvm(&["template", "list", "--quiet"])?.expect_code(0)?.text();
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// Waits until there is a template.
    fn await_one(&self) -> Result<String> {
        eventually("there is a template", || Ok(!self.keys()?.is_empty()))?;
        self.keys()?.pop().context("it is there")
    }

    fn make(&self) -> Result<String> {
        Ok(self.rvm(&["template", "create"])?.expect_code(0)?.text())
    }
}

/// Has a container's machine boot in any case.
fn never_goes_on(config: &mut serde_json::Value) {
    config["annotations"] = json!({ "dev.rvm.template": "off" });
}

fn ensure_says(outcome: &Outcome, words: &str) -> Result<()> {
    let said = outcome.error_text();
    ensure!(said.contains(words), "it does not say {words:?}: {said}");
    Ok(())
}

fn the_second_container_does_not_boot() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["echo", "hello"])?);
    let first = templates.run(&bundle)?;
    ensure_says(&first, BOOTED)?;
    let key = templates.await_one()?;
    for _ in 0..3 {
        let next = templates.run(&bundle)?;
        ensure_says(&next, RESUMED)?;
        ensure!(next.text() == "hello", "it said {:?}", next.text());
    }
    ensure!(templates.keys()? == [key], "no more are made");
    Ok(())
}

/// The guest that is captured listens in the place of Docker's, since most of its clones will have to.
fn a_clone_without_a_network_has_no_name_server() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    let ask = "nc -w 5 127.0.0.11 53 </dev/null 2>&1; nslookup example.com 127.0.0.11 2>&1
               echo a server of its own | nc -l -p 53 & sleep 2; sleep 3 | nc -w 5 127.0.0.11 53; true";
    let clone = templates.run(&Bundle::new(&["sh", "-c", ask])?)?;
    ensure_says(&clone, RESUMED)?;
    let answers = clone.text();
    ensure!(answers.matches("Connection refused").count() == 2, "{answers}");
    ensure!(answers.ends_with("a server of its own"), "{answers}");
    Ok(())
}

fn a_template_is_made_by_hand() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["true"])?);
    ensure!(templates.keys()?.is_empty(), "there is none at first");
    let key = templates.make()?;
    ensure!(templates.make()? == key, "what is there is not made again");
    ensure_says(&templates.run(&bundle)?, RESUMED)?;
    let list = templates.rvm(&["template", "list", "--format", "json"])?.expect_code(0)?.text();
    let list: serde_json::Value = serde_json::from_str(&list)?;
    ensure!(list[0]["key"] == json!(key) && list[0]["memory"].is_u64(), "{list}");
    templates.rvm(&["template", "rm", &key])?.expect_code(0)?;
    ensure!(templates.keys()?.is_empty(), "it is gone");
    templates.rvm(&["template", "rm", &key])?.expect_failure(&["no template", &key])?;
    templates.rvm(&["template", "rm", "../store"])?.expect_failure(&["no template"])?;
    Ok(())
}

fn many_first_containers_make_one_template() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["true"])?);
    let clones = (0..5).map(|number| templates.spawn(&bundle, &format!("story-{number}")));
    for clone in clones.collect::<Result<Vec<_>>>()? {
        let output = clone.wait_with_output()?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
    templates.await_one()?;
    eventually("nobody makes one any more", || Ok(shell("pgrep -f '^rvm template'")?.code != 0))?;
    ensure!(templates.keys()?.len() == 1, "there is one");
    ensure!(!templates.store().join(".unfinished").exists(), "and no half of another");
    Ok(())
}

fn a_full_disk_costs_the_template_alone() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["echo", "hello"])?);
    let store = templates.store();
    let (place, log) = (store.display(), templates.folder.path().join("log"));
    shell(&format!("mkdir -m 700 {place} && mount -t tmpfs -o size=8m,mode=700 none {place}"))?
        .expect_code(0)?;
    let run = |id| {
        let log = log.display().to_string();
        let run = templates.rvm(&["--log", &log, "run", "--bundle", bundle.path(), id]);
        run.and_then(|run| run.expect_text("hello"))
    };
    let told = || Ok::<_, anyhow::Error>(fs::read_to_string(&log)?.matches("no template was made").count());
    let outcome = run("story-1").and_then(|()| {
        eventually("it is told that there is none", || Ok(told()? == 1))?;
        run("story-2")?;
        ensure!(told()? == 1, "it is told once");
        ensure!(templates.keys()?.is_empty() && !store.join(".unfinished").exists(), "nothing is left of it");
        Ok(())
    });
    shell(&format!("umount {place}"))?.expect_code(0)?;
    outcome
}

fn a_template_in_use_can_be_removed() -> Result<()> {
    let templates = Templates::new()?;
    let bundle = Bundle::new(&["sh", "-c", "echo ready; read line; md5sum bin/busybox; nproc"])?;
    templates.make()?;
    let mut clone = templates.spawn(&bundle, "story")?;
    let mut lines = BufReader::new(clone.stdout.take().context("it has a standard output")?).lines();
    ensure!(lines.next().context("it says something")?? == "ready", "the container runs");
    templates.rvm(&["template", "rm", "--all"])?.expect_code(0)?;
    ensure!(fs::read_dir(templates.store())?.all(|entry| entry.is_ok_and(|entry| entry.path().is_file())));
    templates.rvm(&["exec", "story", "true"])?.expect_code(0)?;
    drop(clone.stdin.take());
    ensure!(lines.next().context("it goes on")??.contains("busybox"), "it reads its files");
    let status = wait_for(&mut clone, "the container")?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

fn each_shape_has_its_own() -> Result<()> {
    let templates = Templates::new()?;
    let show = "nproc; grep MemTotal /proc/meminfo; for n in 1 2 3; do (true) & done; wait";
    let plain = Bundle::new(&["sh", "-c", show])?;
    let large = Bundle::new(&["sh", "-c", show])?.edit(|config| {
        config["linux"]["resources"]["cpu"] = json!({ "quota": 300_000, "period": 100_000 });
        config["linux"]["resources"]["memory"] = json!({ "limit": 300 << 20 });
    })?;
    let first = [templates.run(&plain)?, templates.run(&large)?].map(|run| run.text());
    templates.await_one()?;
    templates.rvm(&["template", "create", "--cpus", "3", "--memory", "300m"])?.expect_code(0)?;
    templates.make()?;
    ensure!(templates.keys()?.len() == 2, "there are {:?}", templates.keys()?);
    for (bundle, first) in [(&plain, &first[0]), (&large, &first[1])] {
        let next = templates.run(bundle)?;
        ensure_says(&next, RESUMED)?;
        ensure!(next.text() == *first, "it has {:?}, and the first had {first:?}", next.text());
    }
    ensure!(first[1].starts_with("3\n"), "it has {:?}", first[1]);
    Ok(())
}

fn a_folder_that_cannot_be_made_is_told() -> Result<()> {
    let (templates, bundle) = (Templates::new()?, Bundle::new(&["echo", "hello"])?);
    let mut command = templates.command(&["run", "--timeline", "--bundle", bundle.path(), "story"]);
    command.env("RVM_TEMPLATES", "/proc/e2e-templates");
    let run = finish(command, &[])?;
    ensure_says(&run, BOOTED)?;
    ensure_says(&run, "no template is made, so containers of this shape boot")?;
    run.expect_text("hello")
}

fn templates_can_be_switched_off() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    ensure_says(&templates.run(&Bundle::new(&["true"])?.edit(never_goes_on)?)?, BOOTED)?;
    let bundle = Bundle::new(&["true"])?;
    let mut command = templates.command(&["run", "--timeline", "--bundle", bundle.path(), "story"]);
    command.env("RVM_TEMPLATES", "off");
    ensure_says(&finish(command, &[])?.expect_code(0)?, BOOTED)?;
    let mut command = templates.command(&["template", "create"]);
    command.env("RVM_TEMPLATES", "off");
    finish(command, &[])?.expect_failure(&["switched off"])?;
    Ok(())
}
