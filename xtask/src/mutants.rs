//! Runs cargo-mutants on the files that decide write order, lifetime and permissions: a test must
//! fail for each mutant.
//!
//! `xtask/mutants.toml` names the files, the tests and the accepted survivors. cargo-mutants
//! changes a copy of the sources, never the working tree.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::outcome::Outcome;
use crate::run::{cargo, root, say, target_dir};

#[derive(Deserialize)]
struct Mutants {
    group: Vec<Group>,
    #[serde(default)]
    accepted: Vec<Accepted>,
}

/// Files of one crate and the tests that watch over them.
#[derive(Deserialize)]
struct Group {
    #[serde(rename = "crate")]
    package: String,
    files: Vec<String>,
    /// What follows `cargo test`.
    tests: Vec<String>,
}

/// A survivor that no test can notice.
#[derive(Deserialize)]
struct Accepted {
    file: String,
    mutant: String,
    reason: String,
}

/// Mutates every group; a survivor that is not accepted is a failure.
pub(crate) fn mutants() -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    let wanted = load()?;
    if !is_installed() {
        outcome.skip("cargo-mutants is not installed");
        return Ok(outcome);
    }
    for group in &wanted.group {
        let survivors = survivors_of(group)?;
        classify(group, &survivors, &wanted.accepted, &mut outcome);
    }
    Ok(outcome)
}

/// Reads the list. An entry without a reason is an error.
fn load() -> Result<Mutants, String> {
    let path = root().join("xtask/mutants.toml");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    parse(&text).map_err(|e| format!("{}: {e}", path.display()))
}

fn parse(text: &str) -> Result<Mutants, String> {
    let wanted: Mutants = toml::from_str(text).map_err(|e| e.to_string())?;
    match wanted.accepted.iter().find(|accepted| accepted.reason.trim().is_empty()) {
        Some(bare) => Err(format!("'{}' is accepted without a reason", bare.mutant)),
        None => Ok(wanted),
    }
}

fn is_installed() -> bool {
    let mut ask = cargo();
    ask.args(["mutants", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    ask.status().is_ok_and(|status| status.success())
}

/// Runs cargo-mutants on one group. The survivors as `file: change`, without line numbers, which
/// move.
fn survivors_of(group: &Group) -> Result<BTreeSet<String>, String> {
    let out = target_dir().join("xtask").join(format!("mutants-{}", group.package));
    fs::create_dir_all(&out).map_err(|e| format!("cannot make {}: {e}", out.display()))?;
    let mut command = command(group);
    command.arg("--output").arg(&out).arg("--").args(&group.tests);
    let status = command.status().map_err(|e| format!("cannot run cargo mutants: {e}"))?;
    let out = out.join("mutants.out");
    match status.code() {
        // All caught; some survived; some never ended, which is noticed too.
        Some(0 | 2 | 3) => {}
        code => {
            let code = code.map_or("a signal".to_owned(), |code| code.to_string());
            return Err(format!("cargo mutants ended with {code}; see {}", out.display()));
        }
    }
    let missed = out.join("missed.txt");
    let text = fs::read_to_string(&missed).map_err(|e| format!("{}: {e}", missed.display()))?;
    text.lines().filter(|line| !line.trim().is_empty()).map(without_place).collect()
}

fn command(group: &Group) -> Command {
    let mut command = cargo();
    command
        .args(["mutants", "--no-shuffle", "--colors", "never", "--package", &group.package])
        .args(group.files.iter().flat_map(|file| ["--file", file]))
        .env("CARGO_TARGET_DIR", target_dir().join("mutants"));
    command
}

/// `file:line:column: change` as `file: change`.
fn without_place(line: &str) -> Result<String, String> {
    let parts: Vec<&str> = line.splitn(4, ':').collect();
    match parts[..] {
        [file, line, column, change]
            if line.parse::<u32>().is_ok() && column.parse::<u32>().is_ok() =>
        {
            Ok(format!("{file}: {}", change.trim()))
        }
        _ => Err(format!("cargo mutants printed a survivor in an unknown form: {line}")),
    }
}

/// Counts the group as one test that passed, or each new survivor as one that failed.
fn classify(
    group: &Group,
    survivors: &BTreeSet<String>,
    accepted: &[Accepted],
    outcome: &mut Outcome,
) {
    let known = |survivor: &&String| {
        accepted.iter().any(|known| format!("{}: {}", known.file, known.mutant) == **survivor)
    };
    let (known, new): (Vec<&String>, Vec<&String>) = survivors.iter().partition(known);
    for survivor in known {
        say(&format!("accepted survivor: {survivor}"));
    }
    if new.is_empty() {
        outcome.passed += 1;
    }
    for survivor in new {
        outcome.fail(&format!("mutant of {} survives: {survivor}", group.package));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound_and_its_files_exist() {
        let wanted = load().expect("it is committed");
        assert!(!wanted.group.is_empty());
        for file in wanted.group.iter().flat_map(|group| &group.files) {
            let (dir, name) = file.rsplit_once('/').expect("a path inside the workspace");
            let exists = if name == "*.rs" {
                root().join(dir).is_dir()
            } else {
                root().join(file).is_file()
            };
            assert!(exists, "{file}");
        }
        let bare = "[[group]]\ncrate='a'\nfiles=[]\ntests=[]\n[[accepted]]\nfile='f'\nmutant='m'\nreason=' '";
        assert!(parse(bare).is_err_and(|why| why.contains("without a reason")));
    }

    #[test]
    fn a_new_survivor_fails_and_an_accepted_one_does_not() {
        let text = "[[group]]\ncrate='a'\nfiles=['f']\ntests=[]\n\
                    [[accepted]]\nfile='f'\nmutant='replace a with b in c'\nreason='equivalent'";
        let wanted = parse(text).expect("sound");
        let found = |lines: &[&str]| {
            let lines = lines.iter().map(|line| without_place(line)).collect::<Result<_, _>>();
            let mut outcome = Outcome::default();
            classify(
                &wanted.group[0],
                &lines.expect("known words"),
                &wanted.accepted,
                &mut outcome,
            );
            outcome
        };
        let old = "f:12:9: replace a with b in c";
        assert_eq!(found(&[]).line(), "1 passed, 0 failed, 0 skipped");
        assert_eq!(found(&[old]).line(), "1 passed, 0 failed, 0 skipped");
        let outcome = found(&[old, "f:1:2: replace x -> bool with true"]);
        assert_eq!(outcome.line(), "0 passed, 1 failed, 0 skipped");
        assert!(outcome.failures[0].contains("replace x -> bool with true"));
        assert!(without_place("1 mutant missed").is_err());
    }
}
