//! Executes a backend's requests: admits each one, runs it, accounts it, applies the error policy,
//! perhaps repeats it.
//!
//! ```text
//!   gate ──► in flight: run ──► statistics, error policy ──► counted out ──► result
//!    ▲                                  │ stop
//!    └──── gate closed until resume ◄───┘
//! ```
//! Statistics and policy are applied while the request is still in flight, so that a drained
//! backend has accounted all of them. A stopped request is counted out and waits at the gate like a
//! later one: it is queued, not in flight.

use std::sync::Arc;
use std::time::Duration;

use bds_io::IoVec;

use super::{Backend, Inner};
use crate::driver::{Attempt, ReadFlags, WriteFlags, ZeroFlags};
use crate::error::{Error, Result};
use crate::event::ErrorAction;
use crate::graph::Edge;
use crate::request::admit::{Entered, enter_backend, named};
use crate::request::range::{self, CheckedRange};
use crate::request::{copy_on_read, dispatch, flush, zero};
use crate::stats::{Operation, Outcome, Pending};

/// What a request does, with the arguments of that kind alone.
enum RequestKind {
    Read(IoVec),
    /// With memory that the copy may use.
    CopyUp(Option<IoVec>),
    Write(IoVec, WriteFlags),
    WriteCompressed(IoVec),
    WriteZeroes(ZeroFlags),
    Discard,
    Flush,
}

/// A request, which is executed again after each stop.
pub(super) struct Request {
    operation: Operation,
    offset: u64,
    len: u64,
    kind: RequestKind,
}

impl Request {
    pub(super) fn read(offset: u64, iov: IoVec) -> Self {
        let len = iov.len() as u64;
        Self { operation: Operation::Read, offset, len, kind: RequestKind::Read(iov) }
    }

    pub(super) fn copy_up(offset: u64, len: u64, memory: Option<IoVec>) -> Self {
        Self { operation: Operation::Read, offset, len, kind: RequestKind::CopyUp(memory) }
    }

    pub(super) fn write(offset: u64, iov: IoVec, flags: WriteFlags) -> Self {
        let len = iov.len() as u64;
        Self { operation: Operation::Write, offset, len, kind: RequestKind::Write(iov, flags) }
    }

    pub(super) fn write_compressed(offset: u64, iov: IoVec) -> Self {
        let len = iov.len() as u64;
        let kind = RequestKind::WriteCompressed(iov);
        Self { operation: Operation::Write, offset, len, kind }
    }

    pub(super) fn write_zeroes(offset: u64, len: u64, flags: ZeroFlags) -> Self {
        Self { operation: Operation::Zero, offset, len, kind: RequestKind::WriteZeroes(flags) }
    }

    pub(super) fn discard(offset: u64, len: u64) -> Self {
        Self { operation: Operation::Discard, offset, len, kind: RequestKind::Discard }
    }

    pub(super) fn flush() -> Self {
        Self { operation: Operation::Flush, offset: 0, len: 0, kind: RequestKind::Flush }
    }

    /// Runs a request that has entered. Rare kinds are boxed.
    async fn run(&self, edge: &Arc<Edge>, node: &Entered<'_>) -> Result<Attempt> {
        let range = || CheckedRange::inside(node, self.offset, self.len);
        let data_range = || CheckedRange::of_data_inside(node, self.offset, self.len);
        match &self.kind {
            RequestKind::Read(iov) => {
                let (iov, flags) = (iov.clone(), ReadFlags::empty());
                dispatch::read_entered(edge, node, data_range()?, iov, flags).await?;
            }
            RequestKind::CopyUp(memory) => {
                let memory = memory.clone();
                Box::pin(copy_on_read::copy_up(edge, node, range()?, memory)).await?;
            }
            RequestKind::Write(iov, flags) => {
                dispatch::write_entered(edge, node, data_range()?, iov.clone(), *flags).await?;
            }
            RequestKind::WriteCompressed(iov) => {
                let range = data_range()?;
                let write = dispatch::write_compressed_entered(edge, node, range, iov.clone());
                Box::pin(write).await?;
            }
            RequestKind::WriteZeroes(flags) => {
                let write = zero::write_zeroes_entered(edge, node, range()?, *flags);
                return Box::pin(write).await;
            }
            RequestKind::Discard => {
                Box::pin(zero::discard_entered(edge, node, range()?)).await?;
            }
            RequestKind::Flush => flush::flush_entered(node).await?,
        }
        Ok(Attempt::Done)
    }
}

impl Backend {
    /// Executes a request in a task, again after every stop.
    pub(super) async fn execute(&self, request: Request) -> Result<Attempt> {
        let backend = self.clone();
        bds_io::spawn_now(async move { backend.execute_here(request).await }).await
    }

    /// Size of a request's future, which is the same for all kinds.
    #[cfg(test)]
    pub(in crate::request) fn task_len(&self) -> usize {
        let backend = self.clone();
        let request = Request::flush();
        size_of_val(&async move { backend.execute_here(request).await })
    }

    /// As [`Backend::execute`], for a caller that runs in a task already.
    pub(super) async fn execute_here(&self, request: Request) -> Result<Attempt> {
        let inner = &*self.inner;
        let mut pending = inner.stats.begin(request.operation, request.len);
        loop {
            let outcome = match enter_backend(&inner.edge).await {
                Ok(node) => {
                    let result = request.run(&inner.edge, &node).await;
                    inner.account(&mut pending, &request, named(&node, result))
                }
                Err(refused) => {
                    let (error, _in_flight) = refused.into_parts();
                    inner.account(&mut pending, &request, Err(error))
                }
            };
            if let Some(result) = outcome {
                return result;
            }
            // Stopped: the gate is closed by now, and the next round waits there.
        }
    }
}

impl Inner {
    /// Counts a request that ended and returns what its caller gets; `None`: nothing yet, the
    /// request is stopped.
    fn account(
        &self,
        pending: &mut Pending<'_>,
        request: &Request,
        result: Result<Attempt>,
    ) -> Option<Result<Attempt>> {
        let error = match result {
            Ok(done) => {
                pending.ended(Outcome::Done);
                return Some(Ok(done));
            }
            Err(error) => error,
        };
        match self.apply_policy(request.operation, &error) {
            ErrorAction::Stop => None,
            ErrorAction::Ignore => {
                pending.ended(Outcome::Failed);
                Some(Ok(Attempt::Done))
            }
            ErrorAction::Report => {
                pending.ended(outcome_of(&error));
                Some(Err(error))
            }
        }
    }

    /// As [`Inner::account`], for a failed inline request. `None`, stopped: the caller repeats it
    /// as a waiting request, which waits at the gate.
    #[cold]
    pub(super) fn account_inline_failure(
        &self,
        operation: Operation,
        error: Error,
        began: Option<Duration>,
    ) -> Option<Result<()>> {
        let result = match self.apply_policy(operation, &error) {
            ErrorAction::Stop => return None,
            ErrorAction::Ignore => Ok(()),
            ErrorAction::Report => Err(error),
        };
        let outcome = result.as_ref().map_or_else(outcome_of, |()| Outcome::Failed);
        self.stats.ended(operation, 0, outcome, began);
        Some(result)
    }
}

fn outcome_of(error: &Error) -> Outcome {
    if range::is_invalid(error) { Outcome::Invalid } else { Outcome::Failed }
}
