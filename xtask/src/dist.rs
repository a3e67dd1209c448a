//! `cargo xtask dist`: builds the tool for packagers and lays it out as it is installed.
//!
//! ```text
//! target/dist/bds-0.1.0-x86_64-linux/
//!   bin/bds                                        stripped
//!   share/man/man1/bds.1, bds-convert.1, …
//!   share/bash-completion/completions/bds          and zsh, fish
//!   share/doc/bds/README.md, LICENSE-APACHE, LICENSE-MIT, CHANGELOG.md
//! target/dist/bds-0.1.0-x86_64-linux.tar.gz        the same, where tar is installed
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{cargo, output, root, run, say, target_dir, which};

/// Files of the project that go into `share/doc`.
const DOCS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];
/// Shell, and where its completion script is installed.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/bds"),
    ("zsh", "share/zsh/site-functions/_bds"),
    ("fish", "share/fish/vendor_completions.d/bds.fish"),
];

/// Builds the release binary and lays out what a package holds.
pub(crate) fn dist() -> Result<(), String> {
    say("building bds (release), which takes some minutes the first time …");
    run(cargo().args(["build", "--release", "--package", "bds-cli", "--bin", "bds"]))?;
    let built = target_dir().join("release/bds");
    let name = package_name(&built)?;
    let dir = target_dir().join("dist").join(&name);
    if dir.exists() {
        fs::remove_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    lay_out(&dir, &built)?;
    say(&format!("{}", dir.display()));
    if which("tar").is_none() {
        say("skipped: no archive, because tar is not installed");
        return Ok(());
    }
    let archive = format!("{name}.tar.gz");
    let mut tar = Command::new("tar");
    tar.current_dir(target_dir().join("dist")).args(["-czf", &archive, &name]);
    run(&mut tar)?;
    say(&format!("{}", target_dir().join("dist").join(archive).display()));
    Ok(())
}

/// "bds-0.1.0-x86_64-linux": the version as the binary says it.
fn package_name(bds: &Path) -> Result<String, String> {
    let version = output(Command::new(bds).arg("--version"))?;
    let version = version.split_whitespace().last().unwrap_or("unknown").to_owned();
    Ok(format!("bds-{version}-{}-{}", std::env::consts::ARCH, std::env::consts::OS))
}

fn lay_out(dir: &Path, built: &Path) -> Result<(), String> {
    copy(built, &dir.join("bin/bds"))?;
    let man = made(&dir.join("share/man/man1"))?;
    run(Command::new(built).arg("man-pages").arg(&man))?;
    for (shell, place) in COMPLETIONS {
        let script = output(Command::new(built).args(["completions", shell]))?;
        let path = dir.join(place);
        made(path.parent().unwrap_or(dir))?;
        fs::write(&path, script).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    for name in DOCS {
        copy(&root().join(name), &dir.join("share/doc/bds").join(name))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    made(to.parent().unwrap_or(to))?;
    fs::copy(from, to).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))?;
    Ok(())
}

/// Creates a directory and those above it.
fn made(dir: &Path) -> Result<PathBuf, String> {
    fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(dir.to_owned())
}
