//! `template create`, `template list`, `template rm`.

use std::time::SystemTime;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

use super::inspect::{Format, new_table, print_lines, text};
use super::local::split_unit;
use super::{Context, print};
use crate::container::shape::{HostSize, Shape};
use crate::error::Error;
use crate::install::Installation;
use crate::template::{self, Key, Listed, Store, TemplateError, builder};

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// Make the template for containers with these limits
    Create(CreateArguments),
    /// List templates
    List(ListArguments),
    /// Remove templates; containers that began with one go on
    Rm(RemoveArguments),
}

#[derive(Debug, Args)]
pub(super) struct CreateArguments {
    /// For containers that are limited to so many processors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cpus: Option<u64>,
    /// For containers that are limited to so much memory, in bytes, or with one of the letters k, m and g
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    /// How to show them
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
    /// Keys alone
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// All of them
    #[arg(short, long, conflicts_with = "keys", required_unless_present = "keys")]
    all: bool,
    /// Which, as `list` shows them
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

pub(super) fn run(context: &Context, command: TemplateCommand) -> Result<(), Error> {
    let store = Store::new(template::folder().ok_or(TemplateError::Off)?);
    match command {
        TemplateCommand::Create(arguments) => create(context, &store, &arguments),
        TemplateCommand::List(arguments) => list(&store, &arguments),
        TemplateCommand::Rm(arguments) => remove(&store, &arguments),
    }
}

fn create(context: &Context, store: &Store, arguments: &CreateArguments) -> Result<(), Error> {
    let installation =
        Installation::open(context.kernel.as_deref()).map_err(|error| Error::Create(error.into()))?;
    let shape = Shape::of_sizes(arguments.cpus, arguments.memory, HostSize::read());
    // One that is being made is waited for. It may be the same.
    let Some(lock) = store.lock(true)? else { return Ok(()) };
    let key = builder::make(store, &lock, installation, shape)?;
    print(&format!("{key}\n"));
    Ok(())
}

fn remove(store: &Store, arguments: &RemoveArguments) -> Result<(), Error> {
    let keys = match arguments.all {
        true => {
            store.remove_boots_but(0)?;
            store.list()?.iter().map(|listed| listed.key).collect()
        }
        false => arguments.keys.iter().map(|text| parse_key(text)).collect::<Result<Vec<_>, _>>()?,
    };
    Ok(keys.into_iter().try_for_each(|key| store.remove(key))?)
}

fn parse_key(text: &str) -> Result<Key, TemplateError> {
    text.parse().map_err(|()| TemplateError::Absent(text.to_owned()))
}

/// A line of the list.
#[derive(Serialize)]
struct Line {
    key: String,
    vcpus: Option<u8>,
    memory: Option<u64>,
    size: u64,
    created: Timestamp,
    used: Timestamp,
}

impl From<&Listed> for Line {
    fn from(listed: &Listed) -> Line {
        let time = |time: SystemTime| Timestamp::try_from(time).unwrap_or_default();
        Line {
            key: listed.key.to_string(),
            vcpus: listed.shape.map(|(vcpus, _)| vcpus),
            memory: listed.shape.map(|(_, memory)| memory),
            size: listed.size,
            created: time(listed.created),
            used: time(listed.used),
        }
    }
}

fn list(store: &Store, arguments: &ListArguments) -> Result<(), Error> {
    let lines: Vec<Line> = store.list()?.iter().map(Line::from).collect();
    if arguments.quiet {
        print_lines(lines.iter().map(|line| line.key.as_str()));
        return Ok(());
    }
    arguments.format.print(lines.as_slice(), table)
}

fn table(lines: &[Line]) -> String {
    let mut table = new_table(&["KEY", "VCPUS", "MEMORY", "ON DISK", "CREATED", "USED"]);
    for line in lines {
        let mebibytes = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
        table.add_row([
            line.key.clone(),
            line.vcpus.map_or_else(|| "unusable".into(), |vcpus| vcpus.to_string()),
            line.memory.map_or_else(String::new, mebibytes),
            mebibytes(line.size),
            line.created.to_string(),
            line.used.to_string(),
        ]);
    }
    text(&table)
}

/// A size as engines take it.
fn parse_size(text: &str) -> Result<u64, String> {
    let (number, shift) = split_unit(text);
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let size =
        number.parse::<u64>().ok().filter(|_| digits).and_then(|number| number.checked_mul(1 << shift));
    size.filter(|size| *size > 0).ok_or_else(|| "it is no size: give bytes, or such as 256m".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_engines() {
        for (text, size) in [("1", 1), ("4k", 4096), ("256m", 256 << 20), ("2G", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(size));
        }
        for text in ["", "m", "0", "-1", "+1", "1.5g", "99999999999g", "1 m", "1mb"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
