//! `CopyControl`: what the user of a copy decides while it runs: pauses, speed, errors.

use std::fmt;
use std::future;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::BoxFuture;
use crate::error::Error;
use crate::graph::NodeRef;

/// The side of a copy that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Reading the source.
    Source,
    /// Writing the target.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Place of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorSite {
    /// First byte of the request that failed.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Name of the node that failed; of the side's top node if the error names none.
    pub node: String,
}

/// What happens after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorVerdict {
    /// The range stays dirty and is copied again, after the rest of the round.
    Retry,
    /// The range is given up: it counts as clean.
    Skip,
    /// The copy ends with this error.
    Fail,
}

/// Controls a copy. Methods are called by the copy's own future, one at a time.
pub trait CopyControl: Send + Sync {
    /// True if the copy is to pause: it finishes what is in flight, then calls
    /// [`CopyControl::pause_point`]. Asked before each request.
    fn should_pause(&self) -> bool {
        false
    }

    /// Resolves when a pause is asked for. Awaited only where the copy waits for something else
    /// than its own requests; the default never resolves.
    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        Box::pin(future::pending())
    }

    /// Waits for the end of a pause. Nothing of the copy is in flight.
    fn pause_point(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Accounts for a request of `bytes` that has begun, and resolves when the next may begin. Also
    /// resolves when a pause is asked for.
    fn throttle(&self, _bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// True if others have used the disk since the last call: the copy then keeps its requests few
    /// and short, so that theirs do not wait. Asked before each request; see [`DiskUse`].
    fn is_disk_in_use(&self) -> bool {
        false
    }

    /// Called for `bytes` that are copied, or need no copy.
    fn copied(&self, _bytes: u64) {}

    /// Decides about a failure. Nothing of the copy is in flight, and the range is dirty again, so
    /// this may take as long as it likes (a back-off, a pause by an error policy).
    fn on_error<'a>(
        &'a self,
        _side: Side,
        _site: ErrorSite,
        _error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        Box::pin(async { ErrorVerdict::Fail })
    }
}

/// Tells whether a node was used since it was last asked, for [`CopyControl::is_disk_in_use`]. The
/// node is one that the copy's own requests do not pass.
#[derive(Debug)]
pub struct DiskUse {
    node: NodeRef,
    writes: AtomicU64,
}

impl DiskUse {
    /// Of this node.
    pub fn new(node: NodeRef) -> Self {
        let writes = AtomicU64::new(node.writes_ended());
        Self { node, writes }
    }

    /// True if a request is inside the node now, or a write has ended since the last call.
    pub fn is_used(&self) -> bool {
        let writes = self.node.writes_ended();
        self.writes.swap(writes, Ordering::Relaxed) != writes || self.node.in_flight() > 0
    }
}

/// No control: full speed, no pause, the first error ends the copy.
impl CopyControl for () {}
