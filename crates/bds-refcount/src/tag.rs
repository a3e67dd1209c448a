//! Leases arena tags and generations, so that no two arenas ever give out the same handle.
//!
//! The tag is the twelve bits of a handle that identify its arena. A handle is (kind, tag,
//! generation, index), and denotes one object for ever. So no (tag, generation) of a kind is ever
//! used by two arenas: each arena has a *lease* of a range of generations under its tag. A lease
//! that ends returns the generations it did not begin; those it began are never leased again.
//!
//! A new arena gets the first of these that exists:
//! * the largest free range of a tag that no live arena has. Tags are tried in turn, so that one is
//!   used again as late as possible;
//! * the largest free range of any tag;
//! * the upper half of what the live arena with the most unused generations has left, under the
//!   same tag;
//! * no lease, and so no slots.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::handle::{GENERATION_BITS, Kind, TAG_BITS};

/// Tags of a kind: 1 to this. Tag 0 is never given out.
const TAGS: usize = (1 << TAG_BITS) - 1;
const LAST_GENERATION: u32 = (1 << GENERATION_BITS) - 1;
/// A smaller lease is not given out, unless so few were requested: its slots would retire too soon.
const LEASE_MIN: u32 = 1 << 16;

/// A range of generations under a tag, and how much of it was used.
pub(crate) struct Lease {
    kind: Kind,
    tag: u16,
    first: u32,
    /// The highest generation begun (low half) and the last that may be (high half), which another
    /// arena may lower. One word, so that neither passes the other.
    // std's atomic also under loom: changed under the lock of `SPACES`, and halving it reads no
    // other memory.
    bounds: AtomicU64,
}

const fn pack(highest: u32, last: u32) -> u64 {
    (last as u64) << 32 | highest as u64
}

const fn unpack(bounds: u64) -> (u32, u32) {
    ((bounds & 0xffff_ffff) as u32, (bounds >> 32) as u32)
}

impl Lease {
    fn new(kind: Kind, tag: u16, first: u32, last: u32) -> Arc<Self> {
        // Slots are born with the first generation, so that it counts as begun.
        Arc::new(Self { kind, tag, first, bounds: AtomicU64::new(pack(first, last)) })
    }

    fn bounds(&self) -> (u32, u32) {
        unpack(self.bounds.load(Ordering::Relaxed))
    }

    /// Whether a slot may go on to this generation. If so, no other arena will ever use it.
    pub(crate) fn begin(&self, generation: u32) -> bool {
        let begun = self.bounds.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |bounds| {
            let (highest, last) = unpack(bounds);
            (generation <= last).then_some(pack(highest.max(generation), last))
        });
        begun.is_ok()
    }

    /// Generations that were not begun.
    fn left(&self) -> u32 {
        let (highest, last) = self.bounds();
        last - highest
    }

    /// Splits off the upper half of the generations left. `None` if that would be too few.
    fn halve(&self) -> Option<Arc<Self>> {
        let give = |bounds| {
            let (highest, last) = unpack(bounds);
            let kept = (last - highest) / 2;
            (kept >= LEASE_MIN).then_some(pack(highest, highest + kept))
        };
        let before = self.bounds.fetch_update(Ordering::Relaxed, Ordering::Relaxed, give).ok()?;
        let ((_, last), (_, kept)) = (unpack(before), unpack(give(before)?));
        Some(Self::new(self.kind, self.tag, kept + 1, last))
    }
}

/// The generations of one tag of one kind.
struct Entry {
    /// First and last of the ranges that no arena has begun or leased, ascending and not adjacent.
    free: Vec<(u32, u32)>,
    /// Of the live arenas under it: one, unless all tags are in use.
    leases: Vec<Arc<Lease>>,
}

impl Entry {
    const fn new(free: Vec<(u32, u32)>) -> Self {
        Self { free, leases: Vec::new() }
    }

    /// The largest free range: its length and where it stands in `free`. Length 0 if there is none.
    fn largest(&self) -> (u32, usize) {
        let lengths = self.free.iter().map(|(first, last)| last - first + 1);
        lengths.zip(0..).max().unwrap_or((0, 0))
    }

    /// Takes up to `wanted` generations from the start of the largest free range.
    fn take(&mut self, wanted: u32) -> (u32, u32) {
        let (len, place) = self.largest();
        let (first, last) = self.free[place];
        if len <= wanted {
            self.free.remove(place);
            return (first, last);
        }
        self.free[place].0 = first + wanted;
        (first, first + wanted - 1)
    }

    /// Makes a range free again.
    fn add_free(&mut self, first: u32, last: u32) {
        if first > last {
            return;
        }
        let place = self.free.partition_point(|range| range.1 < first);
        self.free.insert(place, (first, last));
        self.free.dedup_by(|next, range| {
            let joined = range.1 + 1 == next.0;
            if joined {
                range.1 = next.1;
            }
            joined
        });
    }
}

/// The tags of one kind.
struct Space {
    /// Of tag 1 and so on, as far as tags were ever given out.
    entries: Vec<Entry>,
    /// Where the next search begins.
    next: usize,
}

static SPACES: Mutex<[Space; 16]> =
    Mutex::new([const { Space { entries: Vec::new(), next: 0 } }; 16]);

fn spaces() -> MutexGuard<'static, [Space; 16]> {
    SPACES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    /// A lease of up to `wanted` generations.
    fn take(&mut self, kind: Kind, wanted: u32) -> Option<Arc<Lease>> {
        let enough = wanted.min(LEASE_MIN);
        let place = self.unused_tag(enough).or_else(|| self.free_range(enough));
        let lease = match place {
            Some(place) => self.lease(kind, place, wanted),
            None => self.halve_largest()?,
        };
        self.entries[usize::from(lease.tag) - 1].leases.push(Arc::clone(&lease));
        Some(lease)
    }

    /// The next tag that no live arena has, with a free range of `enough` generations.
    fn unused_tag(&mut self, enough: u32) -> Option<usize> {
        for _ in 0..TAGS {
            let place = self.next;
            self.next = (place + 1) % TAGS;
            if place == self.entries.len() {
                self.entries.push(Entry::new(vec![(1, LAST_GENERATION)]));
            }
            let entry = &self.entries[place];
            if entry.leases.is_empty() && entry.largest().0 >= enough {
                return Some(place);
            }
        }
        None
    }

    /// The tag with the largest free range, if that has `enough` generations.
    fn free_range(&self, enough: u32) -> Option<usize> {
        let ranges = self.entries.iter().map(|entry| entry.largest().0);
        ranges.zip(0..).max().filter(|(len, _)| *len >= enough).map(|(_, place)| place)
    }

    fn lease(&mut self, kind: Kind, place: usize, wanted: u32) -> Arc<Lease> {
        let (first, last) = self.entries[place].take(wanted);
        let tag = u16::try_from(place + 1).expect("tags have twelve bits");
        Lease::new(kind, tag, first, last)
    }

    fn halve_largest(&self) -> Option<Arc<Lease>> {
        let leases = self.entries.iter().flat_map(|entry| &entry.leases);
        leases.max_by_key(|lease| lease.left())?.halve()
    }
}

/// An arena's tag and generations, returned when dropped.
pub(crate) struct Tag(Option<Arc<Lease>>);

impl Tag {
    /// Takes a tag with up to `wanted` generations, at least one.
    pub(crate) fn take(kind: Kind, wanted: u32) -> Self {
        Self(spaces()[usize::from(kind.to_u8())].take(kind, wanted))
    }

    /// The tag; 0, which no handle has, without a lease.
    pub(crate) fn number(&self) -> u16 {
        self.0.as_ref().map_or(0, |lease| lease.tag)
    }

    /// Whether the arena may have slots at all.
    pub(crate) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// The generation of new slots.
    pub(crate) fn first_generation(&self) -> u32 {
        self.0.as_ref().map_or(1, |lease| lease.first)
    }

    /// Whether a slot may go on to this generation.
    pub(crate) fn begin(&self, generation: u32) -> bool {
        self.0.as_ref().is_some_and(|lease| lease.begin(generation))
    }

    /// Whether a handle of this generation and tag comes from an earlier arena.
    pub(crate) fn is_foreign(&self, generation: u32) -> bool {
        (1..self.first_generation()).contains(&generation)
    }
}

impl Drop for Tag {
    fn drop(&mut self) {
        let Some(lease) = &self.0 else { return };
        let mut spaces = spaces();
        let entry =
            &mut spaces[usize::from(lease.kind.to_u8())].entries[usize::from(lease.tag) - 1];
        let (highest, last) = lease.bounds();
        entry.add_free(highest + 1, last);
        entry.leases.retain(|other| !Arc::ptr_eq(other, lease));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{Arena, Handle, Stale, handle};

    // Kinds that no other test of this crate uses.
    const CROWDED: Kind = Kind::new(15);
    const RECYCLED: Kind = Kind::new(14);
    const EXHAUSTED: Kind = Kind::new(13);
    const BESIDE: Kind = Kind::new(12);

    /// Asserts that no two of these share a generation under a tag.
    fn assert_disjoint(tags: &[Tag]) {
        let mut ranges: Vec<(u16, u32, u32)> = tags
            .iter()
            .filter_map(|tag| tag.0.as_ref())
            .map(|lease| (lease.tag, lease.first, lease.bounds().1))
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            let ((tag, _, last), (other, first, _)) = (pair[0], pair[1]);
            assert!(tag != other || last < first, "{pair:?}");
        }
    }

    #[test]
    fn live_arenas_of_a_kind_never_share_a_generation_of_a_tag() {
        let mut tags: Vec<Tag> = (0..TAGS).map(|_| Tag::take(CROWDED, LAST_GENERATION)).collect();
        let numbers: HashSet<u16> = tags.iter().map(Tag::number).collect();
        assert_eq!(numbers.len(), TAGS, "each has its own while there are unused ones");
        assert!(!numbers.contains(&0));

        // An arena that has used most of its generations goes on to what it may, and not beyond
        // what it gave away.
        let busy = tags.swap_remove(7);
        assert!(busy.begin(LAST_GENERATION - 3 * LEASE_MIN));
        tags.extend((0..600).map(|_| Tag::take(CROWDED, LAST_GENERATION)));
        tags.push(busy);
        assert!(tags.iter().all(Tag::is_some));
        assert_disjoint(&tags);
        for tag in &tags {
            let (highest, last) = tag.0.as_ref().unwrap().bounds();
            assert!(highest <= last && tag.begin(last) && !tag.begin(last + 1));
        }
        // All was begun: nothing is left to halve.
        assert!(!Tag::take(CROWDED, LAST_GENERATION).is_some());
        assert!(!Tag::take(CROWDED, 1).is_some());
    }

    #[test]
    fn a_tag_that_comes_back_starts_above_what_was_used_under_it() {
        let first = Tag::take(RECYCLED, 100);
        assert!(first.begin(41) && !first.begin(101));
        let number = first.number();
        drop(first);
        let again = (0..TAGS).map(|_| Tag::take(RECYCLED, 100)).find(|tag| tag.number() == number);
        let again = again.expect("the search goes round");
        assert_eq!(again.first_generation(), 42);
        assert!(again.begin(141) && !again.begin(142), "as many as were requested");
        assert!(again.is_foreign(1) && again.is_foreign(41) && !again.is_foreign(42));
        assert!(!again.is_foreign(0), "no arena ever issues 0");
    }

    /// More live arenas than tags, and new ones beside them for ever: the new ones use up what they
    /// begin, not what they lease.
    #[test]
    fn new_arenas_beside_more_than_all_tags_never_run_out() {
        let crowd: Vec<Tag> = (0..TAGS + 10).map(|_| Tag::take(BESIDE, LAST_GENERATION)).collect();
        for round in 0..40_000 {
            let tag = Tag::take(BESIDE, LAST_GENERATION);
            assert!(tag.is_some(), "round {round}");
            let first = tag.first_generation();
            assert!(tag.begin(first + 1));
        }
        assert_disjoint(&crowd);
        let spaces = spaces();
        let ranges = spaces[usize::from(BESIDE.to_u8())].entries.iter().map(|e| e.free.len());
        assert!(ranges.max() <= Some(2), "ranges are joined, not scattered");
    }

    #[test]
    fn generations_not_begun_are_free_again_and_joined() {
        let mut entry = Entry::new(vec![(1, 100)]);
        assert_eq!((entry.take(30), entry.take(30)), ((1, 30), (31, 60)));
        entry.add_free(11, 30);
        assert_eq!(entry.free, [(11, 30), (61, 100)]);
        entry.add_free(61, 60);
        entry.add_free(31, 60);
        assert_eq!(entry.free, [(11, 100)]);
        assert_eq!((entry.take(1000), entry.largest().0), ((11, 100), 0));
        entry.add_free(50, 60);
        entry.add_free(20, 30);
        entry.add_free(90, 100);
        assert_eq!(entry.free, [(20, 30), (50, 60), (90, 100)]);
        assert_eq!(entry.take(5), (90, 94), "of several as long, the last");
    }

    /// What an arena with this tag could have given out.
    fn few_handle(tag: u16) -> Handle<&'static str> {
        let base = handle::prefix(EXHAUSTED, tag) << handle::PREFIX_SHIFT;
        Handle::with_generation(base, LAST_GENERATION)
    }

    #[test]
    fn without_generations_an_arena_has_no_slots_and_says_so() {
        let used = LAST_GENERATION - 5;
        spaces()[usize::from(EXHAUSTED.to_u8())].entries =
            (0..TAGS).map(|_| Entry::new(vec![(used + 1, LAST_GENERATION)])).collect();
        let few = Tag::take(EXHAUSTED, 5);
        assert_eq!((few.first_generation(), few.begin(used + 5)), (used + 1, true));
        assert!(!Tag::take(EXHAUSTED, 6).is_some());

        let arena = Arena::new(EXHAUSTED);
        let full = arena.insert("object").unwrap_err();
        assert_eq!((full.capacity, arena.tag(), arena.kind()), (0, 0, EXHAUSTED));
        assert!(full.to_string().contains("no generations are left"), "{full}");
        let handle = few_handle(few.number());
        assert_eq!(arena.acquire(handle).err(), Some(Stale::WrongArena));
    }
}
