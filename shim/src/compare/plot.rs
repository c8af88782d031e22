//! Drawings for the report: plain SVG, whose colours are those of the page around it.

use std::fmt::Write as _;

use super::statistics::{Sample, Summary};
use super::table::number;

/// Width of a drawing, and where its bars begin and end; in pixels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 770.0;
/// Height of a row.
const ROW: f64 = 44.0;
/// Below the rows: numbers.
const FOOT: f64 = 30.0;
/// How many shades of phases there are before they begin again.
pub const SHADES: usize = 8;

/// One thing's row: its name, and what is drawn for it.
pub struct Row<T> {
    /// The name at the left.
    pub name: String,
    /// What is drawn.
    pub value: T,
}

/// A part of a stacked bar.
pub struct Part {
    /// What is shown when it is pointed at.
    pub title: String,
    /// Its length.
    pub length: f64,
    /// Which of the shades it has.
    pub shade: usize,
}

/// Text as it may stand in HTML.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// Every measurement as a dot, the median as a line, and around it a box where it lies in 95 of 100 cases.
pub fn distributions(title: &str, rows: &[Row<Sample>]) -> String {
    let most = rows
        .iter()
        .filter_map(|row| row.value.values().last())
        .fold(0.0, |most: f64, value| most.max(*value));
    let axis = Axis::to(most);
    drawing(title, "ms", &axis, rows, |svg, axis, middle, sample| {
        let Some(Summary { median, from, to, .. }) = sample.summary() else { return };
        let (from, to) = (axis.place(from), axis.place(to));
        let _ = write!(
            svg,
            r#"<rect class="box" x="{from:.1}" y="{:.1}" width="{:.1}" height="22" rx="3"/>"#,
            middle - 11.0,
            (to - from).max(2.0)
        );
        for (index, value) in sample.values().iter().enumerate() {
            // Beside one another, so that equal ones are seen.
            let y = middle + (index % 5) as f64 * 3.0 - 6.0;
            let _ =
                write!(svg, r#"<circle class="dot" cx="{:.1}" cy="{y:.1}" r="2.2"/>"#, axis.place(*value));
        }
        let x = axis.place(median);
        let _ = write!(
            svg,
            r#"<line class="median" x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{:.1}"/><text class="value" x="{:.1}" y="{:.1}">{}</text>"#,
            middle - 14.0,
            middle + 14.0,
            to.max(axis.place(sample.values().last().copied().unwrap_or(median))) + 8.0,
            middle + 4.0,
            number(median)
        );
    })
}

/// Bars of parts, one after the other.
pub fn stacks(title: &str, unit: &str, rows: &[Row<Vec<Part>>]) -> String {
    let length = |parts: &[Part]| parts.iter().map(|part| part.length).sum::<f64>();
    let axis = Axis::to(rows.iter().map(|row| length(&row.value)).fold(0.0, f64::max));
    drawing(title, unit, &axis, rows, |svg, axis, middle, parts| {
        let mut begin = 0.0;
        for part in parts {
            let (from, to) = (axis.place(begin), axis.place(begin + part.length));
            let _ = write!(
                svg,
                r#"<rect class="shade{}" x="{from:.1}" y="{:.1}" width="{:.1}" height="22"><title>{}: {} {unit}</title></rect>"#,
                part.shade % SHADES,
                middle - 11.0,
                (to - from).max(0.5),
                escape(&part.title),
                number(part.length)
            );
            begin += part.length;
        }
        let _ = write!(
            svg,
            r#"<text class="value" x="{:.1}" y="{:.1}">{}</text>"#,
            axis.place(begin) + 8.0,
            middle + 4.0,
            number(begin)
        );
    })
}

fn drawing<T>(
    title: &str,
    unit: &str,
    axis: &Axis,
    rows: &[Row<T>],
    draw: impl Fn(&mut String, &Axis, f64, &T),
) -> String {
    let height = rows.len() as f64 * ROW + FOOT;
    let mut svg =
        format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#, escape(title));
    for tick in axis.ticks() {
        let x = axis.place(tick);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="0" y2="{:.1}"/><text class="tick" x="{x:.1}" y="{:.1}">{tick}</text>"#,
            height - FOOT,
            height - FOOT + 18.0
        );
    }
    let _ = write!(
        svg,
        r#"<text class="tick" x="{:.1}" y="{:.1}">{unit}</text>"#,
        WIDTH - 20.0,
        height - FOOT + 18.0
    );
    for (index, row) in rows.iter().enumerate() {
        let middle = index as f64 * ROW + ROW / 2.0;
        let _ = write!(
            svg,
            r#"<text class="name" x="{:.1}" y="{:.1}">{}</text>"#,
            LEFT - 12.0,
            middle + 4.0,
            escape(&row.name)
        );
        draw(&mut svg, axis, middle, &row.value);
    }
    svg + "</svg>\n"
}

/// From nothing to a round number.
struct Axis {
    end: f64,
    step: f64,
}

impl Axis {
    fn to(most: f64) -> Axis {
        let most = if most > 0.0 { most } else { 1.0 };
        let power = 10_f64.powf((most / 5.0).log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| step * 5.0 >= most);
        let step = step.unwrap_or(power * 10.0);
        Axis { end: (most / step).ceil() * step, step }
    }

    fn place(&self, value: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * value / self.end
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (end, step) = (self.end, self.step);
        // Not by adding up, which would gather errors.
        (0..=(end / step).round() as u32).map(move |count| (f64::from(count) * step * 1e6).round() / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        let ticks = |most| Axis::to(most).ticks().collect::<Vec<_>>();
        assert_eq!(ticks(487.0), [0.0, 100.0, 200.0, 300.0, 400.0, 500.0]);
        assert_eq!(ticks(0.9), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert_eq!(ticks(0.0).len(), 6);
    }

    #[test]
    fn names_cannot_break_out() {
        let rows = [Row { name: "<script>\"&".into(), value: Sample::new([1.0, 2.0]) }];
        let svg = distributions("a \"title\"", &rows);
        assert!(svg.contains("&lt;script&gt;&quot;&amp;") && !svg.contains("<script"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn parts_follow_one_another() {
        let part = |length| Part { title: "t".into(), length, shade: 9 };
        let svg = stacks("", "ms", &[Row { name: "x".into(), value: vec![part(40.0), part(60.0)] }]);
        let middle = LEFT + (RIGHT - LEFT) * 0.4;
        assert!(svg.contains(&format!(r#"class="shade1" x="{middle:.1}""#)), "{svg}");
    }
}
