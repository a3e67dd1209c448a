//! `cargo xtask dist`: builds tool and C library for packagers and lays them out as installed.
//!
//! ```text
//! target/dist/bds-0.1.0-x86_64-linux/              or --prefix DIR
//!   bin/bds                                        stripped
//!   include/bds.h, include/bds.hpp
//!   lib/libbds.so.0.1, libbds.so, libbds.a, pkgconfig/bds.pc
//!   share/man/man1/bds.1, bds-convert.1, …, share/man/man3/bds.3
//!   share/bash-completion/completions/bds          and zsh, fish
//!   share/doc/bds/README.md, LICENSE-APACHE, LICENSE-MIT, CHANGELOG.md
//! target/dist/bds-0.1.0-x86_64-linux.tar.gz        the same, where tar is installed
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{cargo, output, root, run, say, target_dir, which};
use crate::{abi, man3};

/// Files of the project that go into `share/doc`.
const DOCS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];
/// Shell, and where its completion script is installed.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/bds"),
    ("zsh", "share/zsh/site-functions/_bds"),
    ("fish", "share/fish/vendor_completions.d/bds.fish"),
];

/// Builds for release and lays out what a package holds: in `prefix`, or as an archive in
/// `target/dist`. `library_only`: only what a C program needs, built for development.
pub(crate) fn dist(prefix: Option<&Path>, library_only: bool) -> Result<(), String> {
    if library_only {
        let prefix = prefix.ok_or("--library-only needs --prefix DIR")?;
        run(cargo().args(["build", "--quiet", "--package", "bds-ffi"]))?;
        lay_out_library(&absolute(prefix)?, &target_dir().join("debug"))?;
        return compile_against(&absolute(prefix)?);
    }
    say("building bds (release), which takes some minutes the first time …");
    run(cargo().args(["build", "--release", "--package", "bds-cli", "--bin", "bds"]))?;
    run(cargo().args(["build", "--release", "--package", "bds-ffi"]))?;
    let built = target_dir().join("release/bds");
    if let Some(prefix) = prefix {
        let prefix = absolute(prefix)?;
        lay_out(&prefix, &built)?;
        lay_out_library(&prefix, &target_dir().join("release"))?;
        say(&format!("{}", prefix.display()));
        return compile_against(&prefix);
    }
    let name = package_name(&built)?;
    let dir = target_dir().join("dist").join(&name);
    if dir.exists() {
        fs::remove_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    lay_out(&dir, &built)?;
    lay_out_library(&dir, &target_dir().join("release"))?;
    compile_against(&dir)?;
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

/// Header, libraries, pkg-config file, manual page.
fn lay_out_library(dir: &Path, built: &Path) -> Result<(), String> {
    let write = |path: &Path, text: &str| {
        made(path.parent().unwrap_or(path))?;
        fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    let header = crate::header::path();
    copy(&header, &dir.join("include/bds.h"))?;
    copy(&header.with_extension("hpp"), &dir.join("include/bds.hpp"))?;
    let lib = made(&dir.join("lib"))?;
    let archive = built.join("libbds_ffi.a");
    copy(&archive, &lib.join("libbds.a"))?;
    let shared = abi::link_shared(&archive, &lib)?;
    let link = lib.join("libbds.so");
    // Of an earlier installation.
    let _absent = fs::remove_file(&link);
    let name = shared.file_name().ok_or("the shared library has no name")?;
    std::os::unix::fs::symlink(name, &link).map_err(|e| format!("{}: {e}", link.display()))?;
    let version = abi::version()?;
    write(&lib.join("pkgconfig/bds.pc"), &pkg_config(&version))?;
    let text = fs::read_to_string(&header).map_err(|e| format!("{}: {e}", header.display()))?;
    write(&dir.join("share/man/man3/bds.3"), &man3::page(&text, &version))
}

/// Relative to the file's own place, so that the tree can be moved.
fn pkg_config(version: &str) -> String {
    format!(
        "prefix=${{pcfiledir}}/../..\nincludedir=${{prefix}}/include\nlibdir=${{prefix}}/lib\n\n\
         Name: bds\nDescription: The block layer of QEMU as a library\nVersion: {version}\n\
         Cflags: -I${{includedir}}\nLibs: -L${{libdir}} -lbds\nLibs.private: {}\n",
        abi::NATIVE_LIBS.join(" ")
    )
}

/// An example compiles and runs against the installed tree with pkg-config alone.
fn compile_against(prefix: &Path) -> Result<(), String> {
    if which("pkg-config").is_none() || which("cc").is_none() {
        say("skipped: no example was compiled, because pkg-config or cc is not installed");
        return Ok(());
    }
    let flags = output(
        Command::new("pkg-config")
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
            .args(["--cflags", "--libs", "bds"]),
    )?;
    let dir = made(&target_dir().join("dist-example"))?;
    let program = dir.join("handles");
    let mut cc = Command::new("cc");
    cc.arg(root().join("crates/bds-ffi/examples/handles.c")).arg("-o").arg(&program);
    cc.args(flags.split_whitespace());
    run(&mut cc)?;
    output(Command::new(&program).env("LD_LIBRARY_PATH", prefix.join("lib")))?;
    say("an example compiles against the installed tree with pkg-config alone, and runs");
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))
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
