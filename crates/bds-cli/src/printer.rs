//! Prints results to standard output and messages to standard error, and reports output that cannot
//! be written.
//!
//! `println!` panics on a full disk or a closed pipe, so nothing else in the tool prints. A reader
//! that has gone (`bds map x | head -1`) is no fault of the command: the rest is left out and the
//! exit code stays what it would have been. Any other failure is an error of the command, because
//! its result did not arrive.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::{Error, Result};
use serde::Serialize;
use serde_json::ser::PrettyFormatter;
use serde_json::{Serializer, Value};

/// Set once the reader of standard output has gone.
static IS_READER_GONE: AtomicBool = AtomicBool::new(false);
/// The first failure of [`progress`].
static PROGRESS_FAILURE: OnceLock<Error> = OnceLock::new();

/// Writes text to standard output, at once.
///
/// # Errors
/// If it could not be written, unless that is because its reader has gone.
#[expect(clippy::disallowed_methods, reason = "the one place that checks what it writes")]
pub(crate) fn text(text: &str) -> Result<()> {
    if is_reader_gone() {
        return Ok(());
    }
    // The flush belongs to it: what stays in the buffer until the exit fails in silence.
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            IS_READER_GONE.store(true, Ordering::Relaxed);
            Ok(())
        }
        written => written.map_err(|e| Error::io(e, "cannot write to standard output")),
    }
}

/// Writes a line to standard output.
///
/// # Errors
/// As [`text`].
pub(crate) fn line(line: impl Display) -> Result<()> {
    text(&format!("{line}\n"))
}

/// Writes a value to standard output as indented JSON.
///
/// # Errors
/// As [`text`].
pub(crate) fn json(value: &Value) -> Result<()> {
    let mut out = Vec::new();
    let mut serializer =
        Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(b"    "));
    value.serialize(&mut serializer).map_err(|e| Error::io(e.into(), "cannot print as JSON"))?;
    line(String::from_utf8_lossy(&out))
}

/// Writes text to standard output while work goes on that must not fail with it. [`progress_failure`]
/// returns the failure later.
pub(crate) fn progress(output: &str) {
    if let Err(error) = text(output) {
        let _is_first = PROGRESS_FAILURE.set(error);
    }
}

/// The first failure of [`progress`].
pub(crate) fn progress_failure() -> Option<&'static Error> {
    PROGRESS_FAILURE.get()
}

/// Whether what is printed is no longer read: a long listing can stop.
pub(crate) fn is_reader_gone() -> bool {
    IS_READER_GONE.load(Ordering::Relaxed)
}

/// Writes a line to standard error. A failure is dropped: there is no other place to report it.
pub(crate) fn message(line: impl Display) {
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}
