//! Error policies: what a job does when a request to its source or target fails.

use std::time::Duration;

use bds_core::copy::Side;
use bds_core::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// What to do when a request fails. Names are QAPI's (`BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The job fails with the error.
    #[default]
    Report,
    /// The request is tried again after a while; a job that cannot catch up later (stream) goes on
    /// and fails at its end.
    Ignore,
    /// `Stop` if there is no space left, else `Report`.
    Enospc,
    /// The job pauses itself; the request is tried again when a user resumes the job.
    Stop,
    /// As `Enospc`.
    Auto,
}

/// What a policy did. Names are QAPI's (`BlockErrorAction`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobErrorAction {
    /// Goes on.
    Ignore,
    /// Fails.
    Report,
    /// Pauses.
    Stop,
}

impl JobErrorAction {
    /// QAPI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

impl OnError {
    /// The action for an error.
    pub(crate) fn action(self, error: &Error) -> JobErrorAction {
        match self {
            Self::Report => JobErrorAction::Report,
            Self::Ignore => JobErrorAction::Ignore,
            Self::Stop => JobErrorAction::Stop,
            Self::Enospc | Self::Auto if error.kind() == ErrorKind::NoSpace => JobErrorAction::Stop,
            Self::Enospc | Self::Auto => JobErrorAction::Report,
        }
    }
}

/// QAPI's name of the operation of a side (`IoOperationType`).
pub(crate) fn operation(side: Side) -> &'static str {
    match side {
        Side::Source => "read",
        Side::Target => "write",
    }
}

/// State of a job's I/O. Names are QAPI's (`BlockDeviceIoStatus`). The first error stays until a
/// user resumes the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// No error stopped the job.
    #[default]
    Ok,
    /// A request failed.
    Failed,
    /// There was no space left.
    Nospace,
}

impl IoStatus {
    /// The status after an error that stopped a job.
    pub(crate) fn after(self, error: &Error) -> Self {
        match self {
            Self::Ok if error.kind() == ErrorKind::NoSpace => Self::Nospace,
            Self::Ok => Self::Failed,
            first => first,
        }
    }
}

/// Attempts to flush under [`OnError::Ignore`]. A write that failed is written again; a flush that
/// failed may have lost what was written, and a file then fails all later ones. So repeating it for
/// ever ends nothing.
pub const MAX_FLUSH_ATTEMPTS: u32 = 5;

/// When failed requests are tried again under [`OnError::Ignore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Wait before the first repetition; each further one of the same range waits twice as long.
    pub first_wait: Duration,
    /// Longest wait.
    pub max_wait: Duration,
    /// After so many attempts at one range the job fails; `None`: never. After
    /// [`MAX_FLUSH_ATTEMPTS`] to flush it fails in any case.
    pub max_attempts: Option<u32>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first_wait: Duration::from_millis(100),
            max_wait: Duration::from_secs(10),
            max_attempts: None,
        }
    }
}

impl RetryPolicy {
    /// Wait after this many attempts (at least 1).
    pub(crate) fn wait(&self, attempts: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(30);
        self.first_wait.saturating_mul(1 << doublings).min(self.max_wait)
    }

    /// True if no further attempt is made.
    pub(crate) fn is_exhausted(&self, attempts: u32) -> bool {
        self.max_attempts.is_some_and(|max| attempts >= max)
    }

    /// As [`RetryPolicy::is_exhausted`], for flushes: [`MAX_FLUSH_ATTEMPTS`] at most.
    pub(crate) fn is_flush_exhausted(&self, attempts: u32) -> bool {
        attempts >= MAX_FLUSH_ATTEMPTS || self.is_exhausted(attempts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_map_errors_to_actions() {
        let error = |kind| Error::new(kind, "x");
        for (policy, io, nospace) in [
            (OnError::Report, "report", "report"),
            (OnError::Ignore, "ignore", "ignore"),
            (OnError::Enospc, "report", "stop"),
            (OnError::Stop, "stop", "stop"),
            (OnError::Auto, "report", "stop"),
        ] {
            assert_eq!(policy.action(&error(ErrorKind::Io)).as_str(), io, "{policy:?}");
            assert_eq!(policy.action(&error(ErrorKind::NoSpace)).as_str(), nospace, "{policy:?}");
        }
    }

    #[test]
    fn the_first_error_stays_in_the_io_status() {
        let full = Error::new(ErrorKind::NoSpace, "x");
        let broken = Error::new(ErrorKind::Io, "x");
        assert_eq!(IoStatus::Ok.after(&full).after(&broken), IoStatus::Nospace);
        assert_eq!(IoStatus::Ok.after(&broken).after(&full), IoStatus::Failed);
    }

    #[test]
    fn waits_double_up_to_the_longest_and_attempts_end() {
        let retry = RetryPolicy { max_attempts: Some(3), ..RetryPolicy::default() };
        let waits: Vec<u128> = (1..10).map(|n| retry.wait(n).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000]);
        assert_eq!(retry.wait(u32::MAX), retry.max_wait);
        assert_eq!([1, 2, 3].map(|n| retry.is_exhausted(n)), [false, false, true]);
        assert!(retry.is_flush_exhausted(3));
        let endless = RetryPolicy::default();
        assert_eq!([4, 5].map(|n| endless.is_flush_exhausted(n)), [false, true]);
        assert!(!endless.is_exhausted(u32::MAX));
    }
}
