//! Finds `bds` and QEMU's tools, and reads their results.

use std::path::Path;

use bds_testkit::{Output, Tool, qemu_img, qemu_io};
use serde_json::Value;

/// `bds`, as this build made it.
pub(crate) fn bds() -> Tool {
    Tool::at(env!("CARGO_BIN_EXE_bds"))
}

/// `bds` beside QEMU's tools.
pub(crate) struct Tools {
    pub(crate) bds: Tool,
    pub(crate) img: Tool,
    pub(crate) io: Tool,
}

impl Tools {
    /// All three, or a skip.
    pub(crate) fn find() -> Option<Self> {
        Some(Self { bds: bds(), img: qemu_img()?, io: qemu_io()? })
    }
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}

/// Returns exit code, output and errors of a program on one line.
pub(crate) fn outcome_line(output: &Output) -> String {
    let words = format!("{} {}", output.stdout.trim(), output.stderr.trim());
    format!("exit {}: {}", output.code, words.replace('\n', " / "))
}

/// One count of a `check --output=json`; both tools leave out those that are zero, except the
/// errors of the check itself.
#[track_caller]
pub(crate) fn count(check: &Value, key: &str) -> u64 {
    match check.get(key) {
        Some(number) => number.as_u64().unwrap_or_else(|| panic!("{key} is {number}")),
        None if check["check-errors"].is_u64() => 0,
        None => panic!("this is no report of a check: {check}"),
    }
}

/// Whether all cells are tested (`BDS_TEST_BUDGET=full`), or a sample.
pub(crate) fn is_full() -> bool {
    std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full")
}
