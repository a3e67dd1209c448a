//! Lists and reads the files that tidy checks: Rust code, manifests and documents of the project.

use std::fs;
use std::path::{Path, PathBuf};

use crate::run::root;

/// A file of the workspace.
#[derive(Debug)]
pub(super) struct Text {
    /// Its path from the root.
    pub(super) name: String,
    pub(super) text: String,
}

/// Rust code, manifests and documents of the project, by name.
pub(super) fn files() -> Result<Vec<Text>, String> {
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> =
        ["crates", "docs", "fuzz", "xtask"].map(|name| root().join(name)).into();
    todo.push(root());
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))? {
            let path = entry.map_err(|e| e.to_string())?.path();
            let is_text =
                path.extension().is_some_and(|e| ["rs", "md", "toml"].iter().any(|t| e == *t));
            let name = path.strip_prefix(root()).unwrap_or(&path).display().to_string();
            if path.is_dir() && folder != root() && !path.ends_with("target") {
                todo.push(path);
            } else if is_text && name != "xtask/words.toml" {
                let text = read(&path)?;
                found.push(Text { name, text });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Rust files that the workspace compiles.
pub(super) fn is_code(name: &str) -> bool {
    name.ends_with(".rs") && (name.starts_with("crates/") || name.starts_with("xtask/"))
}

/// The crate of a file; `docs` for what belongs to none.
pub(super) fn crate_of(name: &str) -> &str {
    let mut parts = name.split('/');
    match (parts.next(), parts.next()) {
        (Some("crates"), Some(name)) => name,
        (Some(name @ ("xtask" | "fuzz")), _) => name,
        _ => "docs",
    }
}

pub(super) fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_crates() {
        for (name, of) in [
            ("crates/bds-io/src/lib.rs", "bds-io"),
            ("xtask/src/main.rs", "xtask"),
            ("fuzz/Cargo.toml", "fuzz"),
            ("docs/graph.md", "docs"),
            ("README.md", "docs"),
        ] {
            assert_eq!(crate_of(name), of, "{name}");
        }
    }
}
