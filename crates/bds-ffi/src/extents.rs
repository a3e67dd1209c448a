//! Block status as runs of bytes for C.

use bds_core::Result;
use bds_core::driver::{Precision, StatusFlags};
use bds_core::graph::NodeId;
use bds_core::request::{Backend, ChainRun};
use bds_io::IoVec;

use crate::abi::bds_extent;

/// Bytes of an extent.
pub(crate) const EXTENT_LEN: usize = size_of::<bds_extent>();

/// What a block status asks about.
#[derive(Clone, Copy)]
pub(crate) struct Question {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Only layers above this node are asked.
    pub(crate) base: Option<NodeId>,
    /// Most extents of the answer.
    pub(crate) capacity: usize,
}

/// Describes the range, extent by extent; returns how many there were.
pub(crate) async fn describe(
    backend: &Backend,
    question: Question,
    mut give: impl FnMut(usize, bds_extent),
) -> Result<usize> {
    let Question { offset: mut at, len: mut left, base, capacity } = question;
    let mut count = 0;
    while left > 0 && count < capacity {
        let run = match base {
            None => backend.block_status(at, left, Precision::Exact).await?,
            Some(base) => backend.status_above(base, at, left, Precision::Exact).await?,
        };
        if run.len == 0 {
            break;
        }
        give(count, extent(at, &run));
        count += 1;
        at += run.len;
        left = left.saturating_sub(run.len);
    }
    Ok(count)
}

/// As `describe`, into an array of C's that a request owns.
pub(crate) async fn describe_into(
    backend: &Backend,
    question: Question,
    array: &IoVec,
) -> Result<usize> {
    describe(backend, question, |index, extent| array.copy_from(index * EXTENT_LEN, &bytes(extent)))
        .await
}

/// The run as C sees it.
pub(crate) fn extent(offset: u64, run: &ChainRun) -> bds_extent {
    let known = StatusFlags::DATA
        | StatusFlags::ZERO
        | StatusFlags::ALLOCATED
        | StatusFlags::EOF
        | StatusFlags::COMPRESSED;
    let mut flags = run.flags & known;
    flags.set(StatusFlags::OFFSET_VALID, run.host.is_some());
    let is_decided = flags.contains(StatusFlags::ALLOCATED);
    bds_extent {
        offset,
        bytes: run.len,
        map_offset: run.host.as_ref().map_or(0, |host| host.offset),
        node_id: if is_decided { run.node.to_u64() } else { 0 },
        flags: flags.bits(),
        depth: u32::try_from(run.depth).unwrap_or(u32::MAX),
    }
}

/// The extent as it lies in memory.
#[expect(clippy::host_endian_bytes, reason = "a struct in this process's memory")]
fn bytes(extent: bds_extent) -> [u8; EXTENT_LEN] {
    let bds_extent { offset, bytes, map_offset, node_id, flags, depth } = extent;
    let mut out = [0; EXTENT_LEN];
    let (words, halves) = out.split_at_mut(32);
    for (place, word) in words.chunks_exact_mut(8).zip([offset, bytes, map_offset, node_id]) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    for (place, half) in halves.chunks_exact_mut(4).zip([flags, depth]) {
        place.copy_from_slice(&half.to_ne_bytes());
    }
    out
}
