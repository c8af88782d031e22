//! An application of three services, of which each asks the next, comes up and goes down by one command.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::Story;
use crate::command::{Outcome, docker, eventually, finish, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("an_application_comes_up_and_goes_down", an_application_comes_up_and_goes_down),
    ("services_find_each_other_by_name", services_find_each_other_by_name),
];

/// A page that asks the API, which asks the database; each waits in its turn until the next is there.
const APPLICATION: &str = include_str!("compose.yaml");

/// The application's file and how its services find each other.
struct Application {
    folder: TempDir,
    api: &'static str,
    database: &'static str,
}

impl Application {
    fn new(api: &'static str, database: &'static str) -> Result<Application> {
        let folder = tempfile::Builder::new().prefix("e2e-compose").tempdir_in("/var/tmp")?;
        fs::write(folder.path().join("compose.yaml"), APPLICATION)?;
        Ok(Application { folder, api, database })
    }

    fn compose(&self, arguments: &[&str]) -> Result<Outcome> {
        let mut command = Command::new("docker");
        command.current_dir(self.folder.path()).env("API", self.api).env("DATABASE", self.database);
        finish(
            {
                command.args(["compose", "-p", "e2e"]).args(arguments);
                command
            },
            &[],
        )
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.compose(&["down", "--volumes", "-t", "0"]);
    }
}

fn an_application_comes_up_and_goes_down() -> Result<()> {
    comes_up_and_goes_down(&Application::new("10.81.0.3", "10.81.0.4")?)
}

fn services_find_each_other_by_name() -> Result<()> {
    comes_up_and_goes_down(&Application::new("api", "database")?)
}

fn comes_up_and_goes_down(application: &Application) -> Result<()> {
    application.compose(&["up", "-d"])?.expect_code(0)?;
    let running = application.compose(&["ps", "--services", "--status", "running"])?.expect_code(0)?.text();
    let mut running: Vec<_> = running.lines().collect();
    running.sort_unstable();
    ensure!(running == ["api", "database", "page"], "it runs {running:?}");
    let page = || shell("curl -s -m 60 http://127.0.0.1:18089/cgi-bin/page");
    eventually("the page shows what the database has", || Ok(page()?.text() == "page: api: forty-two"))?;
    // What was stored outlives the service that stored it.
    application
        .compose(&["exec", "-T", "database", "sh", "-c", "echo forty-three >/data/value"])?
        .expect_code(0)?;
    application.compose(&["up", "-d", "--force-recreate", "database"])?.expect_code(0)?;
    eventually(
        "the page shows what the new database has",
        || Ok(page()?.text() == "page: api: forty-three"),
    )?;
    application.compose(&["down", "--volumes", "-t", "60"])?.expect_code(0)?;
    docker(&["ps", "-aq"])?.expect_text("")?;
    let kept = "docker network ls -q -f name=e2e; docker volume ls -q -f name=e2e";
    shell(kept)?.expect_text("")
}
