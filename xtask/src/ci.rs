//! `cargo xtask ci`: runs what the server runs, cheap gates first.

use crate::flags::Tier;
use crate::outcome::Outcome;
use crate::run::{cargo, run, say, say_error, target_dir};
use crate::{abi, cargo_test, dist, header, outside, test, tidy};

/// Runs the gates and the tests; a failed gate counts as a failed test and the rest still runs.
pub(crate) fn ci() -> Result<(), String> {
    let mut sum = Outcome::default();
    gate(&mut sum, "fmt", run(cargo().args(["fmt", "--all", "--", "--check"])));
    gate(&mut sum, "tidy", tidy::tidy(tidy::Show::default()));
    gate(&mut sum, "header", header::header(true));
    gate(
        &mut sum,
        "clippy",
        run(cargo().args([
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])),
    );
    gate(&mut sum, "abi", abi::check());
    gate(&mut sum, "features", features());
    gate(&mut sum, "docs", docs());
    gate(&mut sum, "packages", packages());
    gate(&mut sum, "outside", outside::outside());
    gate(&mut sum, "library", dist::dist(Some(&target_dir().join("ci-library")), true));
    sum.add(&test::all(Tier::Default, &[])?);
    cargo_test::report(&sum)
}

/// Each driver must build alone: a feature adds and never changes what is there.
fn features() -> Result<(), String> {
    let filters =
        ["blkdebug", "compress", "copy-before-write", "copy-on-read", "preallocate", "throttle"];
    for features in ["", "file", "file,raw", "file,qcow2"].into_iter().chain(filters) {
        run(cargo().args([
            "check",
            "--quiet",
            "--package",
            "bds-drivers",
            "--no-default-features",
            "--features",
            features,
        ]))?;
    }
    Ok(())
}

/// The documentation has no broken link and no other warning.
fn docs() -> Result<(), String> {
    let mut command = cargo();
    command.args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    run(&mut command)
}

/// Each crate that is published can be packed: files, metadata, versions of its dependencies. Does
/// not compile the packages: the workspace was compiled.
fn packages() -> Result<(), String> {
    let mut command = cargo();
    command.args(["package", "--quiet", "--workspace", "--no-verify", "--allow-dirty"]);
    run(command.args(["--exclude", "bds-testkit", "--exclude", "xtask"]))
}

fn gate(sum: &mut Outcome, name: &str, result: Result<(), String>) {
    match result {
        Ok(()) => {
            say(&format!("{name}: ok"));
            sum.passed += 1;
        }
        Err(why) => {
            say_error(&format!("{name}: {why}"));
            sum.fail(name);
        }
    }
}
