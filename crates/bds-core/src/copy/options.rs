//! Options and results of a copy.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeId;
use crate::request::Backend;

/// Most workers of one copy.
pub const MAX_WORKERS: usize = 16;
/// Longest buffer of a worker, in bytes.
pub const MAX_BUFFER_LEN: usize = 2 << 20;
/// Default buffer of a worker, in bytes. Short enough that data is written while it is in the
/// processor's caches: with buffers of 2 MiB a cached gigabyte took three times the processor time
/// that it takes with 512 KiB or 1 MiB.
pub const BUFFER_LEN: usize = 512 << 10;
/// Granularity of zero detection, in bytes.
pub const GRAIN: usize = 4096;

/// A source of a copy. Several are concatenated.
#[derive(Clone, Debug)]
pub struct CopySource {
    /// The backend to read.
    pub backend: Arc<Backend>,
    /// If set, copies only what the layers above this one decide; the rest of the target is left
    /// alone.
    pub above: Option<NodeId>,
}

impl From<Arc<Backend>> for CopySource {
    fn from(backend: Arc<Backend>) -> Self {
        Self { backend, above: None }
    }
}

/// Progress callback: (bytes done, bytes in all).
pub type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;
/// Rate limit callback: returns how long to wait before a piece of this many bytes.
pub type RateLimit = Arc<dyn Fn(u64) -> Duration + Send + Sync>;
/// Callback for every range that could not be read and was copied as zeros: offset, length, error.
pub type OnSalvage = Arc<dyn Fn(u64, u64, &Error) + Send + Sync>;

/// Options of a copy.
#[derive(Clone)]
pub struct CopyOptions {
    /// Pieces in flight, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Bytes of a worker's buffer, a multiple of [`GRAIN`] up to [`MAX_BUFFER_LEN`].
    pub buffer_len: usize,
    /// True if later pieces may be written before earlier ones.
    pub out_of_order: bool,
    /// Zeros of at least this many bytes in data become zero writes; 0: no zero detection, holes
    /// are written as data.
    pub sparse_len: u64,
    /// The target reads as zeros where nothing was written: zeros need not be written.
    pub target_is_zero: bool,
    /// A backend that reads as the target does before the copy (an overlay's backing image, or the
    /// target itself): bytes that are equal there are not written. Addressed by offsets of the
    /// target; behind its end are zeros.
    pub target_shows: Option<Arc<Backend>>,
    /// Zero writes may deallocate.
    pub may_unmap: bool,
    /// Write compressed clusters of this many bytes.
    pub compress: Option<u64>,
    /// Use copy offload where the host supports it.
    pub offload: bool,
    /// If set, ranges that cannot be read become zeros and this is called for them.
    pub salvage: Option<OnSalvage>,
    /// Called after every piece.
    pub progress: Option<Progress>,
    /// Called before every piece.
    pub rate_limit: Option<RateLimit>,
    /// Once set, the copy ends with `Cancelled` after the pieces in flight.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl fmt::Debug for CopyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyOptions")
            .field("workers", &self.workers)
            .field("buffer_len", &self.buffer_len)
            .field("compress", &self.compress)
            .finish_non_exhaustive()
    }
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            workers: 8,
            buffer_len: BUFFER_LEN,
            out_of_order: false,
            sparse_len: GRAIN as u64,
            target_is_zero: false,
            target_shows: None,
            may_unmap: true,
            compress: None,
            offload: false,
            salvage: None,
            progress: None,
            rate_limit: None,
            cancel: None,
        }
    }
}

/// Result of a copy, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// Length of all sources together.
    pub total: u64,
    /// Written as data (for compressed clusters: before compression), or copied by the host.
    pub written: u64,
    /// Made zero by zero writes.
    pub zeroed: u64,
    /// Left alone: undecided above the base, or zeros on a target of zeros.
    pub skipped: u64,
    /// Could not be read and became zeros.
    pub salvaged: u64,
}

/// Refuses options that are out of range or contradict each other.
pub(super) fn check_options(options: &CopyOptions) -> Result<()> {
    let wrong = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    if options.workers == 0 || options.workers > MAX_WORKERS {
        return wrong(format!("the number of workers must be 1 to {MAX_WORKERS}"));
    }
    let len = options.buffer_len;
    if len == 0 || !len.is_multiple_of(GRAIN) || len > MAX_BUFFER_LEN {
        return wrong(format!(
            "the buffer must be a multiple of {GRAIN} bytes, at most {MAX_BUFFER_LEN}"
        ));
    }
    if let Some(cluster_len) = options.compress {
        let is_sane =
            cluster_len.is_power_of_two() && (512..=MAX_BUFFER_LEN as u64).contains(&cluster_len);
        if !is_sane {
            return wrong(format!("compressed clusters of {cluster_len} bytes are not possible"));
        }
        if options.offload {
            return wrong("copying by the host cannot compress".to_owned());
        }
    }
    Ok(())
}
