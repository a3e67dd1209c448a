//! `cargo xtask outside`: compiles and runs the README's Rust lines in a crate outside the
//! workspace, whose single dependency is `bds`.

use std::fs;
use std::path::Path;

use crate::run::{cargo, root, run, say, target_dir};

/// Makes the crate, and runs it.
pub(crate) fn outside() -> Result<(), String> {
    let readme = root().join("README.md");
    let text = fs::read_to_string(&readme).map_err(|e| format!("{}: {e}", readme.display()))?;
    let program = rust_lines(&text).ok_or("README.md has no Rust lines with a main function")?;
    let dir = target_dir().join("outside");
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    fs::create_dir_all(dir.join("src")).map_err(|e| format!("{}: {e}", dir.display()))?;
    write("Cargo.toml", &manifest(&root().join("crates/bds")))?;
    write("src/main.rs", &program)?;
    // The versions that the workspace was tested with; without it the registry is asked.
    let lock = root().join("Cargo.lock");
    fs::copy(&lock, dir.join("Cargo.lock")).map_err(|e| format!("{}: {e}", lock.display()))?;
    let mut command = cargo();
    command.current_dir(&dir).args(["run", "--quiet"]).env("CARGO_TARGET_DIR", target_dir());
    run(&mut command)?;
    say("outside: the README's lines compile and run with the single dependency bds");
    Ok(())
}

/// The first fenced block of Rust that is a whole program.
fn rust_lines(text: &str) -> Option<String> {
    let blocks = text.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.filter(|block| block.contains("fn main()")).map(str::to_owned).next()
}

/// A workspace of its own. The profile is that of the project, so that its artifacts are used.
fn manifest(bds: &Path) -> String {
    format!(
        "[package]\nname = \"outside\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
         [workspace]\n\n[dependencies]\nbds = {{ path = {bds:?} }}\n\n\
         [profile.dev]\ndebug = \"line-tables-only\"\n\
         [profile.dev.package.zlib-rs]\nopt-level = 3\n\
         [profile.dev.package.zstd-sys]\nopt-level = 3\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_whole_program_is_taken() {
        let text =
            "```text\nfn main()\n```\n```rust\nlet part = 1;\n```\n```rust\nfn main() {}\n```\n";
        assert_eq!(rust_lines(text).as_deref(), Some("fn main() {}\n"));
        assert_eq!(rust_lines("no program"), None);
    }
}
