//! `Arena<T>`: inserts objects, looks them up by handle, and holds the state of all its slots.
//!
//! A look-up takes no lock. Inserts, reaps and diagnostics take the free list's lock for a few
//! instructions, never while foreign code runs. Lock order: free list, then a slot's side.
//!
//! The memory is kept by every `Arena` clone, every watch, and every occupied slot through its
//! occupant. So a `Strong` is a bare pointer, and cloning it is one atomic operation.

use std::{fmt, panic::Location};

use slab::Slab;

use crate::{
    dead::Dead,
    graveyard::{Graveyard, Reap},
    handle::{GENERATION_BITS, Handle, INDEX_BITS, Kind, PREFIX_SHIFT, prefix},
    holder::{Held, Holder, HolderInfo},
    lifecycle::{State, Word},
    pages::{self, MAX_SLOTS, Pages},
    slot::{Occupant, Slot},
    stale::{Full, Stale},
    strong::Strong,
    sync::{Arc, Mutex},
    tag::Tag,
    watch::Watch,
};

/// Options of an arena. Start from [`ArenaConfig::new`] and narrow what must be narrow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaConfig {
    /// Kind of the objects; part of every handle.
    pub kind: Kind,
    /// Width of the generation, 1 to 24: a slot serves at most 2ⁿ − 1 objects and is then retired.
    /// (Fewer only at full width: generations that earlier arenas used under the same tag are never
    /// used again.)
    pub generation_bits: u32,
    /// Width of the index, 0 to 24: the arena has at most 2ⁿ slots, and never more than 13.6
    /// million.
    pub index_bits: u32,
}

impl ArenaConfig {
    /// The full widths.
    pub const fn new(kind: Kind) -> Self {
        Self { kind, generation_bits: GENERATION_BITS, index_bits: INDEX_BITS }
    }
}

/// Counts of slots at one moment: `live + dead + free + retired == capacity`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaStats {
    /// Slots that the arena can have.
    pub capacity: usize,
    /// Slots whose object can be acquired, and those being filled by an insert.
    pub live: usize,
    /// Slots whose object has lost its last reference and has not been finished by a reaper.
    pub dead: usize,
    /// Slots that an insert can use.
    pub free: usize,
    /// Slots that are never used again because their generations are exhausted.
    pub retired: usize,
}

/// The free list's entry of a slot that is not free.
enum Entry {
    InUse,
    Retired,
}

/// The free list of slots, with the counts of those that are retired or being closed.
// Inserts and reaps write here; on lines of its own for the same reason as the graveyard.
#[repr(align(128))]
pub(crate) struct FreeList {
    slots: Slab<Entry>,
    retired: usize,
    /// Dead objects that were reaped and not dropped yet.
    pub(crate) closing: usize,
}

pub(crate) struct Shared<T> {
    /// Kind and tag, as in [`Handle::prefix`].
    prefix: u64,
    pages: Pages<T>,
    pub(crate) graveyard: Graveyard,
    capacity: u32,
    free_list: Mutex<FreeList>,
    /// Which generations the slots may have.
    tag: Tag,
}

impl<T> Shared<T> {
    /// The slot at a handle's index, or why there is none. Does not check the generation.
    #[inline]
    pub(crate) fn slot(&self, handle: Handle<T>) -> Result<&Slot<T>, Stale> {
        if handle.prefix() != self.prefix {
            return Err(self.explain_prefix(handle));
        }
        self.pages.slot(handle.place()).ok_or_else(|| self.explain_absent(handle))
    }

    /// The slot at this place, which exists.
    pub(crate) fn slot_at(&self, place: u32) -> &Slot<T> {
        self.pages.slot(place).expect("places inside the arena come from existing slots")
    }

    #[cold]
    fn explain_prefix(&self, handle: Handle<T>) -> Stale {
        let own = Handle::<T>::from_u64(self.prefix << PREFIX_SHIFT);
        if handle.is_null() {
            Stale::Null
        } else if handle.kind() != own.kind() {
            Stale::WrongKind
        } else {
            Stale::WrongArena
        }
    }

    /// Why there is no slot at the place that a handle names.
    #[cold]
    fn explain_absent(&self, handle: Handle<T>) -> Stale {
        match self.tag.is_foreign(handle.generation()) {
            true => Stale::WrongArena,
            false => Stale::NeverIssued,
        }
    }

    /// Why a slot's word refuses a handle.
    #[cold]
    fn explain(&self, word: Word, handle: Handle<T>) -> Stale {
        match self.tag.is_foreign(handle.generation()) {
            true => Stale::WrongArena,
            false => Slot::<T>::explain(word, handle.generation()),
        }
    }

    pub(crate) fn check(&self, handle: Handle<T>) -> Result<(), Stale> {
        let word = self.slot(handle)?.word();
        match self.explain(word, handle) {
            Stale::TooManyReferences => Ok(()), // what `explain` says of a live object
            stale => Err(stale),
        }
    }

    pub(crate) fn free_list(&self) -> impl std::ops::DerefMut<Target = FreeList> + '_ {
        self.free_list.lock()
    }

    /// Ends a slot's generation: puts the slot back on the free list, or retires it.
    ///
    /// # Safety
    /// As for [`Slot::end`].
    pub(crate) unsafe fn end(&self, slot: &Slot<T>, was_dead: bool) {
        let key = pages::key(slot.place()) as usize;
        let holders = std::mem::take(&mut slot.side.lock().holders);
        let mut free_list = self.free_list.lock();
        if was_dead {
            free_list.closing -= 1;
        }
        // SAFETY: the caller's duty is the same.
        if unsafe { slot.end(&self.tag) } {
            free_list.retired += 1;
            free_list.slots[key] = Entry::Retired;
        } else {
            free_list.slots.remove(key);
        }
        drop(free_list);
        drop(holders); // records freed outside the locks
    }

    fn stats(&self) -> ArenaStats {
        let free_list = self.free_list.lock();
        let capacity = self.capacity as usize;
        let taken = free_list.slots.len();
        let retired = free_list.retired;
        let in_use = taken - retired;
        let dead = (self.graveyard.len() + free_list.closing).min(in_use);
        ArenaStats { capacity, live: in_use - dead, dead, free: capacity - taken, retired }
    }
}

/// A slot reserved for one insert. Freed with a new generation if making the value panics: the
/// handle may have been passed on by then.
struct Reservation<'a, T> {
    shared: &'a Arc<Shared<T>>,
    slot: &'a Slot<T>,
}

impl<'a, T> Reservation<'a, T> {
    /// Reserves a free slot.
    fn take(shared: &'a Arc<Shared<T>>) -> Result<Self, Full> {
        let mut free_list = shared.free_list.lock();
        let key = u32::try_from(free_list.slots.vacant_key()).unwrap_or(u32::MAX);
        if key >= shared.capacity {
            return Err(Full { capacity: shared.capacity as usize, retired: free_list.retired });
        }
        let first =
            Handle::with_generation(shared.prefix << PREFIX_SHIFT, shared.tag.first_generation());
        let slot = shared.pages.slot_or_grow(key, shared.capacity, first);
        slot.reserve();
        free_list.slots.insert(Entry::InUse);
        Ok(Self { shared, slot })
    }

    fn publish(self, value: T) -> Strong<T> {
        let Self { shared, slot } = self;
        std::mem::forget(self);
        // SAFETY: a Reservation exists only after `reserve`, and this consumes it without running
        // its drop.
        unsafe { slot.publish(Occupant { value, owner: Arc::clone(shared) }) };
        // SAFETY: `publish` made the one reference that this takes over.
        unsafe { Strong::from_owned(slot) }
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        // SAFETY: a Reservation that is dropped was not published, so the slot is still reserved by
        // us.
        unsafe { self.shared.end(self.slot, false) };
    }
}

/// Orphans the arena when the last `Arena` is dropped: from then on releases reap.
struct Owner<T>(Arc<Shared<T>>);

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        self.0.orphan();
    }
}

/// Stores objects of type `T` that are counted and looked up through [`Handle`]s.
///
/// A clone is the same arena, from any thread. When the last clone is dropped, objects that still
/// have references live on; [`Strong`] states how they are dropped then. A value should not own a
/// clone of the arena that stores it: the arena would never be orphaned, and a value whose only
/// users are gone would wait for a reap that cannot come.
pub struct Arena<T> {
    shared: Arc<Shared<T>>,
    _owner: Arc<Owner<T>>,
}

impl<T> Arena<T> {
    /// An empty arena of full width.
    pub fn new(kind: Kind) -> Self {
        Self::with_config(ArenaConfig::new(kind))
    }

    /// An empty arena. Narrow widths make exhaustion testable.
    ///
    /// # Panics
    /// If a width is outside the range that [`ArenaConfig`] states.
    pub fn with_config(config: ArenaConfig) -> Self {
        let ArenaConfig { kind, generation_bits, index_bits } = config;
        assert!(
            (1..=GENERATION_BITS).contains(&generation_bits),
            "generation_bits must be 1 to 24"
        );
        assert!(index_bits <= INDEX_BITS, "index_bits must be 0 to 24");
        let tag = Tag::take(kind, (1 << generation_bits) - 1);
        let capacity = if tag.is_some() { MAX_SLOTS.min(1 << index_bits) } else { 0 };
        let shared = Arc::new(Shared {
            prefix: prefix(kind, tag.number()),
            pages: Pages::new(),
            graveyard: Graveyard::new(),
            capacity,
            free_list: Mutex::new(FreeList { slots: Slab::new(), retired: 0, closing: 0 }),
            tag,
        });
        Self { _owner: Arc::new(Owner(Arc::clone(&shared))), shared }
    }

    /// Stores a value and returns the one reference to it.
    ///
    /// # Errors
    /// [`Full`] when no slot is free; the value is dropped.
    pub fn insert(&self, value: T) -> Result<Strong<T>, Full> {
        Reservation::take(&self.shared).map(|slot| slot.publish(value))
    }

    /// Like [`insert`](Self::insert), for a value that needs its own handle. The handle resolves
    /// only after `make` has returned; if `make` panics it never will. No lock is held while `make`
    /// runs.
    ///
    /// # Errors
    /// [`Full`] when no slot is free; `make` is not called.
    pub fn insert_with(&self, make: impl FnOnce(Handle<T>) -> T) -> Result<Strong<T>, Full> {
        let slot = Reservation::take(&self.shared)?;
        let value = make(slot.slot.handle());
        Ok(slot.publish(value))
    }

    /// A reference to the object that the handle names: the only way from a handle to an object.
    ///
    /// Lock-free, from any thread. An object whose last reference was released is refused for ever.
    ///
    /// # Errors
    /// [`Stale`] says why the handle leads nowhere.
    #[inline]
    pub fn acquire(&self, handle: Handle<T>) -> Result<Strong<T>, Stale> {
        let slot = self.shared.slot(handle)?;
        match slot.acquire(handle.generation()) {
            // SAFETY: `acquire` made the one reference that this takes over.
            Ok(()) => Ok(unsafe { Strong::from_owned(slot) }),
            Err(word) => Err(self.shared.explain(word, handle)),
        }
    }

    /// Like [`acquire`](Self::acquire), with a named holder.
    ///
    /// # Errors
    /// [`Stale`] says why the handle leads nowhere.
    #[track_caller]
    pub fn acquire_held(&self, handle: Handle<T>, holder: Holder) -> Result<Held<T>, Stale> {
        let since = Location::caller();
        self.acquire(handle).map(|strong| Held::register(strong, holder, since))
    }

    /// Whether the handle can be acquired. Advisory: a refusal is final, a success may be outdated
    /// on return. Reads one word and writes nothing, so checking never slows other threads down.
    ///
    /// # Errors
    /// [`Stale`] says why the handle leads nowhere.
    #[inline]
    pub fn check(&self, handle: Handle<T>) -> Result<(), Stale> {
        let slot = self.shared.slot(handle)?;
        if slot.word().admits(handle.generation()) { Ok(()) } else { self.shared.check(handle) }
    }

    /// Number of references of an object, 0 for a stale handle. For diagnostics: outdated on
    /// return.
    pub fn count(&self, handle: Handle<T>) -> usize {
        match self.shared.slot(handle).map(Slot::word) {
            Ok(word) if word.admits(handle.generation()) => {
                usize::try_from(word.count()).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// Lists the named holders of an object in order of registration; empty for a stale handle.
    /// Takes no reference, so this call is never the last holder.
    pub fn holders(&self, handle: Handle<T>) -> Vec<HolderInfo> {
        let Ok(slot) = self.shared.slot(handle) else { return Vec::new() };
        let mut side = slot.side.lock();
        // The list is emptied before the generation moves on, so under the lock an equal generation
        // means its own list.
        if slot.word().generation() != handle.generation() {
            return Vec::new();
        }
        side.holders.list()
    }

    /// A watch on the object's end. A handle that names nothing alive gives a watch that has fired.
    pub fn watch(&self, handle: Handle<T>) -> Watch<T> {
        Watch::new(Arc::clone(&self.shared), handle)
    }

    /// The handles of all objects that live now. Objects that come or go meanwhile may or may not
    /// be among them.
    pub fn snapshot(&self) -> Vec<Handle<T>> {
        let live = |slot: &&Slot<T>| {
            let word = slot.word();
            word.state() == State::Occupied && word.count() > 0
        };
        self.shared.pages.iter().filter(live).map(Slot::handle).collect()
    }

    /// Whether dead objects wait to be reaped: one relaxed load. May be true shortly before the
    /// object can be reaped; never misses an object whose release has returned.
    #[inline]
    pub fn has_dead(&self) -> bool {
        self.shared.graveyard.len() > 0
    }

    /// Number of dead objects that wait to be reaped.
    pub fn graveyard_len(&self) -> usize {
        self.shared.graveyard.len()
    }

    /// Takes the dead object that has waited longest. It is owned by the caller alone; close it,
    /// then drop the [`Dead`] or take the value out, which frees the slot. Wakes the watchers of
    /// that object.
    pub fn reap_one(&self) -> Option<(Handle<T>, Dead<T>)> {
        self.shared.reap_one()
    }

    /// Takes dead objects until there are none, including those whose last reference an earlier one
    /// held. A chain of any length needs no recursion.
    pub fn reap(&self) -> Reap<'_, T> {
        Reap::new(self)
    }

    /// Drops all dead objects and returns how many there were. For objects that need no closing.
    pub fn reap_all(&self) -> usize {
        self.reap().map(drop).count()
    }

    /// Wakes the watchers of all dead objects without reaping these. Returns how many were woken.
    pub fn deliver_watches(&self) -> usize {
        self.shared.deliver_watches()
    }

    /// All counts at one moment.
    pub fn stats(&self) -> ArenaStats {
        self.shared.stats()
    }

    /// Objects that can be acquired.
    pub fn live(&self) -> usize {
        self.stats().live
    }

    /// Objects without a reference that no reaper has finished yet.
    pub fn dead(&self) -> usize {
        self.stats().dead
    }

    /// Slots that are never used again.
    pub fn retired(&self) -> usize {
        self.stats().retired
    }

    /// Slots that the arena can have in all.
    pub fn capacity(&self) -> usize {
        self.shared.capacity as usize
    }

    /// Kind of the objects.
    pub fn kind(&self) -> Kind {
        Handle::<T>::from_u64(self.shared.prefix << PREFIX_SHIFT)
            .kind()
            .expect("an arena is made with a kind")
    }

    /// The tag in the handles of this arena.
    pub fn tag(&self) -> u16 {
        Handle::<T>::from_u64(self.shared.prefix << PREFIX_SHIFT).tag()
    }
}

impl<T> Clone for Arena<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), _owner: Arc::clone(&self._owner) }
    }
}

impl<T> fmt::Debug for Arena<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.stats();
        f.debug_struct("Arena")
            .field("kind", &self.kind().to_u8())
            .field("tag", &self.tag())
            .field("stats", &stats)
            .finish()
    }
}
