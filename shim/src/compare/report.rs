//! The comparison as one page of HTML that needs nothing else: drawings, a table, and how it was measured. It is readable
//! on light and on dark, and without colours: every mark has its number beside it.

use std::fmt::Write as _;

use super::Comparison;
use super::measure::Figures;
use super::plot::{Part, Row, SHADES, distributions, escape, stacks};
use super::statistics::Sample;
use super::table::{host_calls, mebibytes, notes, number, reach};

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #69707a; --grid: #e3e6ea; --page: #ffffff; --accent: #1f6feb; --box: #cfe0fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #98a1ad; --grid: #2c333c; --page: #14181d; --accent: #6cb0ff; --box: #22406a; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.faint, .tick { color: var(--faint); fill: var(--faint); }
svg { width: 100%; height: auto; font-size: 13px; }
.name { text-anchor: end; fill: var(--ink); font-weight: 600; } .tick { text-anchor: middle; font-size: 12px; } .value { fill: var(--ink); }
.grid { stroke: var(--grid); } .box { fill: var(--box); } .dot { fill: var(--accent); opacity: 0.55; } .median { stroke: var(--ink); stroke-width: 2; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: 0.35rem 0.7rem 0.35rem 0; border-bottom: 1px solid var(--grid); }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.35em 0 0.9em; vertical-align: -0.1em; }
@media print { :root { --ink: #000; --page: #fff; } }
";

/// Shades of one hue, so that they differ in lightness and not by colour alone.
const LIGHTNESS: [u8; SHADES] = [30, 62, 42, 74, 36, 68, 50, 80];

/// The page.
pub fn to_html(comparison: &Comparison) -> String {
    let Comparison { host, subject, rounds, runtimes } = comparison;
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Container runtimes compared</title><style>{STYLE}{}</style></head><body>\n",
        shades()
    );
    // Writing to a String cannot fail.
    let _ = write!(
        page,
        "<h1>How long a container takes to start</h1>\n<p class=\"faint\">{}, {rounds} rounds, on Linux {} with {} × {}</p>\n",
        escape(subject),
        escape(&host.kernel),
        host.processors,
        escape(&host.processor)
    );
    section(
        &mut page,
        "From the command to its return",
        &distributions("start", &rows(runtimes, |it| &it.start)),
    );
    section(
        &mut page,
        "A further program in a container that runs",
        &distributions("exec", &rows(runtimes, |it| &it.exec)),
    );
    phases(&mut page, runtimes);
    memory(&mut page, runtimes);
    facts(&mut page, runtimes);
    page.push_str("<h2>How to read it</h2>\n<ul>\n");
    for note in notes(comparison) {
        let _ = writeln!(page, "<li>{}</li>", escape(&note));
    }
    page + "<li>The runtimes took turns, after a start of each that does not count.</li>\n</ul>\n</body></html>\n"
}

fn section(page: &mut String, title: &str, body: &str) {
    let _ = write!(page, "<h2>{title}</h2>\n{body}");
}

fn rows(runtimes: &[Figures], of: impl Fn(&Figures) -> &Sample) -> Vec<Row<Sample>> {
    runtimes.iter().map(|figures| Row { name: figures.name.clone(), value: of(figures).clone() }).collect()
}

fn phases(page: &mut String, runtimes: &[Figures]) {
    let told: Vec<_> = runtimes.iter().filter(|figures| !figures.phases.is_empty()).collect();
    let mut names: Vec<&str> = Vec::new();
    for phase in told.iter().flat_map(|figures| &figures.phases) {
        if !names.contains(&phase.phase.as_str()) {
            names.push(&phase.phase);
        }
    }
    if names.is_empty() {
        return;
    }
    let shade = |name: &str| names.iter().position(|known| *known == name).unwrap_or_default();
    let rows: Vec<_> = told
        .iter()
        .map(|figures| Row {
            name: figures.name.clone(),
            value: figures
                .phases
                .iter()
                .map(|phase| Part {
                    title: phase.phase.clone(),
                    length: phase.took,
                    shade: shade(&phase.phase),
                })
                .collect(),
        })
        .collect();
    section(page, "Where rvm's time goes", &stacks("phases", "ms", &rows));
    page.push_str("<table><tr><th>until</th>");
    for row in &rows {
        let _ = write!(page, "<th class=\"figure\">{} ms</th>", escape(&row.name));
    }
    page.push_str("</tr>\n");
    for (index, name) in names.iter().enumerate() {
        let _ =
            write!(page, "<tr><td><span class=\"key shade{}\"></span>{}</td>", index % SHADES, escape(name));
        for figures in &told {
            let took = figures.phases.iter().find(|phase| phase.phase == *name);
            let took = took.map_or_else(|| "-".to_owned(), |phase| number(phase.took));
            let _ = write!(page, "<td class=\"figure\">{took}</td>");
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn memory(page: &mut String, runtimes: &[Figures]) {
    let weighed = runtimes.iter().filter_map(|figures| Some((figures, figures.memory?)));
    let rows: Vec<_> = weighed
        .map(|(figures, bytes)| Row {
            name: figures.name.clone(),
            value: vec![Part { title: "memory".into(), length: bytes as f64 / f64::from(1 << 20), shade: 2 }],
        })
        .collect();
    if !rows.is_empty() {
        section(page, "Memory of a container that does nothing", &stacks("memory", "MiB", &rows));
    }
}

fn facts(page: &mut String, runtimes: &[Figures]) {
    page.push_str(
        "<h2>All figures</h2>\n<table><tr><th></th><th class=\"figure\">start ms</th><th class=\"figure\">exec ms</th>\
         <th class=\"figure\">memory MiB</th><th>kernel</th><th>system calls reach</th>\
         <th>host calls</th></tr>\n",
    );
    for figures in runtimes {
        let median =
            |sample: &Sample| sample.summary().map_or_else(|| "-".to_owned(), |it| number(it.median));
        let kernel = figures.kernel.as_ref();
        let _ = writeln!(
            page,
            "<tr><th>{}</th><td class=\"figure\">{}</td><td class=\"figure\">{}</td><td class=\"figure\">{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&figures.name),
            median(&figures.start),
            median(&figures.exec),
            figures.memory.map_or_else(|| "-".to_owned(), mebibytes),
            kernel.map_or_else(|| "-".to_owned(), |kernel| escape(&kernel.release)),
            kernel.map_or("-", reach),
            figures.calls.as_ref().map_or_else(|| "-".to_owned(), host_calls)
        );
    }
    page.push_str("</table>\n");
}

fn shades() -> String {
    let rule = |(index, lightness): (usize, &u8)| {
        format!(
            ".shade{index} {{ fill: hsl(214 70% {lightness}%); background: hsl(214 70% {lightness}%); }}\n"
        )
    };
    LIGHTNESS.iter().enumerate().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::testing::comparison;

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let page = to_html(&comparison());
        assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
        assert_eq!(page.matches("<svg").count(), 4);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        for foreign in ["http", "src=", "<script", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.contains("A &amp; B") && page.contains("&lt;no&gt;"));
        assert!(page.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        let mut comparison = comparison();
        for figures in &mut comparison.runtimes {
            figures.phases.clear();
            figures.memory = None;
        }
        assert_eq!(to_html(&comparison).matches("<svg").count(), 2);
    }
}
