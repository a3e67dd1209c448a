//! `CopyObserver`: sees what a copy is about to write, and may know that the target holds it.
//!
//! ```text
//! read ─► examine ─► write what is missing ─► written
//!            │ the target holds all of it: nothing is written
//! ```
//!
//! A request is examined while its range is claimed or excluded in the copy's map, so no two
//! requests of one granule are between `examine` and `written` at once. An observation that is
//! dropped says that the target may hold anything where it was missing.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bds_io::IoVec;

use super::sides::CopyWrite;
use crate::driver::BoxFuture;
use crate::error::Result;

/// What a range of the target is to hold.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// These bytes, from the offset on. They do not change while the request is under way.
    Data(&'a IoVec),
    /// Zeros, of this many bytes.
    Zeros(u64),
}

impl Content<'_> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len) => *len,
        }
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A request to be examined.
pub struct Examined<'a> {
    /// First byte.
    pub offset: u64,
    /// What is to be there.
    pub content: Content<'a>,
    /// It is written as a whole or not at all (a compressed cluster).
    pub is_unit: bool,
    /// The target, to be read.
    pub target: &'a dyn CopyWrite,
}

impl fmt::Debug for Examined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Examined")
            .field("offset", &self.offset)
            .field("len", &self.content.len())
            .field("is_unit", &self.is_unit)
            .finish_non_exhaustive()
    }
}

/// Sees the writes of a copy: those of its own requests and those that a guest's write triggers.
pub trait CopyObserver: fmt::Debug + Send + Sync {
    /// Looks at a request before the target is changed. Returns once it may be.
    ///
    /// # Errors
    /// The target must not be changed; counts as a failure of the target.
    fn examine<'a>(&'a self, request: Examined<'a>) -> BoxFuture<'a, Result<Box<dyn Observation>>>;
}

/// The outcome of [`CopyObserver::examine`].
pub trait Observation: Send {
    /// What has to be written: parts of the request, in order.
    fn missing(&self) -> &[Range<u64>];

    /// All of that was written.
    fn written(self: Box<Self>);
}

/// A request that was examined, if there is an observer.
pub struct Observed {
    observation: Option<Box<dyn Observation>>,
    whole: Range<u64>,
}

impl Observed {
    /// Lets the observer examine a request. Without one, all of it has to be written.
    ///
    /// # Errors
    /// As [`CopyObserver::examine`].
    pub async fn new(
        observer: Option<&Arc<dyn CopyObserver>>,
        request: Examined<'_>,
    ) -> Result<Self> {
        let whole = request.offset..request.offset + request.content.len();
        let observation = match observer {
            Some(observer) => Some(observer.examine(request).await?),
            None => None,
        };
        Ok(Self { observation, whole })
    }

    /// What has to be written.
    pub fn missing(&self) -> &[Range<u64>] {
        let whole = std::slice::from_ref(&self.whole);
        self.observation.as_ref().map_or(whole, |observation| observation.missing())
    }

    /// The part of `data`, which is the request's, that belongs to a missing range.
    pub fn part(&self, data: &IoVec, range: &Range<u64>) -> IoVec {
        let index = |at: u64| usize::try_from(at - self.whole.start).expect("inside the data");
        data.slice(index(range.start)..index(range.end))
    }

    /// All of that was written.
    pub fn written(self) {
        if let Some(observation) = self.observation {
            observation.written();
        }
    }
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observed").field("missing", &self.missing()).finish_non_exhaustive()
    }
}
