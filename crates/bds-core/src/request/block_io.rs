//! Reads and writes whole blocks of one node: widens reads, splits at the node's limits, calls the
//! driver.
//!
//! A request that is longer than the node takes at once goes down in pieces; a vector with too many
//! segments goes through a copy. Neither knows about permissions or copy-on-read: `dispatch` and
//! `copy_on_read` do.

use bds_io::{Buf, IoVec};

use super::admit::{Admission, Entered, RequestScope};
use super::align::{PadBuf, Padded};
use super::range::{self, CheckedRange, round_down, round_up};
use crate::driver::{Limits, ReadFlags, WriteFlags};
use crate::error::Result;
use crate::graph::Node;

/// A vector with more segments than the node takes goes down in pieces of this size, through a
/// copy.
const BOUNCE_LEN: u64 = 1 << 20;

/// Reads a range of any alignment, without copy-on-read; bytes past the end of the node are zeros.
pub(super) async fn read(
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let limits = node.limits();
    let bytes = range.start..range.end;
    let (outer, iov) = match Padded::new(&bytes, limits.request_alignment) {
        None => (bytes, iov),
        // The bytes around the request go to a buffer that is thrown away.
        Some(padded) => {
            let joined = padded.join(&padded.buffer(limits.memory_alignment), iov);
            (padded.outer, joined)
        }
    };
    let start = outer.start;
    let _scope = node.admit(Admission::read(outer)).await?;
    read_aligned(node, &limits, start, iov, flags).await
}

/// Reads an aligned, registered range. Beyond the node's end (rounded up) the driver is not called.
pub(super) async fn read_aligned(
    node: &Node,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    let len = iov.len();
    let reach = round_up(node.len(), u64::from(limits.request_alignment));
    let stored = usize::try_from(reach.saturating_sub(offset)).map_or(len, |n| n.min(len));
    if stored < len {
        iov.fill(stored..len, 0);
    }
    if stored == 0 {
        return Ok(());
    }
    let piece_len = piece_len(limits, &iov);
    if stored == len && len <= piece_len && is_short_enough(limits, &iov) {
        return node.driver().read(offset, iov, flags).await;
    }
    Box::pin(read_pieces(node, limits, offset, iov.slice(0..stored), flags, piece_len)).await
}

async fn read_pieces(
    node: &Node,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
    flags: ReadFlags,
    piece_len: usize,
) -> Result<()> {
    let (mut done, stored) = (0, iov.len());
    while done < stored {
        let next = stored.min(done + piece_len);
        let piece = iov.slice(done..next);
        let at = offset + done as u64;
        if is_short_enough(limits, &piece) {
            node.driver().read(at, piece, flags).await?;
        } else {
            let bounce = Buf::zeroed(piece.len(), bounce_align(limits)).iov();
            node.driver().read(at, bounce.clone(), flags).await?;
            piece.copy_from_iov(0, &bounce);
        }
        done = next;
    }
    Ok(())
}

/// Reads the blocks around a widened write, whose range is registered as serialising.
pub(super) async fn read_around(node: &Node, limits: &Limits, padded: &Padded) -> Result<PadBuf> {
    let pad = padded.buffer(limits.memory_alignment);
    for read in padded.reads() {
        let place = padded.place(&pad, &read);
        read_aligned(node, limits, read.start, place, ReadFlags::empty())
            .await
            .map_err(|e| e.context("cannot read what an unaligned write must keep"))?;
    }
    Ok(pad)
}

/// Whether a write needs neither widening nor pieces.
pub(super) fn is_plain(limits: &Limits, range: CheckedRange, iov: &IoVec) -> bool {
    Padded::new(&(range.start..range.end), limits.request_alignment).is_none()
        && is_one_piece(limits, iov)
}

/// The flags that the driver takes of a write, and whether a flush must follow because it does not
/// take `FUA`.
pub(super) fn split_flags(node: &Node, flags: WriteFlags) -> (WriteFlags, bool) {
    let fua = flags.contains(WriteFlags::FUA) && !node.flags().cache.no_flush;
    let mut native = flags & node.driver().write_flags();
    native.set(WriteFlags::FUA, fua && native.contains(WriteFlags::FUA));
    (native, fua && !native.contains(WriteFlags::FUA))
}

/// Writes an aligned range in its scope. True if a flush must follow.
pub(super) async fn write_aligned(
    scope: &RequestScope<'_>,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
    flags: WriteFlags,
) -> Result<bool> {
    let (native, wants_flush) = split_flags(scope.node(), flags);
    if is_one_piece(limits, &iov) {
        let len = iov.len() as u64;
        scope.run_paced(len, |node| node.driver().write(offset, iov, native)).await?;
    } else {
        let piece_len = piece_len(limits, &iov);
        Box::pin(write_pieces(scope, limits, offset, iov, native, piece_len)).await?;
    }
    Ok(wants_flush)
}

async fn write_pieces(
    scope: &RequestScope<'_>,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
    flags: WriteFlags,
    piece_len: usize,
) -> Result<()> {
    let (mut done, len) = (0, iov.len());
    while done < len {
        let next = len.min(done + piece_len);
        let mut piece = iov.slice(done..next);
        if !is_short_enough(limits, &piece) {
            let bounce = Buf::zeroed(piece.len(), bounce_align(limits)).iov();
            bounce.copy_from_iov(0, &piece);
            piece = bounce;
        }
        let at = offset + done as u64;
        let piece_len = piece.len() as u64;
        scope.run_paced(piece_len, |node| node.driver().write(at, piece, flags)).await?;
        done = next;
    }
    Ok(())
}

/// How long a piece may be, a multiple of the request alignment.
fn piece_len(limits: &Limits, iov: &IoVec) -> usize {
    let align = u64::from(limits.request_alignment);
    let mut len = if limits.max_transfer == 0 { range::MAX_REQUEST } else { limits.max_transfer };
    if !is_short_enough(limits, iov) {
        len = len.min(BOUNCE_LEN);
    }
    usize::try_from(round_down(len, align).max(align)).unwrap_or(usize::MAX)
}

fn is_one_piece(limits: &Limits, iov: &IoVec) -> bool {
    iov.len() <= piece_len(limits, iov) && is_short_enough(limits, iov)
}

fn is_short_enough(limits: &Limits, iov: &IoVec) -> bool {
    limits.max_iov == 0 || iov.segments().len() <= limits.max_iov as usize
}

/// Alignment of a buffer that stands in for the caller's.
pub(super) fn bounce_align(limits: &Limits) -> usize {
    (limits.memory_alignment as usize).max(512)
}
