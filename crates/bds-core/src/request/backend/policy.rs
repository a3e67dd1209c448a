//! Applies error policies to failed requests of a backend.
//!
//! `report` returns the error, `ignore` pretends success, `stop` holds requests until `resume`.
//!
//! Only failures of the medium are subject to this. A missing medium, and a request that was
//! invalid or not permitted, are always reported.

use super::{Backend, Inner};
use crate::error::{Error, ErrorKind};
use crate::event::{ErrorAction, Event};
use crate::stats::Operation;

/// Says what happens when the medium fails a request: QEMU's `rerror` and `werror`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorPolicy {
    /// The request fails.
    Report,
    /// The request succeeds but counts as failed. The buffer of a read is undefined.
    Ignore,
    /// The request and all later ones wait for [`Backend::resume`]; then it is repeated.
    Stop,
    /// As `Stop` if space ran out, as `Report` otherwise.
    Enospc,
}

/// Error policies of a backend: one for reads, one for writes and flushes. The default is that of
/// QEMU's drives: reads report, writes stop when space runs out.
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
    /// Reports every failure; no request is ever stopped.
    pub const REPORT: Self = Self { read: ErrorPolicy::Report, write: ErrorPolicy::Report };
}

/// Says whether a backend's requests are stopped, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoStatus {
    /// They are not stopped.
    #[default]
    Ok,
    /// The medium failed.
    Failed,
    /// The medium ran out of space.
    NoSpace,
}

impl IoStatus {
    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

impl Backend {
    /// Its error policies now.
    pub fn policies(&self) -> ErrorPolicies {
        self.inner.state().policies()
    }

    /// Sets the error policies, with or without a device, until a device detaches. Stopped requests
    /// go on waiting for [`Backend::resume`]: a caller that sets `Stop` has to provide for that.
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
        self.inner.state().policies = Some(policies);
    }

    /// Why requests wait for [`Backend::resume`], if they do: the first failure since the last one.
    pub fn io_status(&self) -> IoStatus {
        self.inner.state().io_status
    }

    /// Resumes stopped requests: resets [`Backend::io_status`], repeats the requests that failed
    /// and lets later ones go.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let text = "driver=blkdebug,node-name=disk,image.driver=mem,image.size=1M,\
    ///     inject-error.0.iotype=flush";
    /// let disk = graph.open(Options::parse(text)?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.set_policies(ErrorPolicies { write: ErrorPolicy::Stop, ..ErrorPolicies::REPORT });
    /// guest.write_at(0, b"hello")?;
    /// let asks = guest.clone();
    /// let flush = bds_io::spawn(async move { asks.flush().await });
    /// # while guest.io_status() == IoStatus::Ok { bds_io::yield_now().await }
    /// assert_eq!(guest.io_status(), IoStatus::Failed, "the request waits for us");
    ///
    /// guest.set_policies(ErrorPolicies::REPORT);
    /// guest.resume(); // tried again, and reported this time
    /// assert!(flush.await.is_err());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn resume(&self) {
        self.inner.resume();
    }
}

impl Inner {
    pub(super) fn resume(&self) {
        let was_stopped = {
            let mut state = self.state();
            state.io_status = IoStatus::Ok;
            std::mem::take(&mut state.is_stopped)
        };
        // Outside the lock, because this wakes waiters. A stop in between has closed the gate once
        // more.
        if was_stopped {
            self.edge.open_gate();
        }
    }

    /// Decides what happens to a failed request, emits the event and closes the gate for `Stop`.
    /// The request is still in flight.
    #[cold]
    pub(super) fn apply_policy(&self, operation: Operation, error: &Error) -> ErrorAction {
        if !is_medium_failure(error) {
            return ErrorAction::Report;
        }
        let is_read = operation == Operation::Read;
        let nospace = error.kind() == ErrorKind::NoSpace;
        let action = {
            let mut state = self.state();
            let policy = if is_read { state.policies().read } else { state.policies().write };
            let action = action_for(policy, nospace);
            // After a shutdown nothing could resume it.
            let is_ended =
                self.edge.backend_in_flight().is_some_and(|in_flight| in_flight.is_ended());
            if action == ErrorAction::Stop && is_ended {
                return ErrorAction::Report;
            }
            if action == ErrorAction::Stop && !std::mem::replace(&mut state.is_stopped, true) {
                state.io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
                self.edge.close_gate();
            }
            action
        };
        self.events.emit(|| Event::BlockIoError {
            backend: self.name.to_string(),
            node: self.edge.medium().map(|node| node.name().to_owned()),
            is_read,
            action,
            nospace,
            reason: error.to_string(),
        });
        action
    }
}

fn action_for(policy: ErrorPolicy, nospace: bool) -> ErrorAction {
    match policy {
        ErrorPolicy::Stop => ErrorAction::Stop,
        ErrorPolicy::Enospc if nospace => ErrorAction::Stop,
        ErrorPolicy::Report | ErrorPolicy::Enospc => ErrorAction::Report,
        ErrorPolicy::Ignore => ErrorAction::Ignore,
    }
}

/// True if the medium failed. False if there is none, or if the request was invalid, refused or
/// cancelled.
fn is_medium_failure(error: &Error) -> bool {
    use ErrorKind::{
        Cancelled, Inactive, InvalidInput, NoMedium, NotSupported, OutOfRange, PermissionDenied,
        ReadOnly, WouldWait,
    };
    if error.kind() == PermissionDenied {
        // Either the host denied access, or this user has no permission.
        return error.is_from_system();
    }
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
