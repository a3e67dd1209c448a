//! Measures what one command costs: wall time, CPU time, peak memory, and the seconds it reports
//! itself.
//!
//! Each command runs below a process of its own (`xtask measure`), because the kernel keeps the
//! peak memory of children only as the largest of all of them.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Cost of one run.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Cost {
    /// From start to end.
    pub(crate) wall_s: f64,
    /// What the command says it took ("Run completed in … seconds"), else wall time.
    pub(crate) reported_s: f64,
    /// User and system time.
    pub(crate) cpu_s: f64,
    /// Largest resident set.
    pub(crate) peak_kib: i64,
}

/// Runs `command` (words) in `dir` and returns its cost.
pub(crate) fn measure(command: &[String], dir: &Path) -> Result<Cost, String> {
    let report = dir.join("measure.json");
    let xtask = std::env::current_exe().map_err(|e| e.to_string())?;
    let output = Command::new(xtask)
        .arg("measure")
        .arg(&report)
        .arg("--")
        .args(command)
        .current_dir(dir)
        .output()
        .map_err(|e| format!("cannot measure: {e}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(why.trim().trim_start_matches("xtask: ").to_owned());
    }
    let text = std::fs::read_to_string(&report).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

/// The other side: runs the command, then writes the cost of all children (there was one).
pub(crate) fn run_child(report: &str, command: &[String]) -> Result<(), String> {
    let start = Instant::now();
    let output = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {}: {e}", command[0]))?;
    let wall_s = start.elapsed().as_secs_f64();
    if !output.status.success() {
        return Err(failure(command, &output));
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(|e| e.to_string())?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    let text = String::from_utf8_lossy(&output.stdout);
    let reported_s = reported_seconds(&text).unwrap_or(wall_s);
    #[expect(clippy::cast_precision_loss, reason = "microseconds of a bench fit a double")]
    let cost = Cost { wall_s, reported_s, cpu_s: micros as f64 / 1e6, peak_kib: usage.max_rss() };
    let json = serde_json::to_string(&cost).map_err(|e| e.to_string())?;
    std::fs::write(report, json).map_err(|e| format!("{report}: {e}"))
}

/// Command, exit status or signal, and what it wrote to standard error.
fn failure(command: &[String], output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    format!("'{}' ended with {}: {}", command.join(" "), output.status, errors.trim())
}

/// From "Run completed in 1.234 seconds."
fn reported_seconds(text: &str) -> Option<f64> {
    let rest = text.split("completed in ").nth(1)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn seconds_are_read_from_the_report() {
        assert_eq!(super::reported_seconds("x\nRun completed in 1.250 seconds.\n"), Some(1.25));
        assert_eq!(super::reported_seconds("nothing"), None);
    }

    #[test]
    fn failures_name_the_exit_status_or_the_signal() {
        for (script, wanted) in [
            ("echo no >&2; exit 3", "ended with exit status: 3: no"),
            ("kill -9 $$", "ended with signal: 9 (SIGKILL): "),
        ] {
            let command = ["sh", "-c", script].map(str::to_owned);
            let output = super::Command::new("sh").args(&command[1..]).output().unwrap();
            let text = super::failure(&command, &output);
            assert_eq!(text, format!("'sh -c {script}' {wanted}"));
        }
    }
}
