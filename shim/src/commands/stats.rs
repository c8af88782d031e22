//! `stats`: what containers cost this host.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::Context;
use super::inspect::{Format, host_processes, new_table, text};
use crate::container::{Container, ContainerError};
use crate::cost::Cost;
use crate::error::Error;

#[derive(Debug, Args)]
pub(super) struct StatsArguments {
    /// How to show them; JSON is in bytes
    #[arg(short, long, value_enum, default_value_t)]
    format: Format,
    /// The containers' IDs; without any, all that run
    #[arg(value_name = "ID")]
    ids: Vec<String>,
}

/// What is shown of a container.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    pid: u32,
    /// In proportional shares.
    total: u64,
    #[serde(flatten)]
    cost: Cost,
}

pub(super) fn stats(context: &Context, arguments: &StatsArguments) -> Result<(), Error> {
    let rows = if arguments.ids.is_empty() {
        let containers = Container::list(&context.root)
            .map_err(Error::system(format!("cannot list {}", context.root.display())))?;
        containers
            .iter()
            .filter(|one| one.status().has_machine())
            .filter_map(unless_it_ended)
            .collect::<Result<Vec<_>, _>>()?
    } else {
        let open = |id: &String| Ok(Container::open(&context.root, id)?);
        let containers = arguments.ids.iter().map(open).collect::<Result<Vec<_>, Error>>()?;
        containers.iter().map(row).collect::<Result<Vec<_>, _>>()?
    };
    arguments.format.print(rows.as_slice(), table)
}

fn row(container: &Container) -> Result<Row, Error> {
    if !container.status().has_machine() {
        return Err(ContainerError::NotRunning.into());
    }
    let pid = container.monitor()?.pid.cast_unsigned();
    let cost = Cost::of(pid, &host_processes(container)?)
        .map_err(Error::system(format!("cannot read the memory of process {pid}")))?;
    Ok(Row { id: container.report().id, pid, total: cost.total(), cost })
}

/// Nothing for a container that ended meanwhile.
fn unless_it_ended(container: &Container) -> Option<Result<Row, Error>> {
    let row = row(container);
    (row.is_ok() || container.status().has_machine()).then_some(row)
}

fn table(rows: &[Row]) -> String {
    let mut table = new_table(&["ID", "PID", "TOTAL", "GUEST", "GUEST, SHARED", "MONITOR", "HELPERS"]);
    let mut sum = Cost::default();
    for Row { id, pid, total, cost } in rows {
        let Cost { monitor, guest_private, guest_shared, helpers } = *cost;
        let mut cells = vec![id.clone(), pid.to_string()];
        cells.extend([*total, guest_private, guest_shared, monitor, helpers].map(mebibytes));
        table.add_row(cells);
        sum += *cost;
    }
    let mut shown = text(&table);
    if rows.len() > 1 {
        let _ = writeln!(shown, "{} containers, {} in all", rows.len(), mebibytes(sum.total()));
    }
    shown
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_adds_up_and_so_do_all() {
        let cost = Cost { monitor: 4 << 20, guest_private: 30 << 20, guest_shared: 1 << 19, helpers: 0 };
        let row = |id: &str| Row { id: id.into(), pid: 7, total: cost.total(), cost };
        let shown = table(&[row("one"), row("two")]);
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines[1].starts_with("one"), "{shown}");
        assert!(lines[1].contains("34.5 MiB") && lines[1].contains("0.5 MiB"), "{shown}");
        assert_eq!(lines[3], "2 containers, 69.0 MiB in all");
        assert_eq!(table(&[row("one")]).lines().count(), 2);
    }

    #[test]
    fn programs_get_bytes() {
        let cost = Cost { monitor: 1, guest_private: 2, guest_shared: 3, helpers: 4 };
        let row = Row { id: "one".into(), pid: 7, total: cost.total(), cost };
        let json = serde_json::to_value(row).unwrap();
        let expected = serde_json::json!({
            "id": "one", "pid": 7, "total": 10, "monitor": 1, "guestPrivate": 2, "guestShared": 3, "helpers": 4,
        });
        assert_eq!(json, expected);
    }
}
