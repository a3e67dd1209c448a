//! `CopyMap`: tracks which granules are still to be copied and which are being copied now.
//!
//! ```text
//! dirty ──claim──► busy ──done──► clean          a failed or dropped claim sets its bits again
//!   ▲                │ drop
//!   └────────────────┘                           exclude: busy without bits, for a user that writes both sides itself
//! ```
//!
//! A copy claims granules: their bits are cleared and their range is busy until the claim ends. No
//! two claims overlap, so two copies of one range are never under way at once, also if the range
//! was marked again meanwhile. Marking takes no lock and may be done on a filter's inline path.
//!
//! A claim that is dropped sets its bits before its range is free: at no moment are granules clean
//! and idle that were not copied. A write to the target that its dropped request left behind is
//! ordered by the target's node: it excludes later requests that overlap it until it ends.

mod busy;

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::sync::Notify;

use busy::Busy;

use crate::bitmap::HBitmap;
use crate::error::Result;

/// The granules of one image that are to be copied, and those that are being copied.
///
/// ```
/// use bds_core::copy::CopyMap;
///
/// let map = CopyMap::new(1 << 20, 65536)?;
/// map.mark(0..512);                                     // a guest write
/// let claim = map.claim(0..1 << 20, 1 << 20).expect("one granule is dirty");
/// assert_eq!(claim.range(), 0..65536);
/// assert_eq!((map.dirty_bytes(), map.in_flight_bytes()), (0, 65536));
/// drop(claim);                                          // the copy failed
/// assert_eq!(map.dirty_bytes(), 65536);
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct CopyMap {
    dirty: HBitmap,
    /// Held for a few instructions; no other lock is taken under it.
    busy: Mutex<Busy>,
    /// Notified when a range is free again.
    freed: Notify,
    done_bytes: AtomicU64,
}

impl CopyMap {
    /// A clean map for an image of `len` bytes, of which each `granularity` bytes are copied
    /// together.
    ///
    /// # Errors
    /// As [`HBitmap::new`].
    pub fn new(len: u64, granularity: u32) -> Result<Self> {
        Ok(Self {
            dirty: HBitmap::new(len, granularity)?,
            busy: Mutex::default(),
            freed: Notify::new(),
            done_bytes: AtomicU64::new(0),
        })
    }

    /// Bytes of the image.
    pub fn len(&self) -> u64 {
        self.dirty.len()
    }

    /// Whether it covers no bytes.
    pub fn is_empty(&self) -> bool {
        self.dirty.is_empty()
    }

    /// Bytes that are copied together: a power of two.
    pub fn granularity(&self) -> u32 {
        self.dirty.granularity()
    }

    /// The granules that are to be copied. Bits may be set and merged through it at any time.
    pub fn bitmap(&self) -> &HBitmap {
        &self.dirty
    }

    /// Marks every granule that the byte range touches. Takes no lock.
    #[inline]
    pub fn mark(&self, range: Range<u64>) {
        self.dirty.set(range);
    }

    /// Marks the whole image.
    pub fn mark_all(&self) {
        self.dirty.set_all();
    }

    /// Bytes that are to be copied and not being copied; a short last granule counts as short.
    pub fn dirty_bytes(&self) -> u64 {
        let len = self.len();
        let past_end = match len % u64::from(self.granularity()) {
            0 => 0,
            _ if !self.dirty.is_dirty(len - 1) => 0,
            rest => u64::from(self.granularity()) - rest,
        };
        self.dirty.dirty_bytes().saturating_sub(past_end)
    }

    /// Bytes that are being copied.
    pub fn in_flight_bytes(&self) -> u64 {
        self.busy().claimed_bytes()
    }

    /// Bytes whose copy has ended well so far; what was copied twice counts twice.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// True if nothing is to be copied and nothing is being copied.
    pub fn is_clean(&self) -> bool {
        self.is_clean_in(&(0..self.len()))
    }

    /// As [`CopyMap::is_clean`], for the granules that the range touches.
    pub fn is_clean_in(&self, range: &Range<u64>) -> bool {
        // A claim clears its bits with the lock held.
        let busy = self.busy();
        self.is_clean_here(&busy, &self.granules_around(range.clone()))
    }

    fn is_clean_here(&self, busy: &Busy, granules: &Range<u64>) -> bool {
        !busy.has_claim(granules) && self.dirty.next_dirty(granules.clone()).is_none()
    }

    /// Claims the first run of dirty granules in the range that is not busy, of at most `max_len`
    /// bytes (at least a granule). The run may begin before `range.start` and end after
    /// `range.end`, at the bounds of granules. `None`: all of the range is clean or busy.
    pub fn claim(&self, range: Range<u64>, max_len: u64) -> Option<Claim<'_>> {
        let range = self.try_claim(range, max_len)?;
        Some(Claim { map: MapRef::Borrowed(self), range, is_done: false })
    }

    /// As [`CopyMap::claim`], for a claim that keeps the map.
    pub fn claim_shared(
        self: &Arc<Self>,
        range: Range<u64>,
        max_len: u64,
    ) -> Option<Claim<'static>> {
        let range = self.try_claim(range, max_len)?;
        Some(Claim { map: MapRef::Shared(Arc::clone(self)), range, is_done: false })
    }

    fn try_claim(&self, range: Range<u64>, max_len: u64) -> Option<Range<u64>> {
        let mut busy = self.busy();
        let mut rest = range;
        loop {
            let area = self.free_area(&busy, &mut rest, max_len)?;
            // Bits may have been cleared meanwhile by others than claims: what is left counts.
            let Some(range) = self.dirty.claim(area.clone(), u64::MAX) else {
                rest.start = area.end;
                continue;
            };
            busy.add_claim(&range);
            return Some(range);
        }
    }

    /// The first dirty run of `rest` that no entry overlaps, in whole granules.
    fn free_area(&self, busy: &Busy, rest: &mut Range<u64>, max_len: u64) -> Option<Range<u64>> {
        loop {
            let found = self.dirty.next_area(rest.clone(), max_len)?;
            let mut area = self.granules_around(found);
            match busy.first_overlap(&area) {
                Some(entry) if entry.start <= area.start => rest.start = entry.end,
                Some(entry) => {
                    area.end = entry.start;
                    return Some(area);
                }
                None => return Some(area),
            }
        }
    }

    /// Waits until no copy of the range is under way. One that begins later is not waited for.
    pub async fn wait_idle(&self, range: Range<u64>) {
        let next = self.busy().next_ticket();
        self.wait_for_earlier(&range, next).await;
    }

    /// True if no copy of the range is under way and no part of it is excluded.
    pub fn is_idle(&self, range: &Range<u64>) -> bool {
        self.busy().first_overlap(range).is_none()
    }

    /// Keeps copies away from the granules that the range touches, until the guard is dropped:
    /// waits for those under way, and no other begins. Exclusions that overlap wait for each other
    /// in order. Bits are left as they are.
    pub async fn exclude(&self, range: Range<u64>) -> Exclusion<'_> {
        let range = self.granules_around(range);
        let ticket = self.busy().add_exclusion(range.clone());
        let exclusion = Exclusion { map: self, ticket };
        self.wait_for_earlier(&range, ticket).await;
        exclusion
    }

    async fn wait_for_earlier(&self, range: &Range<u64>, ticket: u64) {
        self.freed.wait_until(|| !self.busy().has_earlier(range, ticket)).await;
    }

    /// Waits until the range is clean or something in it can be claimed. Woken by claims and
    /// exclusions that end, not by marks.
    pub async fn wait_claimable(&self, range: Range<u64>) {
        let granules = self.granules_around(range);
        let can_go = || {
            let busy = self.busy();
            self.is_clean_here(&busy, &granules)
                || self.free_area(&busy, &mut granules.clone(), 1).is_some()
        };
        self.freed.wait_until(can_go).await;
    }

    /// Gives up what is dirty in the whole granules of the range: it will not be copied.
    pub fn skip(&self, range: Range<u64>) {
        self.dirty.clear(range);
        self.freed.notify_waiters();
    }

    /// The whole granules around a range; the end of the image bounds the last one.
    pub fn granules_around(&self, range: Range<u64>) -> Range<u64> {
        let granularity = u64::from(self.granularity());
        let start = range.start - range.start % granularity;
        let end = range.end.checked_next_multiple_of(granularity).unwrap_or(u64::MAX);
        start..end.min(self.len()).max(start)
    }

    fn busy(&self) -> MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CopyMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyMap")
            .field("len", &self.len())
            .field("granularity", &self.granularity())
            .field("dirty_bytes", &self.dirty_bytes())
            .field("in_flight_bytes", &self.in_flight_bytes())
            .finish_non_exhaustive()
    }
}

/// The map of a claim.
enum MapRef<'m> {
    Borrowed(&'m CopyMap),
    Shared(Arc<CopyMap>),
}

impl Deref for MapRef<'_> {
    type Target = CopyMap;

    fn deref(&self) -> &CopyMap {
        match self {
            Self::Borrowed(map) => map,
            Self::Shared(map) => map,
        }
    }
}

/// The duty to copy a range. Dropping it says that the copy failed, and sets its bits again.
#[must_use = "dropping a claim says that the copy failed"]
pub struct Claim<'m> {
    map: MapRef<'m>,
    range: Range<u64>,
    is_done: bool,
}

impl Claim<'_> {
    /// The bytes to be copied: whole granules, up to the end of the image.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Ends it: the bytes were copied.
    pub fn done(mut self) {
        self.is_done = true;
    }

    /// Gives back what lies behind the first `len` bytes, in whole granules: it is dirty again.
    pub fn shrink(&mut self, len: u64) {
        let end = self.map.granules_around(self.range.start..self.range.start.saturating_add(len));
        if end.end >= self.range.end {
            return;
        }
        let tail = end.end..self.range.end;
        self.map.dirty.set(tail.clone());
        self.range.end = tail.start;
        {
            self.map.busy().set_claim_end(self.range.start, tail.start);
        }
        self.map.freed.notify_waiters();
    }

    /// Claims dirty granules directly behind its end too, up to `len` bytes in all. Returns the
    /// number of bytes that were added.
    pub fn extend(&mut self, len: u64) -> u64 {
        let map = &*self.map;
        let mut busy = map.busy();
        let end = self.range.end;
        let wanted = end..map.len().min(self.range.start.saturating_add(len));
        if wanted.start >= wanted.end || !map.dirty.is_dirty(end) {
            return 0;
        }
        let area = map.free_area(&busy, &mut wanted.clone(), u64::MAX);
        let Some(area) = area.filter(|area| area.start == end) else { return 0 };
        let area = area.start..area.end.min(map.granules_around(wanted).end);
        let Some(claimed) = map.dirty.claim(area, u64::MAX) else { return 0 };
        if claimed.start != end {
            map.dirty.set(claimed);
            return 0;
        }
        self.range.end = claimed.end;
        busy.set_claim_end(self.range.start, claimed.end);
        claimed.end - claimed.start
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let len = self.range.end - self.range.start;
        if self.is_done {
            self.map.done_bytes.fetch_add(len, Ordering::Relaxed);
        } else {
            // Before the range is free: it must not look copied in between.
            self.map.dirty.set(self.range.clone());
        }
        self.map.busy().remove_claim(self.range.start);
        self.map.freed.notify_waiters();
    }
}

impl fmt::Debug for Claim<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({:?})", self.range)
    }
}

/// Keeps copies away from a range until it is dropped.
#[must_use = "copies may begin again once it is dropped"]
pub struct Exclusion<'m> {
    map: &'m CopyMap,
    ticket: u64,
}

impl Drop for Exclusion<'_> {
    fn drop(&mut self) {
        self.map.busy().remove_exclusion(self.ticket);
        self.map.freed.notify_waiters();
    }
}

impl fmt::Debug for Exclusion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exclusion({})", self.ticket)
    }
}

#[cfg(test)]
mod tests;
