//! Runs `cargo test` commands, counts their tests, and reports the sum.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use crate::outcome::{Counter, Outcome};
use crate::run::{say, say_error, stream, target_dir};

/// Prints why tests were skipped, which failed, and the sum; fails if one failed or none ran.
pub(crate) fn report(outcome: &Outcome) -> Result<(), String> {
    for (why, count) in &outcome.reasons {
        say(&format!("skipped {count}: {why}"));
    }
    for name in &outcome.failures {
        say(&format!("FAILED  {name}"));
        for line in outcome.last_lines.get(name).into_iter().flatten() {
            say(&format!("        {line}"));
        }
    }
    say(&outcome.line());
    if outcome.failed > 0 {
        return Err(format!("{} failed; full output under {}", outcome.failed, logs().display()));
    }
    if outcome.passed == 0 {
        return Err("no test ran".into());
    }
    Ok(())
}

/// Runs one `cargo test` command, counting and showing how it goes; its full output goes to a log.
pub(crate) fn cargo_test(
    name: &str,
    command: &mut Command,
    rest: &[String],
) -> Result<Outcome, String> {
    counted(name, command, rest, |line| {
        if shown(line) {
            say(line.trim_end());
        }
    })
}

/// The same without progress on standard output.
pub(crate) fn quiet_cargo_test(
    name: &str,
    command: &mut Command,
    rest: &[String],
) -> Result<Outcome, String> {
    counted(name, command, rest, |_| {})
}

fn counted(
    name: &str,
    command: &mut Command,
    rest: &[String],
    each: impl Fn(&str),
) -> Result<Outcome, String> {
    let path = logs().join(format!("{name}.log"));
    fs::create_dir_all(logs()).map_err(|e| format!("cannot make {}: {e}", logs().display()))?;
    let mut log =
        File::create(&path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    command.args(["--", "--show-output"]).args(rest);
    let mut counter = Counter::default();
    let ended_well = stream(command, &mut log, |line| {
        counter.line(line);
        each(line);
    });
    let mut outcome = counter.finish();
    let ended_well = ended_well.map_err(|e| format!("cannot run cargo: {e}"))?;
    if !ended_well && outcome.failed == 0 {
        say_error(&format!(
            "{name}: did not build or was ended by a signal; see {}",
            path.display()
        ));
        outcome.fail(&format!("{name} (see {})", path.display()));
    }
    Ok(outcome)
}

/// Whether a line is shown while the run goes on.
fn shown(line: &str) -> bool {
    let trimmed = line.trim_start();
    trimmed.starts_with("Running ")
        || trimmed.starts_with("Doc-tests ")
        || trimmed.starts_with("test result: ")
        || trimmed.starts_with("error")
        || trimmed.starts_with("panicked at")
        || trimmed.starts_with("thread '")
        || line.ends_with(" ... FAILED")
}

fn logs() -> PathBuf {
    target_dir().join("xtask")
}
