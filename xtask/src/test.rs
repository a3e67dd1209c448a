//! `cargo xtask test`: every test of the workspace, then the matrix; with `--tier full` also long searches, loom, sanitizers and mutants.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use crate::flags::Tier;
use crate::outcome::{Counter, Outcome};
use crate::run::{cargo, complain, output, root, say, stream, target_dir, which};
use crate::{matrix, mutants};

/// Runs the tests and prints the closing line.
pub(crate) fn test(tier: Tier, rest: &[String]) -> Result<(), String> {
    let outcome = all(tier, rest)?;
    close(&outcome)
}

/// Runs the tests and returns the sum.
pub(crate) fn all(tier: Tier, rest: &[String]) -> Result<Outcome, String> {
    let mut sum =
        cargo_test("workspace", cargo().args(["test", "--workspace", "--no-fail-fast"]), rest)?;
    if tier != Tier::Quick && rest.is_empty() {
        sum.add(&matrix::cells(&[])?);
    }
    if tier == Tier::Full {
        sum.add(&searches()?);
        sum.add(&loom()?);
        sum.add(&address_sanitizer()?);
        sum.add(&thread_sanitizer()?);
        sum.add(&mutants::mutants()?);
    }
    Ok(sum)
}

/// Says why tests were skipped, what failed, and the line that counts.
pub(crate) fn close(outcome: &Outcome) -> Result<(), String> {
    for (why, count) in &outcome.reasons {
        say(&format!("skipped {count}: {why}"));
    }
    for name in &outcome.failures {
        say(&format!("FAILED  {name}"));
    }
    say(&outcome.line());
    if outcome.failed > 0 {
        return Err(format!("{} failed; full output under {}", outcome.failed, logs().display()));
    }
    if outcome.passed == 0 {
        return Err("no test ran".into());
    }
    Ok(())
}

/// Runs one `cargo test` command, counting and showing how it goes; its full output goes to a log.
pub(crate) fn cargo_test(
    name: &str,
    command: &mut Command,
    rest: &[String],
) -> Result<Outcome, String> {
    counted(name, command, rest, |line| {
        if shown(line) {
            say(line.trim_end());
        }
    })
}

/// The same without a word; the full output goes to a log.
pub(crate) fn quiet_cargo_test(
    name: &str,
    command: &mut Command,
    rest: &[String],
) -> Result<Outcome, String> {
    counted(name, command, rest, |_| {})
}

fn counted(
    name: &str,
    command: &mut Command,
    rest: &[String],
    each: impl Fn(&str),
) -> Result<Outcome, String> {
    let path = logs().join(format!("{name}.log"));
    fs::create_dir_all(logs()).map_err(|e| format!("cannot make {}: {e}", logs().display()))?;
    let mut log =
        File::create(&path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    command.args(["--", "--show-output"]).args(rest);
    let mut counter = Counter::default();
    let ended_well = stream(command, &mut log, |line| {
        counter.line(line);
        each(line);
    });
    let mut outcome = counter.finish();
    let ended_well = ended_well.map_err(|e| format!("cannot run cargo: {e}"))?;
    if !ended_well && outcome.failed == 0 {
        complain(&format!(
            "{name}: did not build or was ended by a signal; see {}",
            path.display()
        ));
        outcome.fail(&format!("{name} (see {})", path.display()));
    }
    Ok(outcome)
}

/// Lines worth a person's eye while the run goes on.
fn shown(line: &str) -> bool {
    let trimmed = line.trim_start();
    trimmed.starts_with("Running ")
        || trimmed.starts_with("Doc-tests ")
        || trimmed.starts_with("test result: ")
        || trimmed.starts_with("error")
        || trimmed.starts_with("panicked at")
        || trimmed.starts_with("thread '")
        || line.ends_with(" ... FAILED")
}

/// The arena's models of its races.
fn loom() -> Result<Outcome, String> {
    let mut command = cargo();
    command
        .args(["test", "--release", "--package", "bds-refcount", "--test", "loom_arena"])
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", target_dir().join("loom"));
    cargo_test("loom", &mut command, &[])
}

/// The full budget of every test that has one, in a release build: a hundred thousand schedules of the graph and twenty thousand sequences
/// of commands, ten times the seeds of the sweeps at every point, and all cells of the qcow2 matrix beside QEMU's tools.
fn searches() -> Result<Outcome, String> {
    let mut sum = Outcome::default();
    for (name, part, filters) in SEARCHES {
        let mut command = cargo();
        command.args(["test", "--release", "--package"]).args(part).env("BDS_TEST_BUDGET", "full");
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        sum.add(&cargo_test(name, &mut command, &filters)?);
    }
    Ok(sum)
}

/// Name of the log, package and test binary, filters.
const SEARCHES: [(&str, &[&str], &[&str]); 3] = [
    ("searches", &["bds-core", "--lib"], &["schedules", "properties"]),
    ("searches-drivers", &["bds-drivers", "--test", "it"], &["sweep", "reopen", "qcow2"]),
    ("searches-tool", &["bds-cli", "--test", "it"], &["qemu_"]),
];

/// The cellar's buffers under AddressSanitizer, where a nightly toolchain is installed.
fn address_sanitizer() -> Result<Outcome, String> {
    sanitized(
        "asan",
        "AddressSanitizer",
        // The copies in Rust: the sanitizer does not see what assembly reads and writes.
        "-Zsanitizer=address --cfg bds_byte_copies",
        &["--package", "bds-io", "--tests"],
    )
}

/// What runs on real threads in the graph and in the arena under ThreadSanitizer, where a nightly toolchain and the standard library's
/// source are installed. The precompiled library is not instrumented: with it every lock, once-cell and last `Arc` looks like a race
/// (hundreds of false reports), so that it is built anew or the tests are skipped.
fn thread_sanitizer() -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    if has_nightly() && !has_std_source() {
        outcome.skip("ThreadSanitizer needs the nightly component rust-src");
        return Ok(outcome);
    }
    for (name, part) in [
        ("tsan-graph", &["-Zbuild-std", "--package", "bds-core", "--lib", "threads"][..]),
        ("tsan-buffers", &["-Zbuild-std", "--package", "bds-io", "--test", "it", "races"][..]),
        ("tsan-arena", &["-Zbuild-std", "--package", "bds-refcount", "--test", "threads"][..]),
    ] {
        // The copies in Rust, as for AddressSanitizer.
        let flags = "-Zsanitizer=thread --cfg bds_byte_copies";
        outcome.add(&sanitized(name, "ThreadSanitizer", flags, part)?);
    }
    Ok(outcome)
}

fn has_std_source() -> bool {
    let sysroot =
        output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    sysroot.is_ok_and(|path| {
        PathBuf::from(path.trim()).join("lib/rustlib/src/rust/library/std/src/lib.rs").exists()
    })
}

/// Runs a part of the tests under a sanitizer. `name` is the log's; the build directory goes by its first word.
fn sanitized(name: &str, what: &str, flags: &str, part: &[&str]) -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    if !has_nightly() {
        outcome.skip(&format!("{what} needs the nightly toolchain"));
        return Ok(outcome);
    }
    let target = name.split('-').next().unwrap_or(name);
    let mut command = Command::new("rustup");
    command
        .current_dir(root())
        .args(["run", "nightly", "cargo", "test", "--target", "x86_64-unknown-linux-gnu"])
        .args(part)
        .env_remove("CARGO")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env("RUSTFLAGS", flags)
        .env("CARGO_TARGET_DIR", target_dir().join(target));
    cargo_test(name, &mut command, &[])
}

fn has_nightly() -> bool {
    which("rustup").is_some()
        && Command::new("rustup")
            .args(["run", "nightly", "rustc", "--version"])
            .output()
            .is_ok_and(|output| output.status.success())
}

fn logs() -> PathBuf {
    target_dir().join("xtask")
}
