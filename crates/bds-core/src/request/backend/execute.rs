//! One request's way: through the gate, to the medium, and what its end means to the user.
//!
//! ```text
//!   gate ──► inside: work ──► verdict, books ──► out ──► the user
//!    ▲                          │ stop
//!    └── gate closed until resume ◄┘
//! ```
//! The verdict is given, and the books are written, while the request still counts as in flight: whoever has drained the backend sees all of
//! it. A request that is stopped leaves, and waits at the gate like one that came later; so it is queued, not in flight.

use std::sync::Arc;
use std::time::Duration;

use bds_io::IoVec;

use super::io::{READ, check_end, is_invalid};
use super::{Backend, Inner};
use crate::driver::{Attempt, WriteFlags, ZeroFlags};
use crate::error::{Error, Result};
use crate::event::ErrorAction;
use crate::graph::Edge;
use crate::request::admit::{Entered, enter_backend, named};
use crate::request::{copy_on_read, dispatch, flush, zero};
use crate::stats::{Operation, Outcome, Pending};

/// What is to be done.
pub(super) enum RequestKind {
    Read(IoVec),
    CopyUp(u64),
    Write(IoVec, WriteFlags),
    Compressed(IoVec),
    Zero(u64, ZeroFlags),
    Discard(u64),
    Flush,
}

/// A request, which may have to be done more than once.
pub(super) struct Request {
    pub(super) offset: u64,
    pub(super) work: RequestKind,
}

impl Request {
    fn operation(&self) -> Operation {
        match self.work {
            RequestKind::Read(_) | RequestKind::CopyUp(_) => Operation::Read,
            RequestKind::Write(..) | RequestKind::Compressed(_) => Operation::Write,
            RequestKind::Zero(..) => Operation::Zero,
            RequestKind::Discard(_) => Operation::Discard,
            RequestKind::Flush => Operation::Flush,
        }
    }

    fn len(&self) -> u64 {
        match &self.work {
            RequestKind::Read(iov) | RequestKind::Write(iov, _) | RequestKind::Compressed(iov) => {
                iov.len() as u64
            }
            RequestKind::CopyUp(len) | RequestKind::Zero(len, _) | RequestKind::Discard(len) => {
                *len
            }
            RequestKind::Flush => 0,
        }
    }

    /// Inside. Ways that are rarely taken are boxed.
    async fn run(&self, edge: &Arc<Edge>, node: &Entered<'_>) -> Result<Attempt> {
        let offset = self.offset;
        match &self.work {
            RequestKind::Flush => return flush::flush_inside(node).await.map(|()| Attempt::Done),
            _ => check_end(node, offset, self.len())?,
        }
        match &self.work {
            RequestKind::Read(iov) if node.copies_on_read() => {
                Box::pin(copy_on_read::read(edge, node, offset, iov.clone(), READ)).await?;
            }
            RequestKind::Read(iov) => {
                dispatch::read_inside(node, offset, iov.clone(), READ).await?
            }
            RequestKind::CopyUp(len) => {
                Box::pin(copy_on_read::copy_up(edge, node, offset, *len)).await?;
            }
            RequestKind::Write(iov, flags) => {
                dispatch::write_inside(edge, node, offset, iov.clone(), *flags).await?;
            }
            RequestKind::Compressed(iov) => {
                let write = dispatch::write_compressed_inside(edge, node, offset, iov.clone());
                Box::pin(write).await?;
            }
            RequestKind::Zero(len, flags) => {
                let write = zero::write_zeroes_inside(edge, node, offset, *len, *flags);
                return Box::pin(write).await;
            }
            RequestKind::Discard(len) => {
                Box::pin(zero::discard_inside(edge, node, offset, *len)).await?;
            }
            RequestKind::Flush => {}
        }
        Ok(Attempt::Done)
    }
}

impl Backend {
    /// Does a request, again after every stop, in a task of its own.
    pub(super) async fn execute(&self, request: Request) -> Result<Attempt> {
        let backend = self.clone();
        bds_io::spawn_now(async move { backend.execute_here(request).await }).await
    }

    /// How large a request's future is, whatever it is for.
    #[cfg(test)]
    pub(in crate::request) fn task_len(&self) -> usize {
        let backend = self.clone();
        let request = Request { offset: 0, work: RequestKind::Flush };
        size_of_val(&async move { backend.execute_here(request).await })
    }

    /// As [`Backend::execute`], for what runs in a task already.
    pub(super) async fn execute_here(&self, request: Request) -> Result<Attempt> {
        let inner = &*self.inner;
        let mut pending = inner.stats.begin(request.operation(), request.len());
        loop {
            let action = match enter_backend(&inner.edge).await {
                Ok(node) => {
                    let result = request.run(&inner.edge, &node).await;
                    inner.apply_policy(&mut pending, &request, named(&node, result))
                }
                Err(away) => {
                    let (error, _in_flight) = away.into_parts();
                    inner.apply_policy(&mut pending, &request, Err(error))
                }
            };
            if let Some(result) = action {
                return result;
            }
            // Stopped: the gate is closed by now, and the next turn waits there.
        }
    }
}

impl Inner {
    /// What the user is told; `None`: nothing yet, the request waits.
    fn apply_policy(
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
        match self.error_action(request.operation(), &error) {
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

    /// As [`Inner::apply_policy`], for a request that did not wait. Stopped: the user asks again the waiting way, and waits.
    #[cold]
    pub(super) fn failed_inline(
        &self,
        operation: Operation,
        error: Error,
        began: Option<Duration>,
    ) -> Option<Result<()>> {
        let action = self.error_action(operation, &error);
        let told = match action {
            ErrorAction::Stop => return None,
            ErrorAction::Ignore => Ok(()),
            ErrorAction::Report => Err(error),
        };
        let outcome = told.as_ref().map_or_else(outcome_of, |()| Outcome::Failed);
        self.stats.ended(operation, 0, outcome, began);
        Some(told)
    }
}

fn outcome_of(error: &Error) -> Outcome {
    if is_invalid(error) { Outcome::Invalid } else { Outcome::Failed }
}
