//! Progress of long work: a bar or a spinner on a terminal, plain lines where there is none (CI logs).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One piece of work that takes a while. It ends with [`Progress::finish`]; dropped before, it counts as failed.
pub struct Progress {
    title: String,
    started: Instant,
    bar: Option<ProgressBar>,
    total: u64,
    position: u64,
    reported_quarter: u64,
    finished: bool,
}

impl Progress {
    /// Work whose length is not known.
    pub fn spinner(title: &str) -> Self {
        Self::new(title, 0, "{spinner} {prefix} [{elapsed}] {wide_msg:.dim}")
    }

    /// Work of `total` steps.
    pub fn bar(title: &str, total: u64) -> Self {
        Self::new(title, total, "{spinner} {prefix} [{elapsed}] {bar:30} {percent:>3}% {wide_msg:.dim}")
    }

    fn new(title: &str, total: u64, template: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total).with_style(style).with_prefix(title.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{title} ...");
        }
        let title = title.to_owned();
        Self { title, started: Instant::now(), bar, total, position: 0, reported_quarter: 0, finished: false }
    }

    /// What is being done right now; shown on terminals only.
    pub fn note(&self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.trim().to_owned());
        }
    }

    /// `position` steps are done; more than the total, or fewer than before, are ignored.
    pub fn set(&mut self, position: u64) {
        self.position = self.position.max(position.min(self.total));
        if let Some(bar) = &self.bar {
            bar.set_position(self.position);
        } else if let Some(quarter) = (self.position * 4).checked_div(self.total)
            && quarter > self.reported_quarter
            && quarter < 4
        {
            self.reported_quarter = quarter;
            eprintln!("{} ... {}%", self.title, quarter * 25);
        }
    }

    /// One step more is done.
    pub fn step(&mut self) {
        self.set(self.position + 1);
    }

    /// All is done; leaves one line with the time it took.
    pub fn finish(mut self) {
        self.end("done");
    }

    fn end(&mut self, how: &str) {
        self.finished = true;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        eprintln!("{}: {how} in {:.1} s", self.title, self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.finished {
            self.end("failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_never_pass_the_total_and_never_go_back() {
        let mut progress = Progress::bar("work", 3);
        progress.set(2);
        progress.set(1);
        assert_eq!(progress.position, 2);
        progress.step();
        progress.step();
        assert_eq!(progress.position, 3);
        progress.finish();
    }
}
