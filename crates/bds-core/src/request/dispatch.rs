//! Dispatches reads and writes: inline where possible, else through copy-on-read, zero detection
//! and alignment.
//!
//! A write that must be widened excludes everything that overlaps the widened range from before its
//! reads until its write is done; if one of its reads fails, nothing is written.
//!
//! Rare branches are boxed: every layer's future contains the next one's, and most requests are
//! plain.

use std::ops::Range;
use std::sync::Arc;

use bds_io::IoVec;

use super::admit::{Admission, Entered, enter, named};
use super::align::Padded;
use super::block_io::{self, read_around, write_aligned};
use super::range::{self, CheckedRange};
use super::{copy_on_read, flush, zero};
use crate::driver::{DetectZeroes, ReadFlags, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::graph::{Edge, Node, Perm};

/// Reads at once, or declines. Takes no lock, allocates nothing, never waits. `done` gets the
/// result while the request still counts as in flight.
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
    // Past the end, zeros have to be filled in: `read` does that.
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
        || node.has_readonly_bitmap()
        || node.must_log(&(offset..end))
        || !edge.access().perm.contains(Perm::WRITE)
    {
        return None;
    }
    let result = node.driver().try_write(offset, iov)?;
    inline.wrote();
    node.record_change(&(offset..end));
    Some(done(named(node, result)))
}

/// `Some` if it is one piece, aligned, not empty, and its end does not overflow.
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
    let range = named(&node, CheckedRange::of_data(offset, iov.len() as u64))?;
    named(&node, read_entered(edge, &node, range, iov, flags).await)
}

/// As [`read`], for a request that has entered.
pub(super) async fn read_entered(
    edge: &Arc<Edge>,
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
    flags: ReadFlags,
) -> Result<()> {
    if flags.contains(ReadFlags::COPY_ON_READ) || node.copies_on_read() {
        Box::pin(copy_on_read::read(edge, node, range, iov, flags)).await
    } else {
        block_io::read(node, range, iov, flags).await
    }
}

/// Writes.
pub(super) async fn write(edge: &Edge, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<()> {
    let node = enter(edge).await?;
    let range = named(&node, CheckedRange::of_data(offset, iov.len() as u64))?;
    named(&node, write_entered(edge, &node, range, iov, flags).await)
}

/// As [`write`], for a request that has entered.
pub(super) async fn write_entered(
    edge: &Edge,
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
    flags: WriteFlags,
) -> Result<()> {
    let any_of = range::write_perms(flags.contains(WriteFlags::UNCHANGED));
    range::check_write(edge, node, range.end, any_of)?;
    if range.is_empty() {
        return Ok(());
    }
    if let Some(zero_flags) = detected_zeroes(node, &iov, flags) {
        // From here on the caller's memory is not read again: it may change, the decision may not.
        let _done = Box::pin(zero::write_zeroes_entered(edge, node, range, zero_flags)).await?;
        return Ok(());
    }
    let wants_flush = if block_io::is_plain(&node.limits(), range, &iov) {
        let scope = node.admit(admission(range.start..range.end, flags)).await?;
        let (native, wants_flush) = block_io::split_flags(node, flags);
        // In two steps: this future keeps the arguments once, not also for the pause.
        scope.pause(range.len()).await;
        scope.run(|node| node.driver().write(range.start, iov, native)).await?;
        wants_flush
    } else {
        Box::pin(write_widened(node, range, iov, flags)).await?
    };
    if wants_flush { Box::pin(flush::flush_entered(node)).await } else { Ok(()) }
}

/// Writes a range that must be widened or goes down in pieces. True if a flush must follow.
async fn write_widened(
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
    flags: WriteFlags,
) -> Result<bool> {
    let limits = node.limits();
    let bytes = range.start..range.end;
    let padded = Padded::new(&bytes, limits.request_alignment);
    let outer = padded.as_ref().map_or(bytes, |p| p.outer.clone());
    let start = outer.start;
    let mut admission = admission(outer, flags);
    if padded.is_some() {
        admission = admission.serialising();
    }
    let scope = node.admit(admission).await?;
    let iov = match padded {
        None => iov,
        Some(padded) => {
            let pad = read_around(node, &limits, &padded).await?;
            padded.join(&pad, iov)
        }
    };
    write_aligned(&scope, &limits, start, iov, flags).await
}

/// How a write is admitted by its flags.
fn admission(range: Range<u64>, flags: WriteFlags) -> Admission {
    Admission::write(range)
        .unchanged_if(flags.contains(WriteFlags::UNCHANGED))
        .serialising_if(flags.contains(WriteFlags::SERIALISING))
        .no_wait_if(flags.contains(WriteFlags::NO_WAIT))
}

/// Zero flags for a write of zeros, if `detect-zeroes` is on for the node.
fn detected_zeroes(node: &Node, iov: &IoVec, flags: WriteFlags) -> Option<ZeroFlags> {
    let mut zero_flags = match node.flags().detect_zeroes {
        DetectZeroes::Off => return None,
        DetectZeroes::On => ZeroFlags::empty(),
        DetectZeroes::Unmap => ZeroFlags::MAY_UNMAP,
    };
    // There is no serialising zero write, and without the operation nothing is gained.
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

/// Writes one compressed cluster; an empty list pads the file.
pub(super) async fn write_compressed(edge: &Edge, offset: u64, iov: IoVec) -> Result<()> {
    let node = enter(edge).await?;
    let range = named(&node, CheckedRange::of_data(offset, iov.len() as u64))?;
    named(&node, write_compressed_entered(edge, &node, range, iov).await)
}

/// As [`write_compressed`], for a request that has entered.
pub(super) async fn write_compressed_entered(
    edge: &Edge,
    node: &Entered<'_>,
    range: CheckedRange,
    iov: IoVec,
) -> Result<()> {
    range::check_write(edge, node, range.end, Perm::WRITE)?;
    let scope = node.admit(Admission::write(range.start..range.end)).await?;
    let CheckedRange { start, .. } = range;
    scope.run_paced(range.len(), |node| node.driver().write_compressed(start, iov)).await
}
