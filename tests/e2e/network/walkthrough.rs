//! The tutorial from end to end, as its page in the docs shows it and `cargo xtask demo walkthrough` runs it.

use std::fs;

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{Outcome, ensure_guest_kernel, eventually, run, shell};

pub const STORIES: &[(&str, Story)] =
    &[("an_api_and_its_database_live_in_microvms", an_api_and_its_database_live_in_microvms)];

const SCRIPT: &str = include_str!("../../walkthrough/script");

/// rvm as the runtime of everything that names none, builds included, until it is dropped.
struct ByDefault {
    configuration: String,
}

const CONFIGURATION: &str = "/etc/docker/daemon.json";

impl ByDefault {
    fn new() -> Result<ByDefault> {
        let default = ByDefault { configuration: fs::read_to_string(CONFIGURATION)? };
        default.name("rvm")?;
        Ok(default)
    }

    fn name(&self, runtime: &str) -> Result<()> {
        let mut changed: serde_json::Value = serde_json::from_str(&self.configuration)?;
        changed["default-runtime"] = runtime.into();
        fs::write(CONFIGURATION, changed.to_string())?;
        shell("kill -HUP $(cat /var/run/docker.pid)")?.expect_code(0)?;
        eventually("the daemon has taken its configuration", || {
            Ok(run("docker", &["info", "-f", "{{.DefaultRuntime}}"])?.text() == runtime)
        })
    }
}

impl Drop for ByDefault {
    fn drop(&mut self) {
        // The daemon keeps what a configuration does not name any more.
        let _ = self.name("runc");
        let _ = fs::write(CONFIGURATION, &self.configuration);
    }
}

fn an_api_and_its_database_live_in_microvms() -> Result<()> {
    let _default = ByDefault::new()?;
    let shown = walk()?.expect_code(0)?.text();
    ensure_guest_kernel(&after(&shown, "$ docker run --rm shop-api cat built-on"))?;
    ensure_guest_kernel(&after(&shown, "$ docker exec api uname -r"))?;
    let items = r#"["tea", "coffee"]"#;
    ensure!(shown.matches(items).count() == 2, "the items are not there before and after: {shown}");
    ensure!(shown.matches("2 received, 0% packet loss").count() == 2, "a ping was lost: {shown}");
    let address = shown.lines().find_map(|line| line.strip_prefix("api ")).unwrap_or_default().to_owned();
    ensure!(
        !address.is_empty() && shown.contains(&format!("inet {address} ")),
        "the guest has not {address}: {shown}"
    );
    ensure!(shown.lines().any(|line| line.starts_with("db ")), "the network does not list both: {shown}");
    Ok(())
}

/// `docker build` of the classic kind: the steps of BuildKit's have a runtime of their own.
fn walk() -> Result<Outcome> {
    run("env", &["DOCKER_BUILDKIT=0", "sh", "-c", SCRIPT])
}

/// The line that follows a command.
fn after(shown: &str, command: &str) -> String {
    let mut lines = shown.lines().skip_while(|line| *line != command);
    lines.nth(1).unwrap_or_default().to_owned()
}
