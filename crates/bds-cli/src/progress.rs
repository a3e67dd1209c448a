//! Shows the progress of a long command.
//!
//! On a terminal a bar with rate and time left, on standard error; otherwise qemu-img's lines on
//! standard output. SIGUSR1 prints one line at once, also without `-p`.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::human_size::human_size;
use crate::printer;
use crate::rates::Rates;

/// Lines are printed when this many percent have passed since the last.
const STEP_PERCENT: f64 = 1.0;

/// Shows progress of one command.
#[derive(Debug)]
pub(crate) struct Progress {
    style: Style,
    line_requested: Arc<AtomicBool>,
    last_percent: f64,
}

#[derive(Debug)]
enum Style {
    Silent,
    Lines,
    Bar(ProgressBar),
}

impl Progress {
    /// `is_wanted`: the user gave -p (and not -q).
    pub(crate) fn new(is_wanted: bool) -> Self {
        Self::with_bar(is_wanted, bar)
    }

    /// As [`Progress::new`], for a job: [`Progress::show_job`] shows it.
    pub(crate) fn of_job(is_wanted: bool) -> Self {
        Self::with_bar(is_wanted, job_bar)
    }

    fn with_bar(is_wanted: bool, bar: fn() -> ProgressBar) -> Self {
        let style = match (is_wanted, io::stderr().is_terminal()) {
            (false, _) => Style::Silent,
            (true, false) => Style::Lines,
            (true, true) => Style::Bar(bar()),
        };
        let line_requested = Arc::new(AtomicBool::new(false));
        // Without the signal a line cannot be requested; nothing else depends on it.
        let _ =
            signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&line_requested));
        Self { style, line_requested, last_percent: -STEP_PERCENT }
    }

    /// `done` of `total` bytes.
    pub(crate) fn show(&mut self, done: u64, total: u64) {
        let percent = percent(done, total);
        match &self.style {
            Style::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Style::Lines if percent >= 100.0 || percent - self.last_percent >= STEP_PERCENT => {
                self.last_percent = percent;
                line(percent);
            }
            _ => {}
        }
        if self.line_requested.swap(false, Ordering::Relaxed)
            && !matches!(self.style, Style::Bar(_))
        {
            line(percent);
        }
    }

    /// As [`Progress::show`], with the rates of a job.
    pub(crate) fn show_job(&mut self, done: u64, total: u64, rates: &Rates) {
        if let Style::Bar(bar) = &self.style {
            bar.set_message(rate_words(rates));
        }
        self.show(done, total);
    }

    /// Shows the end of the work and begins a new line.
    pub(crate) fn finish(self, total: u64) {
        match self.style {
            Style::Silent => {}
            Style::Lines => {
                line(100.0);
                printer::progress("\n");
            }
            Style::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(total);
                bar.finish();
            }
        }
    }

    /// Ends the display of work that failed: the line stays, and a new one begins.
    pub(crate) fn abandon(self) {
        match self.style {
            Style::Silent => {}
            Style::Lines => {
                printer::progress("\n");
            }
            Style::Bar(bar) => bar.abandon(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn percent(done: u64, total: u64) -> f64 {
    if total == 0 { 100.0 } else { (done as f64 / total as f64 * 100.0).min(100.0) }
}

/// Prints a progress line. A failure must not stop the work.
fn line(percent: f64) {
    printer::progress(&format!("    ({percent:.2}/100%)\r"));
}

/// Returns the time left, the time taken, or that the work was stopped.
fn time(is_finished: bool, is_complete: bool, duration: Duration) -> String {
    let seconds = duration.as_secs();
    let clock = format!("{}:{:02}", seconds / 60, seconds % 60);
    match (is_finished, is_complete) {
        (false, _) => format!("{clock} left"),
        (true, true) => format!("in {clock}"),
        (true, false) => "stopped".to_owned(),
    }
}

/// Rate, time left, and how fast a guest undoes what was copied, if one does.
fn rate_words(rates: &Rates) -> String {
    let left = match rates.seconds_left {
        Some(seconds) => format!("{}:{:02} left", seconds / 60, seconds % 60),
        None if rates.copied == 0 => "waiting".to_owned(),
        None => "not converging".to_owned(),
    };
    let dirtied = match rates.dirtied {
        0 => String::new(),
        rate => format!("  dirty {}/s", human_size(rate)),
    };
    format!("{}/s{dirtied}  {left}", human_size(rates.copied))
}

/// As [`bar`], with the rates as a message.
fn job_bar() -> ProgressBar {
    let template = "{wide_bar} {percent:>3}%  {bytes} of {total_bytes}  {msg}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)).with_style(style)
}

fn bar() -> ProgressBar {
    // The bar takes what the rest leaves of the line, so that no terminal wraps it.
    let template =
        "{wide_bar} {percent:>3}%  {bytes} of {total_bytes}  {binary_bytes_per_sec}  {left}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("left", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&time(
                state.is_finished(),
                state.pos() >= state.len().unwrap_or(0),
                if state.is_finished() { state.elapsed() } else { state.eta() },
            ));
        })
        .progress_chars("=> ");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_bar_shows_no_time_left() {
        let time =
            |is_finished, is_complete| time(is_finished, is_complete, Duration::from_secs(65));
        assert_eq!(time(false, false), "1:05 left");
        assert_eq!(time(true, true), "in 1:05");
        assert_eq!(time(true, false), "stopped");
    }

    #[test]
    fn the_bar_fits_a_line_of_eighty_columns() {
        let rates = Rates { copied: 123 << 20, dirtied: 99 << 20, seconds_left: Some(754) };
        for (bar, words) in [(bar(), "left"), (job_bar(), "123 MiB/s  dirty 99 MiB/s  12:34 left")]
        {
            let terminal = indicatif::InMemoryTerm::new(5, 80);
            let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
            bar.set_draw_target(target);
            bar.set_length(1023 << 30);
            bar.set_position(1000 << 30);
            bar.set_message(rate_words(&rates));
            bar.tick();
            let shown = terminal.contents();
            assert_eq!(shown.lines().count(), 1, "{shown}");
            assert!(shown.contains("98%") && shown.contains(words), "{shown}");
        }
    }

    #[test]
    fn a_job_that_does_not_get_closer_to_its_end_says_so() {
        let rates = |copied, dirtied| Rates { copied, dirtied, seconds_left: None };
        assert_eq!(rate_words(&rates(0, 0)), "0 B/s  waiting");
        assert_eq!(rate_words(&rates(1024, 2048)), "1 KiB/s  dirty 2 KiB/s  not converging");
    }
}
