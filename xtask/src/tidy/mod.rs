//! `cargo xtask tidy`: checks the project's rules that no compiler checks.
//!
//! Files: `//!` openings, where unsafe lives, lengths, words that mean "unfinished", listed words
//! and wide comments. The tests that `docs/jobs-scenarios.md` names exist. Crates: arrows as
//! ARCHITECTURE.md draws them, dependencies, what publishing needs, circles of imports. What is
//! over a limit today stands in `xtask/ratchet.toml` and may only shrink.

mod circles;
mod files;
mod modules;
mod packages;
mod paths;
mod scenarios;
mod source;
mod words;

use std::collections::BTreeMap;

use serde::Deserialize;

use self::circles::Imports;
use self::files::{Text, crate_of, files, is_code, read};
use self::source::Source;
use self::words::WordList;
use crate::run::{root, say};

/// Code and docs of a file, without its tests.
const MAX_FILE_LINES: usize = 700;
/// One function.
const MAX_FN_LINES: usize = 70;
/// The crates that may contain unsafe code.
const UNSAFE_CRATES: [&str; 2] = ["bds-refcount", "bds-io"];
/// The crate whose functions C calls: its pointers are one file's, and its tests play C's part.
const C_CRATE: &str = "bds-ffi";
/// How many findings of one kind are printed when there are more than the ratchet allows.
const MAX_SHOWN: usize = 20;

/// What is printed although it is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Show {
    /// The files of the largest circle of each crate.
    pub(crate) circles: bool,
    /// All listed words.
    pub(crate) words: bool,
    /// All wide comments.
    pub(crate) wide: bool,
}

/// What is over a limit today, and by how much. Numbers here may shrink, never grow.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ratchet {
    #[serde(default)]
    files: BTreeMap<String, usize>,
    #[serde(default)]
    functions: BTreeMap<String, usize>,
    /// Files in the largest circle of imports, for a crate or a folder of one.
    #[serde(default)]
    circles: BTreeMap<String, usize>,
    /// Listed words, for a crate.
    #[serde(default)]
    words: BTreeMap<String, usize>,
    /// Wide comments, for a crate.
    #[serde(default)]
    wide_comments: BTreeMap<String, usize>,
}

/// Checks everything and lists all findings.
pub(crate) fn tidy(show: Show) -> Result<(), String> {
    let mut findings = Vec::new();
    let ratchet = load_ratchet()?;
    let (code, others): (Vec<Text>, Vec<Text>) =
        files()?.into_iter().partition(|file| is_code(&file.name));
    packages::check(&code, &mut findings)?;
    paths::check(&others, &mut findings);
    let table = others.iter().find(|file| file.name == scenarios::TABLE);
    let table = table.map_or("", |file| &file.text);
    scenarios::check(table, &code, &mut findings);
    for file in &code {
        check_text(&file.name, &file.text, &ratchet, &mut findings);
    }
    check_circles(&code, &ratchet, show.circles, &mut findings)?;
    check_words(&code, &others, &ratchet, show, &mut findings)?;
    if findings.is_empty() {
        return Ok(());
    }
    for finding in &findings {
        say(finding);
    }
    Err(format!("{} findings", findings.len()))
}

/// Compares the largest circle of imports of each crate, and of each folder that the ratchet names,
/// with the ratchet.
fn check_circles(
    code: &[Text],
    ratchet: &Ratchet,
    is_shown: bool,
    findings: &mut Vec<String>,
) -> Result<(), String> {
    let mut texts: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for file in code {
        let of_crate = texts.entry(crate_of(&file.name)).or_default();
        of_crate.insert(file.name.clone(), file.text.clone());
    }
    for (name, texts) in &texts {
        let folder = if *name == "xtask" { "xtask".to_owned() } else { format!("crates/{name}") };
        let roots = ["lib.rs", "main.rs"].map(|root| format!("{folder}/src/{root}"));
        let Some(root) = roots.iter().find(|root| texts.contains_key(*root)) else { continue };
        let imports = Imports::read(root, texts)?;
        let parts = ratchet.circles.keys().filter_map(|key| key.split_once('/'));
        let parts = parts.filter(|(of, _)| of == name).map(|(_, part)| part);
        for part in std::iter::once("src").chain(parts) {
            let key = if part == "src" { (*name).to_owned() } else { format!("{name}/{part}") };
            let circle = imports.largest_circle(&format!("{folder}/{part}/"));
            let allowed = ratchet.circles.get(&key).copied().unwrap_or(0);
            let line =
                format!("{key}: {} files import each other, at most {allowed}", circle.len());
            if circle.len() > allowed {
                findings.push(line);
                findings.extend(circle.lines());
            } else {
                say(&line);
                circle.lines().filter(|_| is_shown).for_each(|line| say(&line));
            }
        }
    }
    Ok(())
}

/// Compares the numbers of listed words and of wide comments of each crate with the ratchet.
fn check_words(
    code: &[Text],
    others: &[Text],
    ratchet: &Ratchet,
    show: Show,
    findings: &mut Vec<String>,
) -> Result<(), String> {
    let path = root().join("xtask/words.toml");
    let mut list: WordList =
        toml::from_str(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut listed: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut wide: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for file in code.iter().chain(others) {
        let key = crate_of(&file.name);
        listed.entry(key).or_default().extend(list.findings(&file.name, &file.text));
        if file.name.ends_with(".rs") {
            wide.entry(key).or_default().extend(words::wide_comments(&file.name, &file.text));
        }
    }
    findings.extend(list.faults());
    counted("listed words", &listed, &ratchet.words, show.words, findings);
    counted("wide comments", &wide, &ratchet.wide_comments, show.wide, findings);
    Ok(())
}

/// Adds what is more than the ratchet allows to the findings.
fn counted(
    what: &str,
    found: &BTreeMap<&str, Vec<String>>,
    ratchet: &BTreeMap<String, usize>,
    is_shown: bool,
    findings: &mut Vec<String>,
) {
    for (key, places) in found {
        let allowed = ratchet.get(*key).copied().unwrap_or(0);
        let line = format!("{key}: {} {what}, at most {allowed}", places.len());
        if is_shown {
            places.iter().for_each(|place| say(place));
        }
        if places.len() > allowed {
            findings.extend(places.iter().take(MAX_SHOWN).filter(|_| !is_shown).cloned());
            findings.push(line);
        } else if allowed > 0 || is_shown {
            say(&line);
        }
    }
    let total: usize = found.values().map(Vec::len).sum();
    say(&format!("{total} {what} in all"));
}

fn load_ratchet() -> Result<Ratchet, String> {
    let path = root().join("xtask/ratchet.toml");
    if !path.exists() {
        return Ok(Ratchet::default());
    }
    toml::from_str(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))
}

/// The rules for one file of this name.
fn check_text(name: &str, text: &str, ratchet: &Ratchet, findings: &mut Vec<String>) {
    if !text.starts_with("//!") {
        findings.push(format!("{name}: does not open with //! (what is this file for?)"));
    }
    unfinished(name, text, findings);
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

fn unfinished(name: &str, text: &str, findings: &mut Vec<String>) {
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
    if package == C_CRATE {
        return unsafe_of_c_crate(name, text, source, findings);
    }
    let is_root = name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs");
    if is_root && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{name}: needs #![forbid(unsafe_code)]"));
    }
    for line in &source.unsafe_lines {
        findings.push(format!("{name}:{line}: unsafe outside {UNSAFE_CRATES:?}"));
    }
}

/// Outside of the file of pointers, `unsafe` stands only in the attribute that exports a function.
fn unsafe_of_c_crate(name: &str, text: &str, source: &Source, findings: &mut Vec<String>) {
    if name.ends_with("/src/ptr.rs") || !name.contains("/src/") {
        return;
    }
    for number in &source.unsafe_lines {
        if text.lines().nth(number - 1) != Some("#[unsafe(no_mangle)]") {
            findings.push(format!("{name}:{number}: unsafe outside ptr.rs"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(name: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check_text(name, text, &Ratchet::default(), &mut findings);
        findings
    }

    #[test]
    fn unsafe_is_found_outside_its_crates_only() {
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
    fn unsafe_of_the_c_crate_is_in_the_file_of_pointers() {
        let text =
            "//! A file.\n#[unsafe(no_mangle)]\npub extern \"C\" fn f() {\n    unsafe { h() }\n}\n";
        let name = "crates/bds-ffi/src/a.rs";
        assert_eq!(findings(name, text), [format!("{name}:4: unsafe outside ptr.rs")]);
        for name in ["crates/bds-ffi/src/ptr.rs", "crates/bds-ffi/tests/it/a.rs"] {
            assert!(findings(name, text).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_crates_root_forbids_unsafe_code() {
        let found = findings("crates/bds-core/src/lib.rs", "//! A crate.\n");
        assert_eq!(found, ["crates/bds-core/src/lib.rs: needs #![forbid(unsafe_code)]"]);
        let text = "//! A crate.\n#![forbid(unsafe_code)]\n";
        assert!(findings("crates/bds-core/src/lib.rs", text).is_empty());
    }

    #[test]
    fn lengths_are_those_of_code_and_not_of_tests() {
        let body = "    go();\n".repeat(69);
        let long = format!("pub(in crate::a) const extern \"C\" fn long() {{\n{body}}}\n");
        let tests = format!("#[cfg(test)]\nuse a::b;\n\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
        let name = "crates/bds-core/src/a.rs";
        let found = findings(name, &format!("//! A file.\n{tests}{long}"));
        assert_eq!(found, [format!("{name}::long: 71 lines, at most 70")]);
        assert!(findings(name, &format!("//! A file.\n{tests}")).is_empty());
        assert!(findings("crates/bds-core/tests/a.rs", &format!("//! A file.\n{long}")).is_empty());
        let filler = "// a line\n".repeat(699);
        assert!(
            findings(name, &format!("//! A file.\n{filler}{tests}\n").replace("\n\n", "\n"))
                .is_empty()
        );
        let found = findings(
            name,
            &format!("//! A file.\n{filler}{tests}fn f() {{}}\n").replace("\n\n", "\n"),
        );
        assert_eq!(found, [format!("{name}: 701 lines, at most 700")]);
    }

    #[test]
    fn a_file_that_is_no_rust_is_a_finding() {
        let found = findings("crates/bds-core/src/a.rs", "//! A file.\nfn {}\n");
        assert_eq!(found, ["crates/bds-core/src/a.rs:2:4: expected identifier"]);
    }

    #[test]
    fn unfinished_work_and_a_missing_opening_are_findings() {
        let found = findings("crates/bds-core/src/a.rs", "fn f() {\n    todo!()\n}\n");
        let name = "crates/bds-core/src/a.rs";
        let wanted = [
            format!("{name}: does not open with //! (what is this file for?)"),
            format!("{name}:2: 'todo!(' means unfinished"),
        ];
        assert_eq!(found, wanted);
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

    #[test]
    fn more_than_the_ratchet_allows_is_a_finding() {
        let found = BTreeMap::from([
            ("a", vec!["x".to_owned(), "y".to_owned()]),
            ("b", vec!["z".to_owned()]),
        ]);
        let ratchet = BTreeMap::from([("a".to_owned(), 2)]);
        let mut findings = Vec::new();
        counted("things", &found, &ratchet, false, &mut findings);
        assert_eq!(findings, ["z", "b: 1 things, at most 0"]);
    }
}
