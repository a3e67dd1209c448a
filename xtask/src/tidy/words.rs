//! Finds listed words in names, comments, texts and documents, and comment lines that are too wide.
//!
//! The list is `xtask/words.toml`. A name is split at underscores and capitals, so that `GateKey`
//! and `gate_key` are both found.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::source::identifiers;

/// Columns of a comment line; code is rustfmt's.
const MAX_COMMENT_WIDTH: usize = 100;
/// The same for drawings.
const MAX_DRAWING_WIDTH: usize = 125;

/// The words that may not appear, and where they may.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WordList {
    /// Found anywhere in a line, whatever their case.
    words: BTreeSet<String>,
    /// Found as whole identifiers of code only.
    names: BTreeSet<String>,
    #[serde(default)]
    except: Vec<Exception>,
}

/// A place where a listed word is the right one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    word: String,
    /// A file, or a folder with `/` at its end.
    files: String,
    reason: String,
    #[serde(skip)]
    is_used: bool,
}

impl WordList {
    /// Where the file `name` with this text holds listed words: `name:line: 'word'`, one for each
    /// occurrence.
    pub(super) fn findings(&mut self, name: &str, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        let base = name.rsplit('/').next().unwrap_or(name);
        for word in split(base) {
            self.check(name, 0, &word, &mut found);
        }
        for (number, line) in text.lines().enumerate() {
            for word in split(line) {
                self.check(name, number + 1, &word, &mut found);
            }
        }
        if name.ends_with(".rs") {
            for (line, word) in identifiers(text) {
                if self.names.contains(&word) && !self.is_excepted(name, &word) {
                    found.push(format!("{name}:{line}: '{word}'"));
                }
            }
        }
        found
    }

    fn check(&mut self, name: &str, line: usize, word: &str, found: &mut Vec<String>) {
        if self.words.contains(word) && !self.is_excepted(name, word) {
            found.push(match line {
                0 => format!("{name}: '{word}' in the file's name"),
                line => format!("{name}:{line}: '{word}'"),
            });
        }
    }

    fn is_excepted(&mut self, name: &str, word: &str) -> bool {
        let place = |files: &str| match files.ends_with('/') {
            true => name.starts_with(files),
            false => name == files,
        };
        let of_word = self.except.iter_mut().find(|e| e.word == word && place(&e.files));
        of_word.is_some_and(|exception| {
            exception.is_used = true;
            true
        })
    }

    /// Exceptions that were not needed, or say no reason. After all files.
    pub(super) fn faults(&self) -> Vec<String> {
        let of = |e: &Exception| format!("xtask/words.toml: exception '{}' in {}", e.word, e.files);
        let unused = self.except.iter().filter(|e| !e.is_used);
        let unused = unused.map(|e| format!("{}: matches nothing", of(e)));
        let silent = self.except.iter().filter(|e| e.reason.is_empty());
        unused.chain(silent.map(|e| format!("{}: has no reason", of(e)))).collect()
    }
}

/// The words of a line in lower case: runs of letters, split before a capital that begins a word.
fn split(line: &str) -> Vec<String> {
    let letters: Vec<char> = line.chars().collect();
    let mut words: Vec<String> = Vec::new();
    let mut is_inside = false;
    for (at, letter) in letters.iter().enumerate() {
        if !letter.is_ascii_alphabetic() {
            is_inside = false;
            continue;
        }
        let before = at.checked_sub(1).and_then(|at| letters.get(at));
        let is_lower = |letter: Option<&char>| letter.is_some_and(char::is_ascii_lowercase);
        let is_begin =
            letter.is_ascii_uppercase() && (is_lower(before) || is_lower(letters.get(at + 1)));
        if !is_inside || is_begin {
            words.push(String::new());
        }
        is_inside = true;
        if let Some(word) = words.last_mut() {
            word.push(letter.to_ascii_lowercase());
        }
    }
    words
}

/// Comment lines of Rust code wider than the limit: `name:line: N columns`. URLs and tables cannot
/// be broken; drawings, fenced as `text`, have a limit of their own.
pub(super) fn wide_comments(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_drawing = false;
    for (number, line) in text.lines().enumerate() {
        let width = line.chars().count();
        let Some((code, comment)) = line.split_once("//") else { continue };
        if let Some((_, fence)) = comment.split_once("```") {
            is_drawing = fence == "text";
        }
        if width <= if is_drawing { MAX_DRAWING_WIDTH } else { MAX_COMMENT_WIDTH } {
            continue;
        }
        // An odd quote before it: the slashes are inside a string.
        let is_text = !code.matches('"').count().is_multiple_of(2);
        let is_table = comment.trim_start_matches(['/', '!']).trim_start().starts_with('|');
        if !is_text && !is_table && !line.contains("://") {
            found.push(format!("{name}:{}: comment of {width} columns", number + 1));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> WordList {
        let text = "words = [\"gate\", \"gates\", \"they\"]\nnames = [\"Visitor\"]\n\
                    [[except]]\nword = \"gate\"\nfiles = \"crates/a/\"\nreason = \"the thing itself\"\n";
        toml::from_str(text).expect("a list")
    }

    #[test]
    fn words_are_found_in_names_comments_and_texts() {
        for line in [
            "fn open_gate() {}",
            "struct GateKey;",
            "struct TheGATEKey;",
            "const GATE: u8 = 1;",
            "// the gate",
            "/// They're it.",
            "f(\"a gate\");",
            "let a2gate = 1;",
        ] {
            assert_eq!(list().findings("crates/b/c.rs", line).len(), 1, "{line}");
        }
        for line in ["fn investigate() {}", "// the theyre", "struct Gated;", "// a visitor"] {
            assert!(list().findings("crates/b/c.rs", line).is_empty(), "{line}");
        }
        assert_eq!(
            list().findings("docs/gates.md", ""),
            ["docs/gates.md: 'gates' in the file's name"]
        );
    }

    #[test]
    fn names_are_found_in_code_only() {
        let text = "// Visitor\nstruct Visitor;\nfn f(_: Visitors) { g(\"Visitor\") }\n";
        assert_eq!(list().findings("a.rs", text), ["a.rs:2: 'Visitor'"]);
        assert!(list().findings("a.md", text).is_empty());
    }

    #[test]
    fn exceptions_hold_where_they_say_and_must_be_needed() {
        let mut list = list();
        assert_eq!(
            list.faults(),
            ["xtask/words.toml: exception 'gate' in crates/a/: matches nothing"]
        );
        assert!(list.findings("crates/a/b.rs", "// a gate").is_empty());
        assert_eq!(list.findings("crates/a/b.rs", "// gates").len(), 1);
        assert!(list.faults().is_empty());
    }

    #[test]
    fn a_drawing_ends_with_its_fence_and_has_a_limit() {
        let line = "-".repeat(130);
        let found = wide_comments("a.rs", &format!("//! ```text\n//! {line}\n//! ```\n"));
        assert_eq!(found, ["a.rs:2: comment of 134 columns"]);
        let line = "-".repeat(110);
        let found = wide_comments("a.rs", &format!("//! ```text\n//! x\n//! ```\n//! {line}\n"));
        assert_eq!(found, ["a.rs:4: comment of 114 columns"]);
    }

    #[test]
    fn comments_are_measured_and_code_is_not() {
        let long = "word ".repeat(25);
        for line in [format!("// {long}"), format!("    //! {long}"), format!("f(); // {long}")] {
            assert_eq!(
                wide_comments("a.rs", &line),
                [format!("a.rs:1: comment of {} columns", line.len())]
            );
        }
        for line in [
            format!("f(\"{long}\");"),
            format!("f(\"http://{long}\");"),
            format!("// see https://{long}"),
            format!("/// | {long} |"),
            "// short".to_owned(),
            format!("//! ```text\n//! {}\n//! ```", "-".repeat(120)),
        ] {
            assert!(wide_comments("a.rs", &line).is_empty(), "{line}");
        }
    }
}
