//! Options of a copy by map.

use std::ops::Range;
use std::sync::Arc;

use crate::copy::options::GRAIN;
use crate::driver::WriteFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeId;

use super::super::map::CopyMap;
use super::super::observer::CopyObserver;

/// Most requests of one copy in flight.
pub const MAX_REQUESTS: usize = 64;
/// Longest request that is read and written, unless a granule is longer.
pub const MAX_CHUNK: u64 = 1 << 20;
/// Longest request that the host copies, unless a granule is longer.
pub const MAX_OFFLOAD: u64 = 16 << 20;
/// Default memory budget in bytes.
pub const MEMORY: u64 = 64 << 20;

/// Options of [`super::run`].
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Copies only the granules that this range touches. `None`: the whole image.
    pub range: Option<Range<u64>>,
    /// Most requests in flight, 1 to [`MAX_REQUESTS`]. Fewer are where more would make the copy no
    /// faster, or others use the disk ([`CopyControl::is_disk_in_use`](super::CopyControl)).
    pub max_requests: usize,
    /// All requests that are allowed, from the beginning: a guest waits for the end of the copy.
    pub is_urgent: bool,
    /// Longest request in bytes; rounded down to granules, but at least one. [`MAX_CHUNK`] bounds
    /// it too, except for copies by the host.
    pub max_chunk: u64,
    /// Bytes of buffers in use at once; one request may always go.
    pub memory: u64,
    /// Only what the layers above this node decide is copied; the rest is skipped.
    pub above: Option<NodeId>,
    /// Zeros of at least this many bytes in data that was read become zero writes; 0: not looked
    /// for.
    pub sparse_len: u64,
    /// Zero writes may deallocate.
    pub may_unmap: bool,
    /// The target reads as zeros wherever this copy has not written: zeros are not written.
    pub target_is_zero: bool,
    /// Flags of data writes. With any, zeros are written as data: a zero write has no such flags.
    pub write_flags: WriteFlags,
    /// Write compressed clusters of this many bytes, one a request.
    pub compress: Option<u64>,
    /// Let the host copy where it can (copy_file_range). On some file systems the copy then shares
    /// blocks with the source: equal and independent, but both are lost with one bad block. Off for
    /// copies that must survive their source.
    pub offload: bool,
    /// Discard in the source what was copied.
    pub discard_source: bool,
    /// Sees what is written. With one, the host does not copy: it shows no bytes.
    pub observer: Option<Arc<dyn CopyObserver>>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            range: None,
            max_requests: MAX_REQUESTS,
            is_urgent: false,
            max_chunk: MAX_CHUNK,
            memory: MEMORY,
            above: None,
            sparse_len: 0,
            may_unmap: false,
            target_is_zero: false,
            write_flags: WriteFlags::empty(),
            compress: None,
            offload: false,
            discard_source: false,
            observer: None,
        }
    }
}

impl RunOptions {
    pub(super) fn check(&self, map: &CopyMap) -> Result<()> {
        let wrong = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if self.max_requests == 0 || self.max_requests > MAX_REQUESTS {
            return wrong(format!("the number of requests must be 1 to {MAX_REQUESTS}"));
        }
        if self.sparse_len != 0 && self.sparse_len < GRAIN as u64 {
            return wrong(format!("zeros are looked for in units of {GRAIN} bytes"));
        }
        let Some(unit) = self.compress else { return Ok(()) };
        if self.offload {
            return wrong("copying by the host cannot compress".to_owned());
        }
        if unit == 0 || !u64::from(map.granularity()).is_multiple_of(unit) {
            let granularity = map.granularity();
            return wrong(format!(
                "granules of {granularity} bytes are not whole compressed clusters of {unit} bytes"
            ));
        }
        Ok(())
    }

    /// Longest request in bytes, in whole granules, if more than `max` are not wanted.
    pub(super) fn chunk(&self, map: &CopyMap, max: u64, offloads: bool) -> u64 {
        let granularity = u64::from(map.granularity());
        let bound = match (self.compress, offloads) {
            (Some(_), _) => granularity,
            (None, true) => MAX_OFFLOAD,
            (None, false) => MAX_CHUNK,
        };
        let most = self.max_chunk.min(bound).min(max);
        (most - most % granularity).max(granularity)
    }
}
