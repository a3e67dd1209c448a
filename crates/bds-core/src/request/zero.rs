//! Writes zeros and discards ranges: split at the driver's units, from a buffer of zeros where the
//! driver declines.

use std::sync::OnceLock;

use bds_io::{Buf, IoVec};

use super::admit::{Admission, Entered, RequestScope, enter, named};
use super::align::Padded;
use super::block_io::{read_around, write_aligned};
use super::flush;
use super::range::{self, CheckedRange, round_down, round_up};
use crate::driver::{Attempt, Limits, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::graph::{Edge, Perm};

/// Length of the shared buffer of zeros, which is never written to.
const ZERO_LEN: usize = 1 << 20;
/// Longest data write of the fallback.
const FALLBACK_LEN: u64 = 16 << 20;

/// Makes the range read as zeros. `Unsupported` only with `NO_FALLBACK`.
pub(super) async fn write_zeroes(
    edge: &Edge,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<Attempt> {
    let node = enter(edge).await?;
    let range = named(&node, CheckedRange::new(offset, len))?;
    named(&node, write_zeroes_entered(edge, &node, range, flags).await)
}

/// As [`write_zeroes`], for a request that has entered.
pub(super) async fn write_zeroes_entered(
    edge: &Edge,
    node: &Entered<'_>,
    range: CheckedRange,
    mut flags: ZeroFlags,
) -> Result<Attempt> {
    let any_of = range::write_perms(flags.contains(ZeroFlags::UNCHANGED));
    range::check_write(edge, node, range.end, any_of)?;
    if range.is_empty() {
        return Ok(Attempt::Done);
    }
    let CheckedRange { start: offset, end } = range;
    let limits = node.limits();
    let padded = Padded::new(&(offset..end), limits.request_alignment);
    let supported = node.driver().zero_flags();
    let has_fast = supported.is_some_and(|s| s.contains(ZeroFlags::NO_FALLBACK));
    if flags.contains(ZeroFlags::NO_FALLBACK) && (padded.is_some() || !has_fast) {
        return Ok(Attempt::Unsupported);
    }
    if !node.flags().discard {
        flags.remove(ZeroFlags::MAY_UNMAP);
    }
    let wants_flush = flags.contains(ZeroFlags::FUA) && !node.flags().cache.no_flush;
    let native_fua = supported.is_some_and(|s| s.contains(ZeroFlags::FUA)) && padded.is_none();
    let outer = padded.as_ref().map_or(offset..end, |p| p.outer.clone());
    let zeroed = {
        let admission = Admission::write(outer)
            .unchanged_if(flags.contains(ZeroFlags::UNCHANGED))
            .serialising_if(padded.is_some() || node.driver().serialises_zeroes())
            .no_wait_if(flags.contains(ZeroFlags::NO_WAIT));
        let scope = node.admit(admission).await?;
        let pieces = Pieces {
            scope: &scope,
            limits: &limits,
            flags: flags & supported.unwrap_or_default(),
            write_flags: write_flags(flags),
            may_fall_back: !flags.contains(ZeroFlags::NO_FALLBACK),
            has_driver_way: supported.is_some(),
        };
        match padded {
            None => pieces.zero(offset, end).await?,
            Some(padded) => Box::pin(zero_padded(&pieces, &padded, offset, end)).await?,
        }
    };
    match zeroed {
        Zeroed::Unsupported => return Ok(Attempt::Unsupported),
        Zeroed::ByDriver if native_fua => {}
        _ if wants_flush => Box::pin(flush::flush_entered(node)).await?,
        _ => {}
    }
    Ok(Attempt::Done)
}

/// The flags for zeros written from a buffer. Durability is the caller's: one flush at the end.
fn write_flags(flags: ZeroFlags) -> WriteFlags {
    match flags.contains(ZeroFlags::UNCHANGED) {
        true => WriteFlags::UNCHANGED,
        false => WriteFlags::empty(),
    }
}

/// Makes an aligned range of the scope read as zeros, as it did before.
pub(super) async fn keep_zeroes(
    scope: &RequestScope<'_>,
    limits: &Limits,
    start: u64,
    end: u64,
) -> Result<()> {
    let supported = scope.node().driver().zero_flags();
    let pieces = Pieces {
        scope,
        limits,
        flags: ZeroFlags::UNCHANGED & supported.unwrap_or_default(),
        write_flags: WriteFlags::UNCHANGED,
        may_fall_back: true,
        has_driver_way: supported.is_some(),
    };
    pieces.zero(start, end).await.map(drop)
}

/// Head and tail blocks are read, zeroed in part and written; whole blocks between them are zeroed
/// as such.
async fn zero_padded(
    pieces: &Pieces<'_>,
    padded: &Padded,
    offset: u64,
    end: u64,
) -> Result<Zeroed> {
    let (scope, limits) = (pieces.scope, pieces.limits);
    let align = u64::from(limits.request_alignment);
    let pad = read_around(scope.node(), limits, padded).await?;
    let middle = round_up(offset, align)..round_down(end, align);
    if middle.start >= middle.end && padded.reads().count() == 1 {
        // One or two touching blocks: one write of head, zeros, tail.
        let len = usize::try_from(end - offset).unwrap_or(usize::MAX);
        let joined = padded.join(&pad, Buf::zeroed(len, 1).iov());
        write_aligned(scope, limits, padded.outer.start, joined, WriteFlags::empty()).await?;
        return Ok(Zeroed::ByBuffer);
    }
    if padded.head_len > 0 {
        let mut block = pad.front(0..padded.head_len);
        block.push(zeros(align - padded.head_len as u64));
        write_aligned(scope, limits, padded.outer.start, block, WriteFlags::empty()).await?;
    }
    let mut zeroed = Zeroed::ByBuffer;
    if middle.start < middle.end {
        zeroed = pieces.zero(middle.start, middle.end).await?;
    }
    if padded.tail_len > 0 {
        let mut block = zeros(align - padded.tail_len as u64);
        block.push(pad.back(padded.tail_len));
        write_aligned(scope, limits, padded.outer.end - align, block, WriteFlags::empty()).await?;
    }
    Ok(zeroed)
}

/// How a range was zeroed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeroed {
    /// The driver did all of it.
    ByDriver,
    /// Some of it was written from a buffer.
    ByBuffer,
    /// The driver declined and the caller wanted no fallback.
    Unsupported,
}

/// Zeroes aligned ranges within one scope, piece by piece.
struct Pieces<'a> {
    scope: &'a RequestScope<'a>,
    limits: &'a Limits,
    /// What is passed to the driver.
    flags: ZeroFlags,
    /// What is passed with zeros from a buffer.
    write_flags: WriteFlags,
    has_driver_way: bool,
    may_fall_back: bool,
}

impl Pieces<'_> {
    async fn zero(&self, mut offset: u64, end: u64) -> Result<Zeroed> {
        let unit = u64::from(self.limits.zero_alignment.max(self.limits.request_alignment)).max(1);
        let mut zeroed = Zeroed::ByDriver;
        while offset < end {
            let mut len = piece_len(offset, end, unit, self.limits.max_zero);
            if !offset.is_multiple_of(unit) && self.limits.max_transfer != 0 {
                let align = u64::from(self.limits.request_alignment);
                len = len.min(round_down(self.limits.max_transfer, align).max(align));
            }
            let done = self.has_driver_way && self.by_driver(offset, len).await? == Attempt::Done;
            if !done {
                if !self.may_fall_back {
                    return Ok(Zeroed::Unsupported);
                }
                self.write_buffer(offset, offset + len).await?;
                zeroed = Zeroed::ByBuffer;
            }
            offset += len;
        }
        Ok(zeroed)
    }

    async fn by_driver(&self, offset: u64, len: u64) -> Result<Attempt> {
        let flags = self.flags;
        self.scope.run_paced(len, move |node| node.driver().write_zeroes(offset, len, flags)).await
    }

    async fn write_buffer(&self, mut offset: u64, end: u64) -> Result<()> {
        while offset < end {
            let len = (end - offset).min(FALLBACK_LEN);
            // Durability is one flush at the end, by the caller.
            write_aligned(self.scope, self.limits, offset, zeros(len), self.write_flags).await?;
            offset += len;
        }
        Ok(())
    }
}

/// The next piece: up to a unit's boundary, whole units, or the rest behind the last unit.
fn piece_len(offset: u64, end: u64, unit: u64, max: u64) -> u64 {
    let into = offset % unit;
    let mut len = end - offset;
    if into != 0 {
        len = len.min(unit - into);
    } else if len > unit {
        len -= len % unit;
        if max != 0 {
            len = len.min((max - max % unit).max(unit));
        }
    }
    len
}

/// `len` bytes of zeros out of the shared buffer.
fn zeros(len: u64) -> IoVec {
    static ZEROS: OnceLock<Buf> = OnceLock::new();
    let buf = ZEROS.get_or_init(|| Buf::zeroed(ZERO_LEN, 4096));
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    let mut list = IoVec::default();
    while left > 0 {
        let take = left.min(ZERO_LEN);
        list.push(buf.slice(0..take));
        left -= take;
    }
    list
}

/// Discards a range that is no longer needed; advisory. Only whole blocks inside the range are
/// discarded.
pub(super) async fn discard(edge: &Edge, offset: u64, len: u64) -> Result<()> {
    let node = enter(edge).await?;
    let range = named(&node, CheckedRange::new(offset, len))?;
    named(&node, discard_entered(edge, &node, range).await)
}

/// As [`discard`], for a request that has entered.
pub(super) async fn discard_entered(
    edge: &Edge,
    node: &Entered<'_>,
    range: CheckedRange,
) -> Result<()> {
    let CheckedRange { start: offset, end } = range;
    range::may_write(edge, node, offset, Perm::WRITE)?;
    if !node.flags().discard {
        return Ok(());
    }
    let limits = node.limits();
    let align = u64::from(limits.request_alignment);
    let reach = node.len();
    // The last block may be a short one; it counts as whole if the request reaches the end.
    let end = if end >= reach { round_up(reach, align) } else { round_down(end, align) };
    let start = round_up(offset, align);
    if start >= end {
        return Ok(());
    }
    let alone = node.driver().serialises_zeroes();
    let scope = node.admit(Admission::write(start..end).serialising_if(alone)).await?;
    discard_aligned(&scope, &limits, start, end.min(reach)).await
}

async fn discard_aligned(
    scope: &RequestScope<'_>,
    limits: &Limits,
    mut offset: u64,
    end: u64,
) -> Result<()> {
    let unit = u64::from(limits.discard_alignment.max(limits.request_alignment)).max(1);
    while offset < end {
        let len = piece_len(offset, end, unit, limits.max_discard);
        // A piece the driver cannot discard stays as it is.
        let _advisory =
            scope.run_paced(len, move |node| node.driver().discard(offset, len)).await?;
        offset += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_never_cross_a_unit_unless_they_are_whole_units() {
        // offset, end, unit, max: pieces
        let table: [(u64, u64, u64, u64, &[u64]); 6] = [
            (0, 100, 64, 0, &[64, 36]),
            (10, 300, 64, 0, &[54, 192, 44]),
            (10, 20, 64, 0, &[10]),
            (64, 128, 64, 0, &[64]),
            (0, 320, 64, 130, &[128, 128, 64]),
            (0, 256, 64, 10, &[64, 64, 64, 64]),
        ];
        for (mut offset, end, unit, max, expected) in table {
            let mut found = vec![];
            while offset < end {
                let len = piece_len(offset, end, unit, max);
                found.push(len);
                offset += len;
            }
            assert_eq!(found, expected, "..{end} unit {unit} max {max}");
        }
    }
}
