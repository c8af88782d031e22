//! `state`, `list`, `ps`, `features`, `spec`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::lifecycle::IdArgument;
use super::{Context, pretty, print};
use crate::bundle::CONFIG;
use crate::container::{Container, ContainerError, StateReport};
use crate::control::{Answer, Command, ControlError};
use crate::error::Error;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

impl Format {
    /// Prints what was found: as a table that is made of it, or as it is.
    pub(super) fn print<T: Serialize + ?Sized>(
        self,
        found: &T,
        table: impl FnOnce(&T) -> String,
    ) -> Result<(), Error> {
        match self {
            Format::Json => print(&pretty(found)?),
            Format::Table => print(&table(found)),
        }
        Ok(())
    }
}

/// Prints a line for each.
pub(super) fn print_lines<'a>(names: impl IntoIterator<Item = &'a str>) {
    print(&names.into_iter().map(|name| format!("{name}\n")).collect::<String>());
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    /// How to show them
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
    /// IDs alone
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(super) struct PsArguments {
    /// Table: the container's processes as it sees them. JSON: the process ids on the host
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
    /// The container's ID
    #[arg(value_name = "ID")]
    id: String,
    /// Options of ps, accepted for compatibility, without effect
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    options: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct SpecArguments {
    /// The directory to write to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Map the container's root to the calling user
    #[arg(long)]
    rootless: bool,
}

pub(super) fn state(context: &Context, arguments: &IdArgument) -> Result<(), Error> {
    let container = Container::open(&context.root, &arguments.id)?;
    print(&pretty(&container.report())?);
    Ok(())
}

pub(super) fn list(context: &Context, arguments: &ListArguments) -> Result<(), Error> {
    let containers = Container::list(&context.root)
        .map_err(Error::system(format!("cannot list {}", context.root.display())))?;
    let reports: Vec<_> = containers.iter().map(Container::report).collect();
    if arguments.quiet {
        print_lines(reports.iter().map(|report| report.id.as_str()));
        return Ok(());
    }
    arguments.format.print(reports.as_slice(), list_table)
}

fn list_table(reports: &[StateReport]) -> String {
    let mut table = new_table(&["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    for report in reports {
        table.add_row([
            report.id.clone(),
            report.pid.to_string(),
            report.status.to_string(),
            report.bundle.display().to_string(),
            report.created.to_string(),
            report.owner.clone(),
        ]);
    }
    text(&table)
}

pub(super) fn ps(context: &Context, arguments: &PsArguments) -> Result<(), Error> {
    let container = Container::open(&context.root, &arguments.id)?;
    if !container.status().has_machine() {
        return Err(ContainerError::NotRunning.into());
    }
    match arguments.format {
        Format::Json => print(&format!("{}\n", serde_json::json!(host_processes(&container)?))),
        Format::Table => print(&guest_processes(&container)?),
    }
    Ok(())
}

/// The monitor and the stubs of `exec`, which share a cgroup of their own.
pub(super) fn host_processes(container: &Container) -> Result<Vec<u32>, Error> {
    let monitor = container.monitor()?.pid.cast_unsigned();
    let mut pids = match &container.record.cgroup {
        Some(cgroup) => cgroup.pids()?.into_iter().filter(|pid| has_command_line(*pid)).collect(),
        None => Vec::new(),
    };
    if !pids.contains(&monitor) {
        pids.insert(0, monitor);
    }
    Ok(pids)
}

/// KVM starts kernel threads in the cgroup of its user; they have none.
fn has_command_line(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

fn guest_processes(container: &Container) -> Result<String, Error> {
    let connection = container.connect()?;
    let answer = connection.ask(&Command::Processes, &[])?.message;
    let Answer::Processes(processes) = answer else { return Err(ControlError::Unexpected.into()) };
    let mut table = new_table(&["UID", "PID", "PPID", "CMD"]);
    for process in processes {
        table.add_row([
            process.user.to_string(),
            process.pid.to_string(),
            process.parent.to_string(),
            process.command,
        ]);
    }
    Ok(text(&table))
}

pub(super) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

pub(super) fn text(table: &Table) -> String {
    let lines = table.lines().map(|line| format!("{}\n", line.trim()));
    lines.collect()
}

pub(super) fn features() -> Result<(), Error> {
    print(&pretty(&crate::features::features())?);
    Ok(())
}

pub(super) fn spec(arguments: &SpecArguments) -> Result<(), Error> {
    let path = arguments.bundle.join(CONFIG);
    let text = pretty(&crate::spec::default_spec(arguments.rootless))?;
    // A file that is there may have cost somebody work.
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(Error::system(format!("cannot write {}", path.display())))
}
