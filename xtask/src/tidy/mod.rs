//! `cargo xtask tidy`: the house rules that no compiler checks.
//!
//! Crate arrows as ARCHITECTURE.md draws them, `//!` openings, where unsafe lives, lengths (a ratchet: what is too long
//! today may only shrink), and words that mean "unfinished". What a file contains is read by [`source`].

mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use self::source::Source;
use crate::run::{cargo, output, root, say};

/// Code and docs of a file, without its tests.
const MAX_FILE_LINES: usize = 700;
/// One function.
const MAX_FN_LINES: usize = 70;
/// The crates that may contain unsafe code.
const UNSAFE_CRATES: [&str; 2] = ["bds-refcount", "bds-io"];

/// What is longer than the limit today, and how long. Numbers here may shrink, never grow.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ratchet {
    #[serde(default)]
    files: BTreeMap<String, usize>,
    #[serde(default)]
    functions: BTreeMap<String, usize>,
}

/// Checks everything and lists all findings.
pub(crate) fn tidy() -> Result<(), String> {
    let mut findings = Vec::new();
    arrows(&mut findings)?;
    let ratchet = load_ratchet()?;
    for file in sources()? {
        check_file(&file, &ratchet, &mut findings)?;
    }
    if findings.is_empty() {
        return Ok(());
    }
    for finding in &findings {
        say(finding);
    }
    Err(format!("{} findings", findings.len()))
}

/// Fails on a dependency between our crates that ARCHITECTURE.md does not draw.
fn arrows(findings: &mut Vec<String>) -> Result<(), String> {
    let drawn = drawn_arrows(&read(&root().join("ARCHITECTURE.md"))?);
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata).map_err(|e| e.to_string())?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let names: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in &packages {
        let from = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let is_dev = dependency["kind"].as_str() == Some("dev");
            if names.contains(to) && !is_dev && !drawn.contains(&(from.to_owned(), to.to_owned())) {
                findings.push(format!("{from} -> {to}: ARCHITECTURE.md draws no such arrow"));
            }
        }
    }
    Ok(())
}

/// Lines `a -> b, c` of the block fenced as "```arrows".
fn drawn_arrows(text: &str) -> BTreeSet<(String, String)> {
    let block = text
        .split("```arrows")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .unwrap_or_default();
    let lines = block.lines().filter_map(|line| line.split_once("->"));
    lines
        .flat_map(|(from, to)| {
            to.split(',').map(move |to| (from.trim().to_owned(), to.trim().to_owned()))
        })
        .collect()
}

fn load_ratchet() -> Result<Ratchet, String> {
    let path = root().join("xtask/ratchet.toml");
    if !path.exists() {
        return Ok(Ratchet::default());
    }
    toml::from_str(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))
}

/// Every Rust file below `crates/` and `xtask/`.
fn sources() -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut todo = vec![root().join("crates"), root().join("xtask")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))? {
            let path = entry.map_err(|e| e.to_string())?.path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn check_file(path: &Path, ratchet: &Ratchet, findings: &mut Vec<String>) -> Result<(), String> {
    let text = read(path)?;
    let name = path.strip_prefix(root()).unwrap_or(path).display().to_string();
    check_text(&name, &text, ratchet, findings);
    Ok(())
}

/// The rules for one file of this name.
fn check_text(name: &str, text: &str, ratchet: &Ratchet, findings: &mut Vec<String>) {
    if !text.starts_with("//!") {
        findings.push(format!("{name}: does not open with //! (what is this room for?)"));
    }
    words(name, text, findings);
    let source = match Source::parse(text) {
        Ok(source) => source,
        Err(why) => return findings.push(format!("{name}:{why}")),
    };
    let is_test_file = name.ends_with("/tests.rs") || !name.contains("/src/");
    if !is_test_file {
        let code = text.lines().count() - source.test_lines;
        length(name, code, MAX_FILE_LINES, &ratchet.files, findings);
        for (function, lines) in &source.functions {
            let name = format!("{name}::{function}");
            length(&name, *lines, MAX_FN_LINES, &ratchet.functions, findings);
        }
    }
    unsafe_code(name, text, &source, findings);
}

fn length(
    name: &str,
    lines: usize,
    limit: usize,
    ratchet: &BTreeMap<String, usize>,
    findings: &mut Vec<String>,
) {
    let allowed = ratchet.get(name).copied().unwrap_or(limit);
    if lines > allowed {
        findings.push(format!("{name}: {lines} lines, at most {allowed}"));
    }
}

fn words(name: &str, text: &str, findings: &mut Vec<String>) {
    if name == "xtask/src/tidy/mod.rs" {
        return; // it names them
    }
    for (number, line) in text.lines().enumerate() {
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX", "HACK", "for now"] {
            if line.contains(word) {
                findings.push(format!("{name}:{}: '{word}' means unfinished", number + 1));
            }
        }
    }
}

fn unsafe_code(name: &str, text: &str, source: &Source, findings: &mut Vec<String>) {
    let package = name.strip_prefix("crates/").and_then(|n| n.split('/').next()).unwrap_or("xtask");
    if UNSAFE_CRATES.contains(&package) {
        return;
    }
    let is_root = name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs");
    if is_root && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{name}: needs #![forbid(unsafe_code)]"));
    }
    for line in &source.unsafe_lines {
        findings.push(format!("{name}:{line}: unsafe outside {UNSAFE_CRATES:?}"));
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_are_read_from_the_fenced_block() {
        let drawn = drawn_arrows("x\n```arrows\na -> b, c\nb -> c\n```\nz -> a");
        let arrow = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(drawn, BTreeSet::from([arrow("a", "b"), arrow("a", "c"), arrow("b", "c")]));
    }

    fn findings(name: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check_text(name, text, &Ratchet::default(), &mut findings);
        findings
    }

    #[test]
    fn unsafe_is_found_outside_its_rooms_only() {
        let text = "//! A file.\nfn f() {\n    g(\"x\", unsafe { h() });\n}\n";
        let wanted = "unsafe outside [\"bds-refcount\", \"bds-io\"]";
        for name in ["bds-core/src/a.rs", "bds-core/tests/a.rs", "bds-drivers/benches/a.rs"] {
            let name = format!("crates/{name}");
            assert_eq!(findings(&name, text), [format!("{name}:3: {wanted}")]);
        }
        assert_eq!(findings("xtask/src/a.rs", text), [format!("xtask/src/a.rs:3: {wanted}")]);
        for name in ["crates/bds-io/src/a.rs", "crates/bds-refcount/tests/a.rs"] {
            assert!(findings(name, text).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_crates_root_forbids_unsafe_code() {
        let told = findings("crates/bds-core/src/lib.rs", "//! A crate.\n");
        assert_eq!(told, ["crates/bds-core/src/lib.rs: needs #![forbid(unsafe_code)]"]);
        let text = "//! A crate.\n#![forbid(unsafe_code)]\n";
        assert!(findings("crates/bds-core/src/lib.rs", text).is_empty());
    }

    #[test]
    fn lengths_are_those_of_code_and_not_of_tests() {
        let body = "    go();\n".repeat(69);
        let long = format!("pub(in crate::a) const extern \"C\" fn long() {{\n{body}}}\n");
        let tests = format!("#[cfg(test)]\nuse a::b;\n\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
        let name = "crates/bds-core/src/a.rs";
        let told = findings(name, &format!("//! A file.\n{tests}{long}"));
        assert_eq!(told, [format!("{name}::long: 71 lines, at most 70")]);
        assert!(findings(name, &format!("//! A file.\n{tests}")).is_empty());
        assert!(findings("crates/bds-core/tests/a.rs", &format!("//! A file.\n{long}")).is_empty());
        let filler = "// a line\n".repeat(699);
        assert!(
            findings(name, &format!("//! A file.\n{filler}{tests}\n").replace("\n\n", "\n"))
                .is_empty()
        );
        let told = findings(
            name,
            &format!("//! A file.\n{filler}{tests}fn f() {{}}\n").replace("\n\n", "\n"),
        );
        assert_eq!(told, [format!("{name}: 701 lines, at most 700")]);
    }

    #[test]
    fn a_file_that_is_no_rust_is_a_finding() {
        let told = findings("crates/bds-core/src/a.rs", "//! A file.\nfn {}\n");
        assert_eq!(told, ["crates/bds-core/src/a.rs:2:4: expected identifier"]);
    }

    #[test]
    fn unfinished_work_and_a_missing_opening_are_findings() {
        let told = findings("crates/bds-core/src/a.rs", "fn f() {\n    todo!()\n}\n");
        let name = "crates/bds-core/src/a.rs";
        let wanted = [
            format!("{name}: does not open with //! (what is this room for?)"),
            format!("{name}:2: 'todo!(' means unfinished"),
        ];
        assert_eq!(told, wanted);
    }

    #[test]
    fn too_long_is_a_finding_unless_the_ratchet_knows() {
        let (mut findings, ratchet) = (Vec::new(), BTreeMap::from([("old".to_owned(), 90)]));
        length("old", 90, 70, &ratchet, &mut findings);
        assert!(findings.is_empty());
        length("old", 91, 70, &ratchet, &mut findings);
        length("new", 71, 70, &ratchet, &mut findings);
        assert_eq!(findings.len(), 2);
    }
}
