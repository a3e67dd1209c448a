//! `cargo xtask matrix`: runs tests for each crate × engine × format × cache mode of
//! `xtask/matrix.toml`, and prints the results as a table.
//!
//! The axes are environment variables that the tests read (`BDS_TEST_ENGINE`, …), so no cell
//! rebuilds anything. A cell passes, fails, or is skipped with a reason; a cell in which no test
//! ran fails.

use std::collections::BTreeMap;
use std::fs;

use serde::Deserialize;

use crate::cargo_test;
use crate::outcome::Outcome;
use crate::run::{cargo, root, say};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Matrix {
    group: Vec<Group>,
    #[serde(default)]
    skip: Vec<Skip>,
}

/// Cells of one test binary.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    #[serde(rename = "crate")]
    package: String,
    test: String,
    filter: String,
    engine: Vec<String>,
    format: Vec<String>,
    cache: Vec<String>,
}

/// Cells that do not run. An axis left out matches every value.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    #[serde(rename = "crate")]
    package: Option<String>,
    engine: Option<String>,
    format: Option<String>,
    cache: Option<String>,
    reason: String,
}

/// One cell of the table.
struct Cell<'a> {
    group: &'a Group,
    engine: &'a str,
    format: &'a str,
    cache: &'a str,
}

/// Runs the chosen cells and prints the closing line.
pub(crate) fn matrix(only: &[(String, String)], list: bool) -> Result<(), String> {
    if list {
        let matrix = load()?;
        for cell in all_cells(&matrix).filter(|c| c.is_chosen(only)) {
            let skip = matrix.skip.iter().find(|s| s.matches(&cell)).map_or("", |s| &s.reason);
            say(&format!(
                "{:12} {:6} {:11} {:13} {skip}",
                cell.group.package, cell.engine, cell.format, cell.cache
            ));
        }
        return Ok(());
    }
    let outcome = cells(only)?;
    cargo_test::report(&outcome)
}

/// Runs the chosen cells, prints the table and returns the sum.
pub(crate) fn cells(only: &[(String, String)]) -> Result<Outcome, String> {
    let matrix = load()?;
    let mut sum = Outcome::default();
    let mut table: BTreeMap<(String, String, String), BTreeMap<String, String>> = BTreeMap::new();
    for cell in all_cells(&matrix).filter(|c| c.is_chosen(only)) {
        let outcome = match matrix.skip.iter().find(|s| s.matches(&cell)) {
            Some(skip) => {
                let mut outcome = Outcome::default();
                outcome.skip(&skip.reason);
                outcome
            }
            None => cell.run()?,
        };
        let row = (cell.group.package.clone(), cell.format.to_owned(), cell.cache.to_owned());
        table.entry(row).or_default().insert(cell.engine.to_owned(), cell_text(&outcome));
        sum.add(&outcome);
    }
    print(&table);
    Ok(sum)
}

fn load() -> Result<Matrix, String> {
    let path = root().join("xtask/matrix.toml");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    parse(&text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Fails on unknown keys, and on a skip without a reason or without a cell.
fn parse(text: &str) -> Result<Matrix, String> {
    let matrix: Matrix = toml::from_str(text).map_err(|e| e.to_string())?;
    for (number, skip) in matrix.skip.iter().enumerate() {
        if skip.reason.trim().is_empty() {
            return Err(format!("skip {} has no reason", number + 1));
        }
        if !all_cells(&matrix).any(|cell| skip.matches(&cell)) {
            return Err(format!("skip {} ('{}') matches no cell", number + 1, skip.reason));
        }
    }
    Ok(matrix)
}

fn all_cells(matrix: &Matrix) -> impl Iterator<Item = Cell<'_>> {
    matrix.group.iter().flat_map(|group| {
        group.format.iter().flat_map(move |format| {
            group.cache.iter().flat_map(move |cache| {
                group.engine.iter().map(move |engine| Cell { group, engine, format, cache })
            })
        })
    })
}

impl Cell<'_> {
    fn is_chosen(&self, only: &[(String, String)]) -> bool {
        only.iter().all(|(axis, value)| {
            value
                == match axis.as_str() {
                    "crate" => &self.group.package,
                    "engine" => self.engine,
                    "format" => self.format,
                    _ => self.cache,
                }
        })
    }

    fn run(&self) -> Result<Outcome, String> {
        let name = format!("{}-{}-{}-{}", self.group.package, self.engine, self.format, self.cache);
        let mut command = cargo();
        command
            .args(["test", "--quiet", "--package", &self.group.package, "--test", &self.group.test])
            .env("BDS_TEST_ENGINE", self.engine)
            .env("BDS_TEST_FORMAT", self.format)
            .env("BDS_TEST_CACHE", self.cache);
        // `--quiet` is cargo's; the names of the tests are still needed to count them.
        let rest = ["--format=pretty".to_owned(), self.group.filter.clone()];
        let mut outcome = cargo_test::quiet_cargo_test(&name, &mut command, &rest)?;
        if outcome.passed + outcome.failed + outcome.skipped == 0 {
            outcome.fail(&format!("{name}: no test ran"));
        }
        Ok(outcome)
    }
}

impl Skip {
    fn matches(&self, cell: &Cell<'_>) -> bool {
        let is =
            |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|w| w == value);
        is(&self.package, &cell.group.package)
            && is(&self.engine, cell.engine)
            && is(&self.format, cell.format)
            && is(&self.cache, cell.cache)
    }
}

fn cell_text(outcome: &Outcome) -> String {
    let Outcome { passed, failed, skipped, .. } = outcome;
    match (failed, passed) {
        (0, 0) => "skip".into(),
        (0, _) if *skipped > 0 => format!("{passed} ok, {skipped} skip"),
        (0, _) => format!("{passed} ok"),
        _ => format!("{failed} FAILED"),
    }
}

fn print(table: &BTreeMap<(String, String, String), BTreeMap<String, String>>) {
    let engines = ["uring", "pool", "sim"];
    say(&format!(
        "\n{:12} {:11} {:13} {:14} {:14} {:14}",
        "crate", "format", "cache", engines[0], engines[1], engines[2]
    ));
    for ((package, format, cache), row) in table {
        let cell = |engine: &str| row.get(engine).map_or("-", String::as_str).to_owned();
        say(&format!(
            "{package:12} {format:11} {cache:13} {:14} {:14} {:14}",
            cell(engines[0]),
            cell(engines[1]),
            cell(engines[2])
        ));
    }
    say("");
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: &str = "[[group]]\ncrate='a'\ntest='it'\nfilter='f'\nengine=['sim']\n\
                         format=['raw']\ncache=['none']\n";

    #[test]
    fn the_committed_matrix_is_valid() {
        assert!(!load().expect("it is committed").group.is_empty());
    }

    #[test]
    fn unknown_keys_and_skips_without_effect_are_errors() {
        for (more, is_valid) in [
            ("[[skip]]\nengine='sim'\nreason='why'", true),
            ("[[skip]]\nengine='sim'\nreason=' '", false),
            ("[[skip]]\nengine='uring'\nreason='why'", false),
            ("[[skip]]\nengin='sim'\nreason='why'", false),
            ("chaches=['none']", false),
            ("[[skips]]\nreason='why'", false),
        ] {
            assert_eq!(parse(&format!("{GROUP}{more}")).is_ok(), is_valid, "{more}");
        }
    }
}
