//! Checks that the files and folders that documents name exist.

use std::collections::BTreeSet;

use super::files::Text;
use crate::run::root;

/// Places where a path in a document may begin.
const FOLDERS: [&str; 6] = ["crates/", "docs/", "xtask/", "fuzz/", "bds-", ".ci/"];

/// Adds a finding for each path in the project's documents that leads nowhere.
pub(super) fn check(documents: &[Text], findings: &mut Vec<String>) {
    let root = root();
    for file in documents.iter().filter(|file| file.name.ends_with(".md")) {
        for path in paths(&file.text) {
            let is_there = ["", "crates/"].iter().any(|base| root.join(base).join(path).exists());
            if !is_there {
                findings.push(format!("{}: names `{path}`, which does not exist", file.name));
            }
        }
    }
}

/// Paths between backticks: what begins with a known folder and ends as a file or a folder does.
fn paths(text: &str) -> BTreeSet<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|path| is_path(path)).collect()
}

fn is_path(text: &str) -> bool {
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/_-.".contains(c));
    let ends = [".rs", ".md", ".toml", "/"];
    is_plain
        && text.contains('/')
        && FOLDERS.iter().any(|folder| text.starts_with(folder))
        && ends.iter().any(|end| text.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_distinguished_from_other_code() {
        let text = "`docs/a.md`, `bds-core/src/graph/`, `bds info x.qcow2`, `crates/bds-io/src/a.rs`,\n\
                    `a/b.rs`, `target/x/`, `bds-core`, plain docs/b.md";
        let found: Vec<&str> = paths(text).into_iter().collect();
        assert_eq!(found, ["bds-core/src/graph/", "crates/bds-io/src/a.rs", "docs/a.md"]);
    }

    #[test]
    fn a_path_that_leads_nowhere_is_a_finding() {
        let text = "See `xtask/src/tidy/paths.rs` and `docs/no such file.md`, `docs/nothing.md`.";
        let file = Text { name: "docs/a.md".to_owned(), text: text.to_owned() };
        let mut findings = Vec::new();
        check(&[file], &mut findings);
        assert_eq!(findings, ["docs/a.md: names `docs/nothing.md`, which does not exist"]);
    }
}
