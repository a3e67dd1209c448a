//! Checks what the manifests say: arrows between crates, dependencies that no code names, and what
//! publishing needs.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::source::identifiers;
use super::{Text, read};
use crate::run::{cargo, output, root};

/// Lines of a crate's README.
const MAX_README_LINES: usize = 40;
/// The licences that each published package contains.
const LICENCES: [&str; 2] = ["LICENSE-MIT", "LICENSE-APACHE"];

/// Runs all checks of manifests. `texts` are the Rust files of the workspace.
pub(super) fn check(texts: &[Text], findings: &mut Vec<String>) -> Result<(), String> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).map_err(|e| e.to_string())?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let drawn = drawn_arrows(&read(&root().join("ARCHITECTURE.md"))?);
    arrows(&packages, &drawn, findings);
    for package in &packages {
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let folder = Path::new(manifest).parent().unwrap_or(Path::new(""));
        let prefix = format!("{}/", folder.strip_prefix(root()).unwrap_or(folder).display());
        let own: Vec<&Text> = texts.iter().filter(|text| text.name.starts_with(&prefix)).collect();
        unused_dependencies(package, &prefix, &own, findings);
        if package["publish"] != serde_json::json!([]) {
            published(package, folder, findings)?;
        }
    }
    unused_workspace_dependencies(findings)
}

/// Fails on a dependency between our crates that ARCHITECTURE.md does not draw.
fn arrows(packages: &[Value], drawn: &BTreeSet<(String, String)>, findings: &mut Vec<String>) {
    let names: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in packages {
        let from = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let is_dev = dependency["kind"].as_str() == Some("dev");
            if names.contains(to) && !is_dev && !drawn.contains(&(from.to_owned(), to.to_owned())) {
                findings.push(format!("{from} -> {to}: ARCHITECTURE.md draws no such arrow"));
            }
        }
    }
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

/// A dependency must be named in the crate's code; one for tests may also be named in a
/// documentation example.
fn unused_dependencies(package: &Value, prefix: &str, texts: &[&Text], findings: &mut Vec<String>) {
    let src = format!("{prefix}src/");
    let mut in_code = BTreeSet::new();
    for text in texts.iter().filter(|text| text.name.starts_with(&src)) {
        in_code.extend(identifiers(&text.text).into_iter().map(|(_, name)| name));
    }
    for dependency in package["dependencies"].as_array().into_iter().flatten() {
        let name = dependency["name"].as_str().unwrap_or_default();
        let ident = dependency["rename"].as_str().unwrap_or(name).replace('-', "_");
        let is_named = match dependency["kind"].as_str() {
            None => in_code.contains(&ident),
            Some("dev") => texts.iter().any(|text| names(&text.text, &ident)),
            Some(_) => true,
        };
        if !is_named {
            findings.push(format!("{prefix}Cargo.toml: no code names the dependency '{name}'"));
        }
    }
}

/// Does `text` contain this word, as a whole?
fn names(text: &str, word: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    text.match_indices(word).any(|(at, _)| {
        !text[..at].ends_with(is_part) && !text[at + word.len()..].starts_with(is_part)
    })
}

/// What the workspace offers and no member takes.
fn unused_workspace_dependencies(findings: &mut Vec<String>) -> Result<(), String> {
    let manifest = |path: &Path| -> Result<toml::Table, String> {
        toml::from_str(&read(path)?).map_err(|e| format!("{}: {e}", path.display()))
    };
    let workspace = manifest(&root().join("Cargo.toml"))?;
    let mut taken = String::new();
    let crates = std::fs::read_dir(root().join("crates")).map_err(|e| e.to_string())?;
    for folder in crates.flatten().map(|entry| entry.path()).chain([root().join("xtask")]) {
        taken += &read(&folder.join("Cargo.toml"))?;
    }
    let offered = workspace["workspace"].get("dependencies").and_then(toml::Value::as_table);
    for name in offered.into_iter().flat_map(toml::Table::keys) {
        let is_taken = taken.lines().any(|line| {
            let key = line.split(['=', '.']).next().unwrap_or_default().trim();
            key == name && line.contains("workspace = true")
        });
        if !is_taken {
            findings.push(format!("Cargo.toml: no crate takes the dependency '{name}'"));
        }
    }
    Ok(())
}

/// What a registry and its readers need of a published package.
fn published(package: &Value, folder: &Path, findings: &mut Vec<String>) -> Result<(), String> {
    let name = package["name"].as_str().unwrap_or_default();
    let mut missing = |what: &str| findings.push(format!("{name}: {what}"));
    for field in ["description", "license", "repository", "readme"] {
        if package[field].as_str().is_none_or(str::is_empty) {
            missing(&format!("its manifest has no {field}"));
        }
    }
    for field in ["keywords", "categories"] {
        let len = package[field].as_array().map_or(0, Vec::len);
        if !(1..=5).contains(&len) {
            missing(&format!("its manifest has {len} {field}, one to five are wanted"));
        }
    }
    let kinds = package["targets"].as_array().into_iter().flatten();
    let is_library =
        kinds.flat_map(|t| t["kind"].as_array().into_iter().flatten()).any(|k| k == "lib");
    if is_library && package["metadata"]["docs"]["rs"].is_null() {
        missing("its manifest has no [package.metadata.docs.rs]");
    }
    for licence in LICENCES {
        let own = std::fs::read_to_string(folder.join(licence)).unwrap_or_default();
        if own != read(&root().join(licence))? {
            missing(&format!("{licence} is not that of the workspace"));
        }
    }
    let readme = std::fs::read_to_string(folder.join("README.md")).unwrap_or_default();
    let lines = readme.lines().count();
    if lines == 0 || lines > MAX_README_LINES {
        missing(&format!("README.md has {lines} lines, at most {MAX_README_LINES}"));
    }
    for dependency in package["dependencies"].as_array().into_iter().flatten() {
        let has_version = dependency["req"].as_str().is_some_and(|req| req != "*");
        let is_dev = dependency["kind"].as_str() == Some("dev");
        let to = dependency["name"].as_str().unwrap_or_default();
        // Cargo leaves out what only tests need and what has a path alone; a version would be
        // looked up.
        let is_internal = to == "bds-testkit";
        if is_dev && is_internal && has_version {
            missing(&format!("'{to}' is not published: its dependency must not have a version"));
        } else if !is_dev && !has_version {
            missing(&format!("its dependency '{to}' has no version"));
        }
    }
    Ok(())
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
    fn dependencies_that_no_code_names_are_found() {
        let text = |name: &str, text: &str| Text { name: name.into(), text: text.into() };
        let texts = [
            text("crates/a/src/lib.rs", "//! For `only_docs::x`.\nuse in_code::x;\n"),
            text("crates/a/tests/it.rs", "use in_tests::x; // not_in_tests2\n"),
        ];
        let texts: Vec<&Text> = texts.iter().collect();
        let on = |name: &str, kind: Value| serde_json::json!({ "name": name, "kind": kind });
        for (dependency, is_used) in [
            (on("in-code", Value::Null), true),
            (on("in-tests", Value::Null), false),
            (on("only-docs", Value::Null), false),
            (on("only-docs", "dev".into()), true),
            (on("in-tests", "dev".into()), true),
            (on("not-in-tests", "dev".into()), false),
            (serde_json::json!({ "name": "x", "rename": "in_code", "kind": null }), true),
        ] {
            let mut findings = Vec::new();
            let package = serde_json::json!({ "dependencies": [dependency] });
            unused_dependencies(&package, "crates/a/", &texts, &mut findings);
            assert_eq!(findings.is_empty(), is_used, "{dependency}: {findings:?}");
        }
    }
}
