//! Options that every job has.

use std::time::Duration;

use bds_core::{Error, ErrorKind, Result};

use crate::policy::{OnError, RetryPolicy};

/// Longest id of a job, in bytes.
pub const MAX_ID_LEN: usize = 127;

/// Options that every job has; make them with [`JobOptions::new`] and `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOptions {
    /// Its id: a letter, then letters, digits, `-`, `.` and `_`, at most [`MAX_ID_LEN`] bytes;
    /// unique in its manager.
    pub id: String,
    /// Bytes a second; 0: no limit.
    pub speed: u64,
    /// False: it waits in `pending` until it is finalized, and so does its group.
    pub auto_finalize: bool,
    /// False: it stays in `concluded` until it is dismissed.
    pub auto_dismiss: bool,
    /// Policy for failed reads of the source.
    pub on_source_error: OnError,
    /// Policy for failed writes of the target.
    pub on_target_error: OnError,
    /// When failed requests are tried again.
    pub retry: RetryPolicy,
    /// How long a failed or cancelled job waits for requests in its target nodes; then the nodes
    /// are poisoned ([`NodeRef::poison`](bds_core::graph::NodeRef::poison)).
    pub cancel_timeout: Duration,
}

impl JobOptions {
    /// Options with this id, without a limit of the speed, finalized and dismissed by themselves,
    /// with errors reported.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            retry: RetryPolicy::default(),
            cancel_timeout: Duration::from_secs(5),
        }
    }

    /// # Errors
    /// `InvalidInput`: the id is not well-formed.
    pub(crate) fn check(&self) -> Result<()> {
        let id = self.id.as_str();
        let is_first = |c: char| c.is_ascii_alphabetic();
        let is_rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if id.starts_with(is_first) && id.chars().all(is_rest) && id.len() <= MAX_ID_LEN {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidInput, format!("Invalid job ID '{id}'")))
    }
}

/// Speed from QMP's signed number.
///
/// ```
/// assert_eq!(bds_jobs::speed_from_int(4096)?, 4096);
/// let error = bds_jobs::speed_from_int(-1).unwrap_err();
/// assert_eq!(error.to_string(), "Parameter 'speed' expects a non-negative value");
/// # Ok::<(), bds_core::Error>(())
/// ```
///
/// # Errors
/// `InvalidInput`: it is negative.
pub fn speed_from_int(speed: i64) -> Result<u64> {
    let message = "Parameter 'speed' expects a non-negative value";
    u64::try_from(speed).map_err(|_| Error::new(ErrorKind::InvalidInput, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked() {
        for good in ["a", "job0", "B-1._x"] {
            assert!(JobOptions::new(good).check().is_ok(), "{good}");
        }
        for bad in ["", "0a", "-a", "a b", "ä", "a/b", &"a".repeat(MAX_ID_LEN + 1)] {
            let error = JobOptions::new(bad).check().unwrap_err();
            assert_eq!(error.to_string(), format!("Invalid job ID '{bad}'"));
        }
    }
}
