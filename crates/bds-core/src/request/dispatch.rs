//! Reads and writes, the steps in order.
//!
//! A write that must be widened excludes everything that overlaps the widened range from before its reads until its
//! write is done; if one of its reads fails, nothing is written.
//!
//! Ways that are rarely taken are boxed: every layer's future holds the next one's, and most requests are plain.

use std::sync::Arc;

use bds_io::{Buf, IoVec};

use super::align::{PadBuf, Padded};
use super::begun::Inside;
use super::enter::{Entered, enter, named};
use super::range::{self, round_down, round_up};
use super::{copy_on_read, flush, zero};
use crate::driver::{DetectZeroes, Limits, ReadFlags, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::graph::{Edge, Node, Perm};

/// A vector with more segments than the node takes goes down in pieces of this size, through a copy.
const BOUNCE_LEN: u64 = 1 << 20;

/// Reads at once, or declines. Takes no lock, allocates nothing, never waits. `done` gets the result while the request still
/// counts as inside.
#[inline]
pub(super) fn try_read<T>(
    edge: &Edge,
    offset: u64,
    iov: &IoVec,
    done: impl FnOnce(Result<()>) -> T,
) -> Option<T> {
    let ticket = edge.ticket()?;
    let target = edge.medium()?;
    let node: &Node = &target;
    let _inline = node.tracker().try_inline()?;
    if !edge.admits(ticket) {
        return None;
    }
    fits_inline(node, offset, iov)?;
    // Past the end there are zeros to make up; the other way does that.
    if offset + iov.len() as u64 > node.driver().len() || node.copies_on_read() {
        return None;
    }
    let result = node.driver().try_read(offset, iov)?;
    Some(done(named(node, result)))
}

/// Writes in place at once, or declines with nothing changed. Otherwise as [`try_read`].
#[inline]
pub(super) fn try_write<T>(
    edge: &Edge,
    offset: u64,
    iov: &IoVec,
    done: impl FnOnce(Result<()>) -> T,
) -> Option<T> {
    let ticket = edge.ticket()?;
    let target = edge.medium()?;
    let node: &Node = &target;
    let inline = node.tracker().try_inline()?;
    if !edge.admits(ticket) {
        return None;
    }
    fits_inline(node, offset, iov)?;
    let end = offset + iov.len() as u64;
    if end > node.driver().len()
        || end > node.write_threshold_or_max()
        || node.flags().detect_zeroes != DetectZeroes::Off
        || !node.is_writable()
        || !edge.access().perm.contains(Perm::WRITE)
    {
        return None;
    }
    let result = node.driver().try_write(offset, iov)?;
    inline.wrote();
    Some(done(named(node, result)))
}

/// One fragment, aligned, not empty, and its end can be computed.
#[inline]
fn fits_inline(node: &Node, offset: u64, iov: &IoVec) -> Option<()> {
    let limits = node.limits();
    let len = iov.len() as u64;
    if node.is_poisoned() {
        return None;
    }
    let fits = (offset | len) & (u64::from(limits.request_alignment) - 1) == 0
        && len != 0
        && (limits.max_transfer == 0 || len <= limits.max_transfer)
        && offset < range::MAX_LEN
        && len <= range::MAX_REQUEST
        && (limits.max_iov == 0 || iov.segments().len() <= limits.max_iov as usize);
    fits.then_some(())
}

/// Reads; bytes past the end are zeros.
pub(super) async fn read(
    edge: &Arc<Edge>,
    offset: u64,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    let node = enter(edge).await?;
    let read = if flags.contains(ReadFlags::COPY_ON_READ) || node.copies_on_read() {
        Box::pin(copy_on_read::read(edge, &node, offset, iov, flags)).await
    } else {
        read_inside(&node, offset, iov, flags).await
    };
    named(&node, read)
}

/// As [`read`], for a request that is inside already, and without copying.
pub(super) async fn read_inside(
    node: &Entered<'_>,
    offset: u64,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    let end = range::check_data(offset, iov.len() as u64)?;
    if end == offset {
        return Ok(());
    }
    let limits = node.limits();
    let (outer, iov) = match Padded::new(&(offset..end), limits.request_alignment) {
        None => (offset..end, iov),
        // What lies around goes to a buffer that nobody looks at.
        Some(padded) => {
            let joined = padded.join(&padded.buffer(limits.memory_alignment), iov);
            (padded.outer, joined)
        }
    };
    let _tracked = node.track(outer.clone(), false).await;
    read_aligned(node, &limits, outer.start, iov, flags).await
}

/// The range is aligned and registered. Beyond the node's (rounded up) end the driver is not asked.
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

/// Writes.
pub(super) async fn write(edge: &Edge, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, write_inside(edge, &node, offset, iov, flags).await)
}

/// As [`write`], for a request that is inside already.
pub(super) async fn write_inside(
    edge: &Edge,
    node: &Entered<'_>,
    offset: u64,
    iov: IoVec,
    flags: WriteFlags,
) -> Result<()> {
    let end = range::check_data(offset, iov.len() as u64)?;
    range::check_write(edge, node, end, flags.contains(WriteFlags::UNCHANGED))?;
    if end == offset {
        return Ok(());
    }
    if let Some(zero_flags) = detected_zeroes(node, &iov, flags) {
        // From here on the caller's memory is not looked at again: it may change, the decision may not.
        let zeroed = zero::write_zeroes_inside(edge, node, offset, end - offset, zero_flags);
        let _done = Box::pin(zeroed).await?;
        return Ok(());
    }
    let wants_flush = {
        let limits = node.limits();
        let padded = Padded::new(&(offset..end), limits.request_alignment);
        let serialising = padded.is_some() || flags.contains(WriteFlags::SERIALISING);
        let outer = padded.as_ref().map_or(offset..end, |p| p.outer.clone());
        let no_wait = flags.contains(WriteFlags::NO_WAIT);
        let tracked = node.track_unless(outer.clone(), serialising, no_wait).await?;
        let iov = match padded {
            None => iov,
            Some(padded) => {
                let pad = Box::pin(read_around(node, &limits, &padded)).await?;
                padded.join(&pad, iov)
            }
        };
        let _writing = node.writing();
        let inside = Inside::new(node, &tracked);
        write_aligned(&inside, &limits, outer.start, iov, flags).await?
    };
    if wants_flush { Box::pin(flush::flush_inside(node)).await } else { Ok(()) }
}

/// Zero flags for a write that turns out to be all zeros on a node that wants to know.
fn detected_zeroes(node: &Node, iov: &IoVec, flags: WriteFlags) -> Option<ZeroFlags> {
    let mut zero_flags = match node.flags().detect_zeroes {
        DetectZeroes::Off => return None,
        DetectZeroes::On => ZeroFlags::empty(),
        DetectZeroes::Unmap => ZeroFlags::MAY_UNMAP,
    };
    // A serialising zero write does not exist; and without the operation nothing is gained.
    if flags.contains(WriteFlags::SERIALISING)
        || node.driver().zero_flags().is_none()
        || !iov.is_zero(0..iov.len())
    {
        return None;
    }
    zero_flags.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
    zero_flags.set(ZeroFlags::UNCHANGED, flags.contains(WriteFlags::UNCHANGED));
    zero_flags.set(ZeroFlags::NO_WAIT, flags.contains(WriteFlags::NO_WAIT));
    Some(zero_flags)
}

/// Reads the blocks around a widened write. The range is registered as serialising.
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

/// The range is aligned and registered, and the node counts as being written to. True if a flush must follow.
pub(super) async fn write_aligned(
    inside: &Inside<'_>,
    limits: &Limits,
    offset: u64,
    iov: IoVec,
    flags: WriteFlags,
) -> Result<bool> {
    let node = inside.node();
    let fua = flags.contains(WriteFlags::FUA) && !node.flags().cache.no_flush;
    let mut native = flags & node.driver().write_flags();
    native.set(WriteFlags::FUA, fua && native.contains(WriteFlags::FUA));
    let wants_flush = fua && !native.contains(WriteFlags::FUA);

    let len = iov.len();
    let piece_len = piece_len(limits, &iov);
    if len <= piece_len && is_short_enough(limits, &iov) {
        inside.change(len as u64, |node| node.driver().write(offset, iov, native)).await?;
        return Ok(wants_flush);
    }
    Box::pin(write_pieces(inside, limits, offset, iov, native, piece_len)).await?;
    Ok(wants_flush)
}

async fn write_pieces(
    inside: &Inside<'_>,
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
        inside.change(piece_len, |node| node.driver().write(at, piece, flags)).await?;
        done = next;
    }
    Ok(())
}

/// Writes one compressed cluster; an empty list pads the file.
pub(super) async fn write_compressed(edge: &Edge, offset: u64, iov: IoVec) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, write_compressed_inside(edge, &node, offset, iov).await)
}

/// As [`write_compressed`], for a request that is inside already.
pub(super) async fn write_compressed_inside(
    edge: &Edge,
    node: &Entered<'_>,
    offset: u64,
    iov: IoVec,
) -> Result<()> {
    let end = range::check_data(offset, iov.len() as u64)?;
    range::check_write(edge, node, end, false)?;
    let tracked = node.track(offset..end, false).await;
    let _writing = node.writing();
    let inside = Inside::new(node, &tracked);
    inside.change(end - offset, |node| node.driver().write_compressed(offset, iov)).await
}

/// How long a fragment may be, a multiple of the request alignment.
fn piece_len(limits: &Limits, iov: &IoVec) -> usize {
    let align = u64::from(limits.request_alignment);
    let mut len = if limits.max_transfer == 0 { range::MAX_REQUEST } else { limits.max_transfer };
    if !is_short_enough(limits, iov) {
        len = len.min(BOUNCE_LEN);
    }
    usize::try_from(round_down(len, align).max(align)).unwrap_or(usize::MAX)
}

fn is_short_enough(limits: &Limits, iov: &IoVec) -> bool {
    limits.max_iov == 0 || iov.segments().len() <= limits.max_iov as usize
}

pub(super) fn bounce_align(limits: &Limits) -> usize {
    (limits.memory_alignment as usize).max(512)
}
