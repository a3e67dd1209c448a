//! Says why an output is incomplete, how far it got, and what was done with it.

use std::ffi::OsStr;

use bds_core::{Error, ErrorKind};

use crate::partial_output::PartialOutput;
use crate::{interrupt, report};

/// Why an output is incomplete.
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// How many bytes of it are there, if the copy had begun.
    pub(crate) done: Option<u64>,
    /// Why it could not be closed either.
    pub(crate) closing: Option<Error>,
}

impl Failure {
    /// A failure before the copy began.
    pub(crate) fn before_copy(error: Error) -> Self {
        Self { error, done: None, closing: None }
    }

    /// Removes or keeps the output, and returns an error with the cause and what was done.
    pub(crate) fn into_error(self, output: &OsStr, total: u64, partial: PartialOutput) -> Error {
        let Self { error, done, closing } = self;
        let is_kept = partial.is_kept();
        let state = match done {
            Some(done) => format!("is incomplete: {done} of {total} bytes copied"),
            None if partial.has_created() => "is incomplete".to_owned(),
            // Nothing of it was written.
            None => return error,
        };
        let outcome = partial.discard();
        let cause = match error.kind() {
            ErrorKind::Cancelled if interrupt::exit_code().is_some() => "interrupted".to_owned(),
            _ => report::message(&error),
        };
        let output = output.to_string_lossy();
        let name = if cause.contains(&*output) { String::new() } else { format!(" '{output}'") };
        let mut message = format!("{cause}; the output{name} {state}; {outcome}");
        // Irrelevant for an output that was removed.
        if let Some(closing) = closing.filter(|_| is_kept) {
            message += &format!("; closing it failed too ({})", report::message(&closing));
        }
        Error::new(error.kind(), message)
    }
}
