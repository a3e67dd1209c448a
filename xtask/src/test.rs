//! `cargo xtask test`: every test of the workspace, then the matrix; with `--tier full` also long
//! searches, loom, sanitizers and mutants.

use std::path::PathBuf;
use std::process::Command;

use crate::cargo_test::{cargo_test, report};
use crate::flags::Tier;
use crate::outcome::Outcome;
use crate::run::{cargo, output, root, target_dir, which};
use crate::{matrix, mutants};

/// Runs the tests and prints the closing line.
pub(crate) fn test(tier: Tier, rest: &[String]) -> Result<(), String> {
    let outcome = all(tier, rest)?;
    report(&outcome)
}

/// Runs the tests and returns the sum.
pub(crate) fn all(tier: Tier, rest: &[String]) -> Result<Outcome, String> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if tier != Tier::Full && std::env::var_os(PROPTEST_SEED).is_none() {
        command.env(PROPTEST_SEED, SAMPLE);
    }
    let mut sum = cargo_test("workspace", &mut command, rest)?;
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

/// Where proptest takes the seed of its cases from.
const PROPTEST_SEED: &str = "PROPTEST_RNG_SEED";
/// The seed of the ordinary run: the same cases each time, so that it fails for what was changed.
/// The full tier draws others each time.
const SAMPLE: &str = "20131";

/// The arena's models of its races.
fn loom() -> Result<Outcome, String> {
    let mut command = cargo();
    command
        .args(["test", "--release", "--package", "bds-refcount", "--test", "loom_arena"])
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", target_dir().join("loom"));
    cargo_test("loom", &mut command, &[])
}

/// The full budget of every test that has one, in a release build: a hundred thousand schedules of
/// the graph and twenty thousand sequences of commands, ten times the seeds of the sweeps at every
/// point, and all cells of the qcow2 matrix beside QEMU's tools.
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
const SEARCHES: [(&str, &[&str], &[&str]); 5] = [
    ("searches", &["bds-core", "--lib"], &["schedules", "properties"]),
    ("searches-drivers", &["bds-drivers", "--test", "it"], &["sweep", "reopen", "qcow2"]),
    ("searches-jobs", &["bds-jobs", "--test", "it"], JOBS),
    ("searches-c", &["bds-ffi", "--test", "it"], &["c_suite"]),
    ("searches-tool", &["bds-cli", "--test", "it"], &["qemu_"]),
];

/// The searches of jobs: power cuts, cycles of start and end, random commands, schedules.
const JOBS: &[&str] = &[
    "chain::power",
    "mirror::crash",
    "backup::crash",
    "cycles",
    "random",
    "races",
    "resume",
    "mirror::verbs",
    "checkpoint",
    "shutdown",
    "late_backing",
    "drained",
];

/// The buffers of bds-io, and the C library with generated calls and a million random programs,
/// under AddressSanitizer, where a nightly toolchain is installed.
fn address_sanitizer() -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    for (name, part, filters) in [
        ("asan-buffers", &["--package", "bds-io", "--tests"][..], &[][..]),
        ("asan-c", &["--package", "bds-ffi", "--test", "it"], &C_LIBRARY),
    ] {
        // The copies in Rust: the sanitizer does not see what assembly reads and writes.
        let flags = "-Zsanitizer=address --cfg bds_byte_copies";
        outcome.add(&sanitized(name, "AddressSanitizer", flags, (part, filters))?);
    }
    Ok(outcome)
}

/// Tests of the C library that take one which was built with a sanitizer.
const C_LIBRARY: [&str; 2] = ["every_function_refuses", "abuse"];

/// What runs on real threads in the graph, the arena and the C library under ThreadSanitizer, where
/// a nightly toolchain and the standard library's source are installed. The precompiled library is
/// not instrumented: with it every lock, once-cell and last `Arc` looks like a race (hundreds of
/// false reports), so that it is built anew or the tests are skipped.
fn thread_sanitizer() -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    if has_nightly() && !has_std_source() {
        outcome.skip("ThreadSanitizer needs the nightly component rust-src");
        return Ok(outcome);
    }
    for (name, part, filters) in [
        ("tsan-graph", &["--package", "bds-core", "--lib"][..], &["threads"][..]),
        ("tsan-buffers", &["--package", "bds-io", "--test", "it"], &["races"]),
        ("tsan-arena", &["--package", "bds-refcount", "--test", "threads"], &[]),
        ("tsan-c", &["--package", "bds-ffi", "--test", "it"], &["threads_"]),
    ] {
        // The copies in Rust, as for AddressSanitizer.
        let flags = "-Zsanitizer=thread --cfg bds_byte_copies";
        let part = [&["-Zbuild-std"], part].concat();
        outcome.add(&sanitized(name, "ThreadSanitizer", flags, (&part, filters))?);
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

/// Runs a part of the tests under a sanitizer. `name` is the log's; the build directory goes by its
/// first word. Optimized a little, as they take long, with debug assertions.
fn sanitized(
    name: &str,
    what: &str,
    flags: &str,
    (part, filters): (&[&str], &[&str]),
) -> Result<Outcome, String> {
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
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
        // C programs are compiled with the same one.
        .env("BDS_TEST_SANITIZER", if target == "tsan" { "thread" } else { "address" })
        .env("CARGO_TARGET_DIR", target_dir().join(target));
    let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
    cargo_test(name, &mut command, &filters)
}

fn has_nightly() -> bool {
    which("rustup").is_some()
        && Command::new("rustup")
            .args(["run", "nightly", "rustc", "--version"])
            .output()
            .is_ok_and(|output| output.status.success())
}
