//! `SpillSpace`: hands out parts of the spill file, and takes them back.
//!
//! Space is taken in granules, from the lowest free one on, in several parts if need be: as long as
//! enough is free, an allocation succeeds. A part is free again when the last user of its
//! [`SpillRange`] drops it, so what a reader of the snapshot reads is not overwritten meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::sync::Notify;

/// The free parts of a spill file.
pub(in super::super) struct SpillSpace {
    granule: u64,
    len: u64,
    free: Mutex<Free>,
    /// Notified when space is free again.
    changed: Arc<Notify>,
}

struct Free {
    /// Start and end of each free part; no two touch.
    parts: BTreeMap<u64, u64>,
    bytes: u64,
}

/// Parts of the spill file that hold one run of old data. Space is free again when it is dropped.
pub(in super::super) struct SpillRange {
    space: Arc<SpillSpace>,
    parts: Vec<Range<u64>>,
}

impl SpillSpace {
    /// The first `len` bytes of a file, rounded down to granules.
    pub(super) fn new(len: u64, granule: u32, changed: Arc<Notify>) -> Arc<Self> {
        let granule = u64::from(granule);
        let len = len - len % granule;
        let parts = if len == 0 { BTreeMap::new() } else { BTreeMap::from([(0, len)]) };
        let free = Mutex::new(Free { parts, bytes: len });
        Arc::new(Self { granule, len, free, changed })
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that can be handed out in all.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that are free now.
    pub(super) fn free_bytes(&self) -> u64 {
        self.free().bytes
    }

    /// True if `len` bytes are free.
    pub(super) fn fits(&self, len: u64) -> bool {
        self.rounded(len) <= self.free_bytes()
    }

    fn rounded(&self, len: u64) -> u64 {
        len.checked_next_multiple_of(self.granule).unwrap_or(u64::MAX)
    }

    /// Takes space for `len` bytes.
    pub(super) fn allocate(self: &Arc<Self>, len: u64) -> Option<Arc<SpillRange>> {
        let mut missing = self.rounded(len);
        let mut free = self.free();
        if missing > free.bytes {
            return None;
        }
        free.bytes -= missing;
        let mut parts = Vec::new();
        while missing > 0 {
            let (start, end) = free.parts.pop_first().expect("so many bytes are free");
            let taken = missing.min(end - start);
            if start + taken < end {
                free.parts.insert(start + taken, end);
            }
            parts.push(start..start + taken);
            missing -= taken;
        }
        Some(Arc::new(SpillRange { space: Arc::clone(self), parts }))
    }
}

impl Free {
    fn give_back(&mut self, part: &Range<u64>) {
        self.bytes += part.end - part.start;
        let (mut start, mut end) = (part.start, part.end);
        if let Some(next_end) = self.parts.remove(&end) {
            end = next_end;
        }
        let before = self.parts.range(..start).next_back().map(|(at, end)| (*at, *end));
        if let Some((at, _)) = before.filter(|(_, before_end)| *before_end == start) {
            start = at;
        }
        self.parts.insert(start, end);
    }
}

impl SpillRange {
    /// The places of bytes `from..to` of the run: where in the file, and which bytes of the run.
    pub(in super::super) fn places(&self, from: u64, to: u64) -> Vec<(u64, Range<u64>)> {
        let mut places = Vec::new();
        let mut at = 0;
        for part in &self.parts {
            let len = part.end - part.start;
            let (first, last) = (from.max(at), to.min(at + len));
            if first < last {
                places.push((part.start + (first - at), first..last));
            }
            at += len;
        }
        places
    }
}

impl Drop for SpillRange {
    fn drop(&mut self) {
        {
            let mut free = self.space.free();
            self.parts.iter().for_each(|part| free.give_back(part));
        }
        self.space.changed.notify_waiters();
    }
}

impl fmt::Debug for SpillRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.parts).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = 4096;

    fn space(granules: u64) -> Arc<SpillSpace> {
        SpillSpace::new(granules * G + 17, 4096, Arc::default())
    }

    #[test]
    fn space_is_reused_also_in_parts_and_joins_again() {
        let space = space(8);
        assert_eq!((space.len(), space.free_bytes()), (8 * G, 8 * G));
        let mut held: Vec<_> = (0..8).map(|_| space.allocate(1).unwrap()).collect();
        assert!(space.allocate(1).is_none());
        // Every second granule is free: three of them hold one run.
        for index in [6, 4, 2, 0] {
            drop(held.remove(index));
        }
        assert!(space.fits(4 * G) && !space.fits(4 * G + 1));
        let run = space.allocate(2 * G + 5).unwrap();
        assert_eq!(run.places(0, 2 * G + 5).len(), 3);
        assert_eq!(run.places(G - 2, G + 2), [(G - 2, G - 2..G), (2 * G, G..G + 2)]);
        assert_eq!(space.free_bytes(), G);
        drop((held, run));
        assert_eq!(space.free_bytes(), 8 * G);
        assert_eq!(space.allocate(8 * G).unwrap().places(0, 8 * G).len(), 1, "joined");
    }

    #[test]
    fn random_allocations_never_overlap_and_lose_nothing() {
        let space = space(64);
        let mut held: Vec<Arc<SpillRange>> = Vec::new();
        let mut seed = 7_u64;
        for _ in 0..5000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let roll = (seed >> 33) % 12;
            if roll < 7 {
                held.extend(space.allocate((roll + 1) * G - 9));
            } else if !held.is_empty() {
                let index = usize::try_from(seed >> 40).unwrap() % held.len();
                drop(held.swap_remove(index));
            }
            let mut parts: Vec<_> = held.iter().flat_map(|run| run.parts.clone()).collect();
            parts.sort_by_key(|part| part.start);
            assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
            let used: u64 = parts.iter().map(|part| part.end - part.start).sum();
            assert_eq!(used + space.free_bytes(), space.len());
        }
    }
}
