//! Takes a job's filters out of the graph, but waits no longer than a limit for requests that hang
//! below them.
//!
//! A change drains what it touches, with the gates of the guest closed meanwhile. Where a request
//! never ends, because an image of the guest's own disk does not answer, the job ends all the same:
//! its filters stay as they are, which pass requests on, and go once nothing is inside.

use std::pin::pin;
use std::time::Duration;

use bds_core::graph::{Change, Graph, NodeId, NodeRef};
use bds_core::{Error, ErrorKind, Result};
use futures_util::future::{Either, select};

/// As a job's `cancel_timeout`, for one that is dropped before it was started.
pub(crate) const DROP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often filters that stay are looked at.
const LATER: Duration = Duration::from_secs(1);

/// The moment until which a job that ends waits for requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Duration);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self(bds_io::now() + timeout)
    }

    /// The output of a future, or `None` if it comes too late: it is dropped then.
    pub(crate) async fn limit<F: Future>(self, future: F) -> Option<F::Output> {
        let left = self.0.saturating_sub(bds_io::now());
        match select(pin!(future), pin!(bds_io::sleep(left))).await {
            Either::Left((output, _)) => Some(output),
            Either::Right(_) => None,
        }
    }
}

/// Commits a change that drops these filters.
///
/// # Errors
/// Those of the change, and `InUse` if requests hang: then the filters go later, by themselves.
pub(crate) async fn take_out(
    filters: Vec<NodeRef>,
    change: Change,
    deadline: Deadline,
) -> Result<()> {
    let Some(first) = filters.first() else { return Ok(()) };
    let (graph, name) = (first.graph().clone(), first.name().to_owned());
    let words = "the job's filter stays in the graph";
    match deadline.limit(change.commit()).await {
        Some(done) => done.map(drop).map_err(|error| error.context(words)),
        None => {
            let ids = filters.iter().map(NodeRef::id).collect();
            drop(filters);
            bds_io::spawn(take_out_later(graph, ids)).detach();
            let why =
                "requests hang in an image below the job's filter: it is removed once they end";
            Err(Error::new(ErrorKind::InUse, why).node(name))
        }
    }
}

/// Drops the filters when no request is inside. Holds no node in between.
async fn take_out_later(graph: Graph, mut ids: Vec<NodeId>) {
    while !ids.is_empty() {
        bds_io::sleep(LATER).await;
        let mut left = Vec::new();
        for id in ids {
            // Stale: it is gone already.
            let Ok(filter) = graph.acquire(id) else { continue };
            if filter.in_flight() > 0 {
                left.push(id);
                continue;
            }
            let deadline = Deadline::after(LATER);
            match deadline.limit(graph.drop_filter(&filter)).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::warn!(node = filter.name(), %error, "a job's filter stays in the graph");
                }
                None => left.push(id),
            }
        }
        ids = left;
        let _closed = graph.reap().await;
    }
}
