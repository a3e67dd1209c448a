//! What a failing medium means to the user: he is told, he is not told, or the request waits until he has decided.
//!
//! Only what a medium did wrong is subject to this. That there is none, or that a request made no sense or was not permitted, is
//! always told.

use super::{Backend, Inner};
use crate::error::{Error, ErrorKind};
use crate::event::{ErrorAction, Event};
use crate::stats::Operation;

/// What happens when the medium fails a request: QEMU's `rerror` and `werror`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// The request fails.
    Report,
    /// The request succeeds, and counts as failed. A read's bytes are whatever was in the buffer.
    Ignore,
    /// The request, and every one that comes later, waits for [`Backend::resume`]; then it is tried again.
    Stop,
    /// As `Stop` if space ran out, as `Report` otherwise.
    Enospc,
}

/// The policies for reads, and for everything that writes, flushes too. The default is that of QEMU's drives: reads report,
/// writes stop when space runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorPolicies {
    /// `rerror`.
    pub read: ErrorPolicy,
    /// `werror`.
    pub write: ErrorPolicy,
}

impl Default for ErrorPolicies {
    fn default() -> Self {
        Self { read: ErrorPolicy::Report, write: ErrorPolicy::Enospc }
    }
}

impl ErrorPolicies {
    /// Every failure is told, and nothing ever waits.
    pub const REPORT: Self = Self { read: ErrorPolicy::Report, write: ErrorPolicy::Report };
}

/// Why a backend's requests wait, if they do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// They do not.
    #[default]
    Ok,
    /// The medium failed.
    Failed,
    /// Its space ran out.
    NoSpace,
}

impl IoStatus {
    /// QEMU's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// What becomes of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Report,
    Ignore,
    Stop,
}

impl Backend {
    /// What a failing medium means now.
    pub fn policies(&self) -> ErrorPolicies {
        self.inner.desk().policies()
    }

    /// What a failing medium means from now on, with or without a device, until a device detaches. Requests that wait go on waiting
    /// for [`Backend::resume`]: who has requests stopped must see to it that somebody decides.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions, ErrorPolicies, IoStatus};
    ///
    /// let drive = Backend::empty(&graph, BackendOptions::default())?;
    /// drive.set_policies(ErrorPolicies::REPORT);
    /// assert_eq!(drive.io_status(), IoStatus::Ok);
    /// drive.resume(); // nothing waits: nothing happens
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn set_policies(&self, policies: ErrorPolicies) {
        self.inner.desk().policies = Some(policies);
    }

    /// Why requests wait for [`Backend::resume`], if they do. It is the first failure's since the last decision.
    pub fn io_status(&self) -> IoStatus {
        self.inner.desk().io_status
    }

    /// The user has decided: the status is good again, requests that failed are tried again, and others go on.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,fail-flush=on").await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.set_policies(ErrorPolicies { write: ErrorPolicy::Stop, ..ErrorPolicies::REPORT });
    /// guest.write_at(0, b"hello")?;
    /// let asks = guest.clone();
    /// let flush = bds_io::spawn(async move { asks.flush().await });
    /// # while guest.io_status() == IoStatus::Ok { bds_io::yield_now().await }
    /// assert_eq!(guest.io_status(), IoStatus::Failed, "the request waits for us");
    ///
    /// guest.set_policies(ErrorPolicies::REPORT);
    /// guest.resume(); // tried again, and told this time
    /// assert!(flush.await.is_err());
    /// # Ok(()) });
    /// ```
    pub fn resume(&self) {
        self.inner.resume();
    }
}

impl Inner {
    pub(super) fn resume(&self) {
        let was_stopped = {
            let mut desk = self.desk();
            desk.io_status = IoStatus::Ok;
            std::mem::take(&mut desk.is_stopped)
        };
        // Without the desk, because this wakes those who wait. A stop in between has closed the gate once more.
        if was_stopped {
            self.edge.open_gate();
        }
    }

    /// Decides, tells, and closes the gate if need be. The request is still inside.
    #[cold]
    pub(super) fn verdict(&self, operation: Operation, error: &Error) -> Verdict {
        if !is_mediums_fault(error) {
            return Verdict::Report;
        }
        let is_read = operation == Operation::Read;
        let nospace = error.kind() == ErrorKind::NoSpace;
        let verdict = {
            let mut desk = self.desk();
            let policy = if is_read { desk.policies().read } else { desk.policies().write };
            let verdict = decide(policy, nospace);
            // After the graph's end nobody could decide any more.
            let is_ended =
                self.edge.backend_in_flight().is_some_and(|in_flight| in_flight.is_ended());
            if verdict == Verdict::Stop && is_ended {
                return Verdict::Report;
            }
            if verdict == Verdict::Stop && !std::mem::replace(&mut desk.is_stopped, true) {
                desk.io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
                self.edge.close_gate();
            }
            verdict
        };
        self.events.emit(|| Event::BlockIoError {
            backend: self.name.to_string(),
            node: self.edge.medium().map(|node| node.name().to_owned()),
            is_read,
            action: verdict.action(),
            nospace,
            reason: error.to_string(),
        });
        verdict
    }
}

impl Verdict {
    fn action(self) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
        }
    }
}

fn decide(policy: ErrorPolicy, nospace: bool) -> Verdict {
    match policy {
        ErrorPolicy::Stop => Verdict::Stop,
        ErrorPolicy::Enospc if nospace => Verdict::Stop,
        ErrorPolicy::Report | ErrorPolicy::Enospc => Verdict::Report,
        ErrorPolicy::Ignore => Verdict::Ignore,
    }
}

/// Was it the medium, and not the request, nor that there is none?
fn is_mediums_fault(error: &Error) -> bool {
    use ErrorKind::{
        Cancelled, Inactive, InvalidInput, NoMedium, NotSupported, OutOfRange, ReadOnly, WouldWait,
    };
    !matches!(
        error.kind(),
        NoMedium
            | InvalidInput
            | OutOfRange
            | ReadOnly
            | Inactive
            | NotSupported
            | WouldWait
            | Cancelled
    )
}
