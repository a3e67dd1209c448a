//! `cargo xtask tidy`: the house rules that no compiler checks.
//!
//! Crate arrows as ARCHITECTURE.md draws them, `//!` openings, where unsafe lives, lengths (a ratchet: what is too long
//! today may only shrink), and words that mean "unfinished".

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::run::{cargo, output, root, say};

/// Code and docs of a file, without its tests.
const MAX_FILE_LINES: usize = 700;
/// One function.
const MAX_FN_LINES: usize = 70;
/// The crates that may contain unsafe code.
const UNSAFE_CRATES: [&str; 2] = ["bds-refcount", "bds-io"];

/// What is longer than the limit today, and how long. Numbers here may shrink, never grow.
#[derive(Default, Deserialize)]
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
    let is_src = name.contains("/src/");
    if !text.starts_with("//!") {
        findings.push(format!("{name}: does not open with //! (what is this room for?)"));
    }
    let code: Vec<&str> =
        text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).collect();
    let is_test_file = name.ends_with("/tests.rs") || !is_src;
    if is_src && !is_test_file {
        length(&name, code.len(), MAX_FILE_LINES, &ratchet.files, findings);
        for (function, lines) in functions(&code) {
            length(
                &format!("{name}::{function}"),
                lines,
                MAX_FN_LINES,
                &ratchet.functions,
                findings,
            );
        }
    }
    words(&name, &text, findings);
    unsafe_code(&name, &text, findings);
    Ok(())
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

/// Names and lengths of functions, by indentation: rustfmt puts the closing brace below the `fn`.
fn functions(code: &[&str]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (at, line) in code.iter().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        let Some(name) = function_name(trimmed) else { continue };
        let end = format!("{}}}", " ".repeat(indent));
        if let Some(lines) = code[at..].iter().position(|l| *l == end) {
            found.push((name.to_owned(), lines + 1));
        }
    }
    found
}

fn function_name(line: &str) -> Option<&str> {
    let starts = [
        "fn ",
        "pub fn ",
        "pub(crate) fn ",
        "async fn ",
        "pub async fn ",
        "pub(crate) async fn ",
        "const fn ",
        "pub const fn ",
        "unsafe fn ",
        "pub unsafe fn ",
        "pub(crate) unsafe fn ",
        "pub(super) fn ",
        "pub(super) async fn ",
    ];
    let rest = starts.iter().find_map(|start| line.strip_prefix(start))?;
    rest.split(['(', '<']).next()
}

fn words(name: &str, text: &str, findings: &mut Vec<String>) {
    if name == "xtask/src/tidy.rs" {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX", "HACK", "for now"] {
            if line.contains(word) {
                findings.push(format!("{name}:{}: '{word}' means unfinished", number + 1));
            }
        }
    }
}

fn unsafe_code(name: &str, text: &str, findings: &mut Vec<String>) {
    let package = name.strip_prefix("crates/").and_then(|n| n.split('/').next()).unwrap_or("xtask");
    if UNSAFE_CRATES.contains(&package) || name == "xtask/src/tidy.rs" {
        return;
    }
    let is_root = name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs");
    if is_root && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{name}: needs #![forbid(unsafe_code)]"));
    }
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        if !name.contains("/src/") || code.contains("unsafe_code") || code.contains('"') {
            continue;
        }
        if code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
            findings.push(format!("{name}:{}: unsafe outside {UNSAFE_CRATES:?}", number + 1));
        }
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

    #[test]
    fn functions_are_measured_by_their_braces() {
        let code =
            ["impl X {", "    pub fn a(&self) {", "        b();", "    }", "}", "fn c<T>() {", "}"];
        assert_eq!(functions(&code), [("a".to_owned(), 3), ("c".to_owned(), 2)]);
    }

    #[test]
    fn unsafe_is_found_outside_its_rooms_only() {
        let mut findings = Vec::new();
        unsafe_code("crates/bds-io/src/a.rs", "unsafe { x() }", &mut findings);
        unsafe_code("crates/bds-core/src/a.rs", "// unsafe in words\nfn f() {}", &mut findings);
        assert!(findings.is_empty());
        unsafe_code("crates/bds-core/src/a.rs", "fn f() { unsafe { x() } }", &mut findings);
        assert_eq!(findings.len(), 1);
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
