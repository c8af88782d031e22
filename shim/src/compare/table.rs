//! The comparison as a table for a terminal. It needs no colours.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::Comparison;
use super::calls::HostCalls;
use super::measure::{CROWD, Figures, Kernel, KernelOwner};
use super::statistics::{Summary, ranks};

/// The table, and below it what has to be known to read it.
pub fn to_text(comparison: &Comparison) -> String {
    let Comparison { host, subject, rounds, runtimes } = comparison;
    let mut text =
        format!("{subject}; {rounds} rounds; {}, {} × {}\n\n", host.kernel, host.processors, host.processor);
    let starts: Vec<_> = runtimes.iter().map(|figures| figures.start.summary()).collect();
    let execs: Vec<_> = runtimes.iter().map(|figures| figures.exec.summary()).collect();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "",
        "START ms",
        "",
        "#",
        "EXEC ms",
        "",
        "#",
        "MEMORY MiB",
        "KERNEL",
        "SYSTEM CALLS REACH",
        "HOST CALLS",
    ]);
    let (start_ranks, exec_ranks) = (ranks(&starts), ranks(&execs));
    for (index, figures) in runtimes.iter().enumerate() {
        let [start, start_range] = cells(starts[index]);
        let [exec, exec_range] = cells(execs[index]);
        table.add_row([
            figures.name.clone(),
            start,
            start_range,
            place(start_ranks[index]),
            exec,
            exec_range,
            place(exec_ranks[index]),
            figures.memory.map_or_else(missing, mebibytes),
            figures.kernel.as_ref().map_or_else(missing, |kernel| kernel.release.clone()),
            figures.kernel.as_ref().map_or_else(missing, |kernel| reach(kernel).to_owned()),
            figures.calls.as_ref().map_or_else(missing, host_calls),
        ]);
    }
    for column in [1, 3, 4, 6, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text.push('\n');
    for note in notes(comparison) {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// What has to be known to read the figures.
pub(super) fn notes(comparison: &Comparison) -> Vec<String> {
    let mut notes = vec![
        "Each figure is a median; in parentheses, where it lies in 95 of 100 cases. # is the place; those that share one \
         are too close, or too noisy, to be told apart."
            .to_owned(),
        format!("Memory is a container's share (PSS) of the host's, with {CROWD} of them doing nothing."),
    ];
    if let Some(calls) = comparison.runtimes.iter().find_map(|figures| figures.calls) {
        notes.push(format!(
            "Host calls: how many of the {} system calls that a host of this kind has the workload can make itself; in \
             parentheses, how many the process can make that stands between, by thread. What lets one through with some \
             arguments only counts as letting it through.",
            calls.known
        ));
    }
    for (what, samples) in [
        (
            "start",
            comparison
                .runtimes
                .iter()
                .map(|figures| (&figures.name, figures.start.summary()))
                .collect::<Vec<_>>(),
        ),
        ("exec", comparison.runtimes.iter().map(|figures| (&figures.name, figures.exec.summary())).collect()),
    ] {
        notes.extend(ties(what, &samples));
    }
    notes.extend(comparison.runtimes.iter().filter_map(failure));
    notes
}

/// A sentence for each place that several share.
fn ties(what: &str, samples: &[(&String, Option<Summary>)]) -> Vec<String> {
    let ranks = ranks(&samples.iter().map(|(_, summary)| *summary).collect::<Vec<_>>());
    let places = 1..=samples.len();
    let sharing = places.map(|place| {
        let names = samples.iter().zip(&ranks).filter(move |(_, rank)| **rank == Some(place));
        names.map(|((name, _), _)| name.as_str()).collect::<Vec<_>>()
    });
    let shared = sharing.filter(|names| names.len() > 1);
    shared.map(|names| format!("Too close to rank by {what}: {}.", names.join(", "))).collect()
}

fn failure(figures: &Figures) -> Option<String> {
    let words = figures.failure.as_ref()?;
    Some(format!("{} was left out after a failure: {words}", figures.name))
}

/// How far what a container's program asks for gets.
pub(super) fn reach(kernel: &Kernel) -> &'static str {
    match kernel.owner {
        KernelOwner::Host => "the host's kernel",
        KernelOwner::Machine => "its own kernel, in a VM",
        KernelOwner::Program => "a program in the host",
    }
}

/// How many system calls of the host can be made.
pub(super) fn host_calls(calls: &HostCalls) -> String {
    let HostCalls { workload, least, most, .. } = calls;
    match *workload {
        0 if least == most => format!("0 ({most})"),
        0 => format!("0 ({least}..{most})"),
        some => some.to_string(),
    }
}

fn cells(summary: Option<Summary>) -> [String; 2] {
    match summary {
        Some(Summary { median, from, to, .. }) => {
            [number(median), format!("({}..{})", number(from), number(to))]
        }
        None => [missing(), String::new()],
    }
}

fn place(rank: Option<usize>) -> String {
    rank.map_or_else(missing, |rank| rank.to_string())
}

fn missing() -> String {
    "-".to_owned()
}

pub(super) fn number(milliseconds: f64) -> String {
    match milliseconds {
        small if small < 10.0 => format!("{small:.2}"),
        middle if middle < 100.0 => format!("{middle:.1}"),
        large => format!("{large:.0}"),
    }
}

pub(super) fn mebibytes(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        little if little < 0.05 => "<0.1".to_owned(),
        more => format!("{more:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::comparison;

    #[test]
    fn a_line_a_runtime_and_no_colours() {
        let text = to_text(&comparison());
        let line =
            |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
        assert!(line("rvm").contains("110") && line("rvm").contains("its own kernel, in a VM"), "{text}");
        assert!(line("runc").contains("310") && line("runc").contains("20.0"), "{text}");
        assert!(line("rvm").ends_with("0 (35..305)") && line("runc").ends_with("310"), "{text}");
        assert!(text.contains("of the 370 system calls"), "{text}");
        assert!(text.contains("gone was left out after a failure: exit status: 1: <no>"), "{text}");
        assert!(!text.contains('\x1b') && !text.contains("Too close"), "{text}");
    }

    #[test]
    fn what_cannot_be_told_apart_is_said() {
        let mut noisy = comparison();
        noisy.runtimes[1].start = noisy.runtimes[0].start.clone();
        assert!(to_text(&noisy).contains("Too close to rank by start: rvm, runc."));
    }
}
