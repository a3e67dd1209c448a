//! `cargo xtask ci`: everything the server runs, runnable here. Cheap gates first.

use crate::flags::Tier;
use crate::outcome::Outcome;
use crate::run::{cargo, complain, run, say};
use crate::{test, tidy};

/// Runs the gates and the tests; a failed gate counts as a failed test and the rest still runs.
pub(crate) fn ci() -> Result<(), String> {
    let mut sum = Outcome::default();
    gate(&mut sum, "fmt", run(cargo().args(["fmt", "--all", "--", "--check"])));
    gate(&mut sum, "tidy", tidy::tidy(tidy::Show::default()));
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
    gate(&mut sum, "features", features());
    sum.add(&test::all(Tier::Default, &[])?);
    test::close(&sum)
}

/// Each driver must build alone: a feature adds and never changes what is there.
fn features() -> Result<(), String> {
    let filters = ["blkdebug", "compress", "copy-on-read", "preallocate", "throttle"];
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

fn gate(sum: &mut Outcome, name: &str, result: Result<(), String>) {
    match result {
        Ok(()) => {
            say(&format!("{name}: ok"));
            sum.passed += 1;
        }
        Err(why) => {
            complain(&format!("{name}: {why}"));
            sum.fail(name);
        }
    }
}
