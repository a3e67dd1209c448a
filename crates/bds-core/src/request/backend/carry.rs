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
use super::policy::Verdict;
use super::{Backend, Inner};
use crate::driver::{Attempt, WriteFlags, ZeroFlags};
use crate::error::{Error, Result};
use crate::graph::Edge;
use crate::request::enter::{Entered, enter_hall, named};
use crate::request::{copy_on_read, dispatch, flush, zero};
use crate::stats::{Operation, Outcome, Pending};

/// What is to be done.
pub(super) enum Work {
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
    pub(super) work: Work,
}

impl Request {
    fn operation(&self) -> Operation {
        match self.work {
            Work::Read(_) | Work::CopyUp(_) => Operation::Read,
            Work::Write(..) | Work::Compressed(_) => Operation::Write,
            Work::Zero(..) => Operation::Zero,
            Work::Discard(_) => Operation::Discard,
            Work::Flush => Operation::Flush,
        }
    }

    fn len(&self) -> u64 {
        match &self.work {
            Work::Read(iov) | Work::Write(iov, _) | Work::Compressed(iov) => iov.len() as u64,
            Work::CopyUp(len) | Work::Zero(len, _) | Work::Discard(len) => *len,
            Work::Flush => 0,
        }
    }

    /// Inside. Ways that are rarely taken are boxed.
    async fn run(&self, edge: &Arc<Edge>, node: &Entered<'_>) -> Result<Attempt> {
        let offset = self.offset;
        match &self.work {
            Work::Flush => return flush::flush_inside(node).await.map(|()| Attempt::Done),
            _ => check_end(node, offset, self.len())?,
        }
        match &self.work {
            Work::Read(iov) if node.copies_on_read() => {
                Box::pin(copy_on_read::read(edge, node, offset, iov.clone(), READ)).await?;
            }
            Work::Read(iov) => dispatch::read_inside(node, offset, iov.clone(), READ).await?,
            Work::CopyUp(len) => {
                Box::pin(copy_on_read::copy_up(edge, node, offset, *len)).await?;
            }
            Work::Write(iov, flags) => {
                dispatch::write_inside(edge, node, offset, iov.clone(), *flags).await?;
            }
            Work::Compressed(iov) => {
                let write = dispatch::write_compressed_inside(edge, node, offset, iov.clone());
                Box::pin(write).await?;
            }
            Work::Zero(len, flags) => {
                let write = zero::write_zeroes_inside(edge, node, offset, *len, *flags);
                return Box::pin(write).await;
            }
            Work::Discard(len) => {
                Box::pin(zero::discard_inside(edge, node, offset, *len)).await?;
            }
            Work::Flush => {}
        }
        Ok(Attempt::Done)
    }
}

impl Backend {
    /// Does a request, again after every stop, in a task of its own.
    pub(super) async fn carry(&self, request: Request) -> Result<Attempt> {
        let backend = self.clone();
        bds_io::spawn_now(async move { backend.carry_here(request).await }).await
    }

    /// How large a request's future is, whatever it is for.
    #[cfg(test)]
    pub(in crate::request) fn task_len(&self) -> usize {
        let backend = self.clone();
        let request = Request { offset: 0, work: Work::Flush };
        size_of_val(&async move { backend.carry_here(request).await })
    }

    /// As [`Backend::carry`], for what runs in a task already.
    pub(super) async fn carry_here(&self, request: Request) -> Result<Attempt> {
        let inner = &*self.inner;
        let mut pending = inner.stats.begin(request.operation(), request.len());
        loop {
            let verdict = match enter_hall(&inner.edge).await {
                Ok(node) => {
                    let result = request.run(&inner.edge, &node).await;
                    inner.judge(&mut pending, &request, named(&node, result))
                }
                Err(away) => {
                    let (error, _in_flight) = away.into_parts();
                    inner.judge(&mut pending, &request, Err(error))
                }
            };
            if let Some(result) = verdict {
                return result;
            }
            // Stopped: the gate is closed by now, and the next turn waits there.
        }
    }
}

impl Inner {
    /// What the user is told; `None`: nothing yet, the request waits.
    fn judge(
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
        match self.verdict(request.operation(), &error) {
            Verdict::Stop => None,
            Verdict::Ignore => {
                pending.ended(Outcome::Failed);
                Some(Ok(Attempt::Done))
            }
            Verdict::Report => {
                pending.ended(outcome_of(&error));
                Some(Err(error))
            }
        }
    }

    /// As [`Inner::judge`], for a request that did not wait. Stopped: the user asks again the waiting way, and waits.
    #[cold]
    pub(super) fn failed_inline(
        &self,
        operation: Operation,
        error: Error,
        began: Option<Duration>,
    ) -> Option<Result<()>> {
        let verdict = self.verdict(operation, &error);
        let told = match verdict {
            Verdict::Stop => return None,
            Verdict::Ignore => Ok(()),
            Verdict::Report => Err(error),
        };
        let outcome = told.as_ref().map_or_else(outcome_of, |()| Outcome::Failed);
        self.stats.ended(operation, 0, outcome, began);
        Some(told)
    }
}

fn outcome_of(error: &Error) -> Outcome {
    if is_invalid(error) { Outcome::Invalid } else { Outcome::Failed }
}
