//! Block status of a range, for `map`, `convert` and jobs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bds_core::driver::{HostMap, Precision, StatusFlags, StatusRun};
use bds_core::error::Result;

use crate::format::qcow2::layout::entry::Kind;
use crate::format::qcow2::layout::space::Offset;
use crate::format::qcow2::meta::lookup::Run;
use crate::format::qcow2::state::Image;

/// Answers to "does the file hold less than its length?"; 0: not known yet.
const SPARSE: u8 = 1;
const DENSE: u8 = 2;

impl Image {
    /// The run at `offset`, at most `len` bytes.
    pub(crate) async fn status(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<StatusRun> {
        self.check_usable()?;
        let disk_len = self.disk_len();
        let max = len.min(disk_len.saturating_sub(offset));
        if max == 0 {
            return Ok(StatusRun { len: 0, flags: StatusFlags::EOF, map: None });
        }
        let _srcu = self.is_writable().then(|| self.srcu.read_lock());
        let first = self.find(offset, max).await?;
        let mut run = first;
        while run.len < max {
            let next = self.find(offset + run.len, max - run.len).await?;
            if !goes_on(&run, &next) {
                break;
            }
            run.len += next.len;
        }
        let mut flags = flags_of(run.kind);
        if offset + run.len == disk_len {
            flags |= StatusFlags::EOF;
        }
        let has_map = flags.contains(StatusFlags::OFFSET_VALID);
        // What was cut off is data that cannot be read, not a hole of the file.
        let is_there = run.kind == Kind::Normal && self.is_in_file(run.host, run.len);
        if is_there && precision == Precision::Exact && self.may_be_preallocated().await {
            flags |= StatusFlags::RECURSE;
        }
        let child = if self.data_file.is_some() { "data-file" } else { "file" };
        let map = has_map.then_some(HostMap { child, offset: run.host.0 });
        Ok(StatusRun { len: run.len, flags, map })
    }

    /// Does the file hold noticeably less than its length, so that clusters may be allocated and
    /// empty? Looked up once.
    async fn may_be_preallocated(&self) -> bool {
        match self.is_sparse.load(Ordering::Relaxed) {
            SPARSE => return true,
            DENSE => return false,
            _ => {}
        }
        let data = self.data();
        // An unknown answer costs precision only.
        let allocated = data.allocated_len().await.ok().flatten();
        let answer = allocated.is_some_and(|bytes| bytes < data.len() / 10 * 9);
        self.is_sparse.store(if answer { SPARSE } else { DENSE }, Ordering::Relaxed);
        answer
    }

    /// The file may hold more or less by now.
    pub(crate) fn forget_sparseness(&self) {
        self.is_sparse.store(0, Ordering::Relaxed);
    }
}

fn goes_on(run: &Run, next: &Run) -> bool {
    run.kind == next.kind
        && match run.kind {
            Kind::Compressed => true,
            kind => !kind.has_place() || next.host == run.host.plus(run.len),
        }
}

fn flags_of(kind: Kind) -> StatusFlags {
    match kind {
        Kind::Unallocated => StatusFlags::empty(),
        Kind::UnallocatedAlloc => StatusFlags::OFFSET_VALID,
        Kind::ZeroPlain => StatusFlags::ZERO | StatusFlags::ALLOCATED,
        Kind::ZeroAlloc => StatusFlags::ZERO | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID,
        Kind::Normal => StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID,
        Kind::Compressed => StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::COMPRESSED,
    }
}
