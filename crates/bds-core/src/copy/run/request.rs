//! One request of a copy: what its range holds, and how it is copied.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bds_io::{BufPool, IoVec};

use super::super::control::{ErrorSite, Side};
use super::super::map::{Claim, CopyMap};
use super::super::observer::{Content, Examined, Observed};
use super::super::sides::{CopyRead, CopyWrite, Found, FoundRun};
use super::super::sparse;
use super::options::RunOptions;
use crate::driver::{Attempt, ZeroFlags};
use crate::error::Error;

/// Queries of one request at most: bounds how long it plans.
const MAX_QUERIES: usize = 64;

/// Longest zero write, and longest range that is skipped at once.
const MAX_ZERO: u64 = 256 << 20;

/// Whether the host copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Offload {
    Off,
    /// Short requests until it has worked once.
    Untried,
    Works,
}

/// What the requests of one copy share.
pub(super) struct Shared<'a> {
    pub(super) map: &'a CopyMap,
    pub(super) source: &'a dyn CopyRead,
    pub(super) target: &'a dyn CopyWrite,
    pub(super) options: &'a RunOptions,
    /// Whole granules.
    pub(super) range: Range<u64>,
    pool: BufPool,
    offload: AtomicU8,
}

/// A request that failed.
pub(super) struct Failure {
    pub(super) side: Side,
    pub(super) site: ErrorSite,
    pub(super) error: Error,
}

/// A request that ended, and the memory that it had.
pub(super) struct Ended {
    pub(super) result: Result<u64, Failure>,
    pub(super) memory: u64,
    /// How long it took, if it copied data.
    pub(super) took: Option<Duration>,
}

/// An error and its side.
type Sided<T> = Result<T, (Side, Error)>;

impl<'a> Shared<'a> {
    pub(super) fn new(
        map: &'a CopyMap,
        (source, target): (&'a dyn CopyRead, &'a dyn CopyWrite),
        options: &'a RunOptions,
    ) -> Self {
        let offloads = options.offload && options.observer.is_none();
        let offload = if offloads { Offload::Untried } else { Offload::Off };
        // A few buffers of the usual size are kept between requests.
        let pool = BufPool::new(usize::try_from(options.memory / 4).unwrap_or(0));
        let offload = AtomicU8::new(offload as u8);
        let range = map.granules_around(options.range.clone().unwrap_or(0..map.len()));
        Self { map, source, target, options, range, pool, offload }
    }

    fn offloads(&self, state: Offload) -> bool {
        self.offload.load(Ordering::Relaxed) == state as u8
    }

    /// Longest request now, if more than `max` bytes are not wanted.
    pub(super) fn chunk(&self, max: u64) -> u64 {
        self.options.chunk(self.map, max, self.offloads(Offload::Works))
    }

    /// Finds out what the claimed range holds, and shrinks the claim to a part of one kind; where
    /// nothing is to be read the claim grows. A granule that is not all of one kind is data, and so
    /// is one whose status is unknown: reading it shows what is wrong.
    pub(super) async fn plan(&self, claim: &mut Claim<'_>, chunk: u64) -> Found {
        let start = claim.range().start;
        let mut kind = None;
        let mut len = 0;
        for _ in 0..MAX_QUERIES {
            let (found, found_len) = self.query(start + len, claim.range().end).await;
            if *kind.get_or_insert(found) != found {
                break;
            }
            let is_empty_kind = found != Found::Data;
            let rest = claim.range().end - start - len;
            len += found_len.min(rest);
            if is_empty_kind && found_len > rest {
                // What is added is queried again: it may have changed before it was claimed.
                let most = MAX_ZERO.min(self.range.end - start);
                claim.extend((len + found_len - rest).min(most));
            }
            let wanted = if is_empty_kind { MAX_ZERO } else { chunk };
            if len >= wanted || start + len >= claim.range().end {
                break;
            }
        }
        claim.shrink(len);
        kind.unwrap_or(Found::Data)
    }

    /// The kind of the run at `offset` and its length: whole granules, or up to the end of the
    /// image. May reach past `end`.
    async fn query(&self, offset: u64, end: u64) -> (Found, u64) {
        let image_end = self.map.len();
        let granule = self.map.granules_around(offset..offset + 1);
        let one = (Found::Data, granule.end - offset);
        let asked = (image_end - offset).min((end - offset).saturating_add(MAX_ZERO));
        let Ok(run) = self.source.found(offset, asked, self.options.above).await else {
            return one;
        };
        let run = match run.found {
            Found::Zero if !self.options.write_flags.is_empty() => {
                FoundRun { found: Found::Data, ..run }
            }
            _ => run,
        };
        let run_end = offset + run.len.min(asked);
        if run_end >= image_end {
            return (run.found, image_end - offset);
        }
        match run_end - run_end % u64::from(self.map.granularity()) {
            whole if whole > offset => (run.found, whole - offset),
            _ => one,
        }
    }

    /// Copies what the claim names and ends the claim.
    pub(super) async fn copy(&self, claim: Claim<'_>, kind: Found, memory: u64) -> Ended {
        let begun = bds_io::now();
        let range = claim.range();
        let (offset, len) = (range.start, range.end - range.start);
        let copied = match kind {
            Found::Unallocated => Ok(()),
            Found::Zero => self.zero(offset, len).await,
            Found::Data => self.data(offset, len).await,
        };
        let result = match copied {
            Ok(()) => {
                if self.options.discard_source && kind == Found::Data {
                    // While the range is claimed: later a write may be there. Advisory.
                    let _advisory = self.source.discard(offset, len).await;
                }
                claim.done();
                Ok(len)
            }
            Err((side, error)) => Err(self.failure(side, (offset, len), error)),
        };
        let took = (kind == Found::Data).then(|| bds_io::now().saturating_sub(begun));
        Ended { result, memory, took }
    }

    fn failure(&self, side: Side, (offset, len): (u64, u64), error: Error) -> Failure {
        let (top, words) = match side {
            Side::Source => (self.source.node_name(), "cannot read the source"),
            Side::Target => (self.target.node_name(), "cannot write the target"),
        };
        let node = error.node_name().map_or(top, str::to_owned);
        let error = error.context(words).node(&node).at(offset);
        Failure { side, site: ErrorSite { offset, len, node }, error }
    }

    async fn data(&self, offset: u64, len: u64) -> Sided<()> {
        if !self.offloads(Offload::Off) && self.offload(offset, len).await {
            return Ok(());
        }
        let Some(unit) = self.options.compress else {
            // Longer than a chunk only if the host was expected to copy it.
            return self.in_parts(offset, len, self.options.chunk(self.map, u64::MAX, false)).await;
        };
        self.in_parts(offset, len, unit).await
    }

    /// True if the host copied it. A failure is no reason to fail: reading and writing shows which
    /// side is at fault.
    async fn offload(&self, offset: u64, len: u64) -> bool {
        let copied = self.target.copy_from(self.source, offset, len).await;
        let works = matches!(copied, Ok(Attempt::Done));
        let state = if works { Offload::Works } else { Offload::Off };
        self.offload.store(state as u8, Ordering::Relaxed);
        works
    }

    async fn in_parts(&self, offset: u64, len: u64, part_len: u64) -> Sided<()> {
        let part = usize::try_from(part_len.min(len)).unwrap_or(usize::MAX);
        let buffer = self.pool.take(part).slice(0..part);
        let mut at = 0;
        while at < len {
            let this_len = usize::try_from(part_len.min(len - at)).unwrap_or(part);
            self.part(offset + at, buffer.slice(0..this_len)).await?;
            at += part_len;
        }
        Ok(())
    }

    async fn part(&self, offset: u64, buffer: IoVec) -> Sided<()> {
        self.source.read(offset, buffer.clone()).await.map_err(|e| (Side::Source, e))?;
        let seen = self.observe(offset, Content::Data(&buffer)).await?;
        for range in seen.missing() {
            self.write(range.start, seen.part(&buffer, range)).await?;
        }
        seen.written();
        Ok(())
    }

    async fn observe(&self, offset: u64, content: Content<'_>) -> Sided<Observed> {
        let is_unit = self.options.compress.is_some() && matches!(content, Content::Data(_));
        let request = Examined { offset, content, is_unit, target: self.target };
        let seen = Observed::new(self.options.observer.as_ref(), request).await;
        seen.map_err(|e| (Side::Target, e))
    }

    /// Writes what was read.
    async fn write(&self, offset: u64, buffer: IoVec) -> Sided<()> {
        if self.options.compress.is_some() {
            let is_zero = self.options.sparse_len != 0 && buffer.is_zero(0..buffer.len());
            if is_zero {
                return self.write_zeros(offset, buffer.len() as u64).await;
            }
            let written = self.target.write_compressed(offset, buffer).await;
            return written.map_err(|e| (Side::Target, e));
        }
        for part in sparse::parts(&buffer, offset, self.options.sparse_len) {
            let (at, part_len) = (offset + part.range.start as u64, part.range.len() as u64);
            if part.is_zero {
                self.write_zeros(at, part_len).await?;
                continue;
            }
            let data = buffer.slice(part.range);
            let written = self.target.write(at, data, self.options.write_flags).await;
            written.map_err(|e| (Side::Target, e))?;
        }
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64) -> Sided<()> {
        let seen = self.observe(offset, Content::Zeros(len)).await?;
        for range in seen.missing() {
            self.write_zeros(range.start, range.end - range.start).await?;
        }
        seen.written();
        Ok(())
    }

    async fn write_zeros(&self, offset: u64, len: u64) -> Sided<()> {
        if self.options.target_is_zero {
            return Ok(());
        }
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, self.options.may_unmap);
        let done = self.target.write_zeroes(offset, len, flags).await;
        let _only_without_fallback = done.map_err(|e| (Side::Target, e))?;
        Ok(())
    }
}
