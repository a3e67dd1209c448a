//! Handle tables: which handle names which reference, in arenas of bds-refcount.
//!
//! An entry is one reference of C's. The table itself owns one count of it, which a release takes
//! away once; every call under way owns another one, so that what it works on outlives a release
//! on another thread. Look-ups take no lock. A handle value is never given out twice in a process,
//! and is stale from its release on.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use bds_refcount::{Arena, Handle, Kind, Release, Stale, Strong};

use crate::abi::bds_status::BDS_ERR_POISONED;
use crate::failure::Failure;
use crate::fault;

/// A kind of objects that C has handles of.
pub(crate) trait Object: Send + Sync + Sized + 'static {
    /// Keeps what a panicking call worked on from being written to.
    fn poison(&self) {}
}

/// One reference of C's.
pub(crate) struct Entry<T> {
    value: T,
    is_released: AtomicBool,
    is_poisoned: AtomicBool,
    /// The table's own count; taken by the release.
    own: Mutex<Option<Strong<Entry<T>>>>,
}

/// The handles of one kind.
pub(crate) struct Table<T: Object> {
    kind: Kind,
    arena: OnceLock<Arena<Entry<T>>>,
}

/// What a release found.
pub(crate) enum Removed<T> {
    /// The reference is the caller's alone.
    Taken(T),
    /// A call under way still uses it, and drops it.
    InUse,
}

impl<T: Object> Table<T> {
    pub(crate) const fn new(kind: u8) -> Self {
        Self { kind: Kind::new(kind), arena: OnceLock::new() }
    }

    #[inline]
    fn arena(&self) -> &Arena<Entry<T>> {
        self.arena.get_or_init(|| Arena::new(self.kind))
    }

    /// Makes a handle.
    pub(crate) fn insert(&self, value: T) -> Result<u64, Failure> {
        fault::point("insert");
        let entry = Entry {
            value,
            is_released: AtomicBool::new(false),
            is_poisoned: AtomicBool::new(false),
            own: Mutex::new(None),
        };
        let strong = self.arena().insert(entry)?;
        let raw = strong.handle().to_u64();
        // Only now can a release succeed; a forged handle could be released before C has it.
        *strong.lock_own() = Some(strong.clone());
        Ok(raw)
    }

    /// The entry of a handle, poisoned or not: for queries and releases.
    #[inline]
    pub(crate) fn find(&'static self, raw: u64) -> Result<Ref<T>, Failure> {
        let strong = self.arena().acquire(Handle::from_u64(raw))?;
        let entry = Ref { strong: Some(strong), table: self };
        if entry.entry().is_released.load(Ordering::Acquire) {
            return Err(Stale::Released.into());
        }
        fault::point("lookup");
        Ok(entry)
    }

    /// The entry of a handle.
    #[inline]
    pub(crate) fn get(&'static self, raw: u64) -> Result<Ref<T>, Failure> {
        let entry = self.find(raw)?;
        if entry.entry().is_poisoned.load(Ordering::Relaxed) {
            return Err(Failure::new(BDS_ERR_POISONED, "a panic has poisoned the object"));
        }
        Ok(entry)
    }

    /// Releases a handle: exactly one of any number of concurrent calls succeeds.
    pub(crate) fn remove(&'static self, raw: u64) -> Result<Removed<T>, Failure> {
        let entry = self.find(raw)?;
        let own = entry.entry().lock_own().take().ok_or(Stale::Released)?;
        entry.entry().is_released.store(true, Ordering::Release);
        drop(entry);
        match own.into_dead() {
            Ok(dead) => Ok(Removed::Taken(dead.into_inner().value)),
            Err(own) => {
                self.release(own);
                Ok(Removed::InUse)
            }
        }
    }

    fn release(&self, strong: Strong<Entry<T>>) {
        if strong.release() == Release::Last {
            self.arena().reap_all();
        }
    }
}

impl<T> Entry<T> {
    fn lock_own(&self) -> std::sync::MutexGuard<'_, Option<Strong<Entry<T>>>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entry during a call. Dropped by a panic, it poisons the object.
pub(crate) struct Ref<T: Object> {
    /// `None` only while it is dropped.
    strong: Option<Strong<Entry<T>>>,
    table: &'static Table<T>,
}

impl<T: Object> Ref<T> {
    #[inline]
    fn entry(&self) -> &Strong<Entry<T>> {
        self.strong.as_ref().expect("it is taken by the drop alone")
    }
}

impl<T: Object> Deref for Ref<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.entry().value
    }
}

impl<T: Object> Drop for Ref<T> {
    #[inline]
    fn drop(&mut self) {
        let Some(strong) = self.strong.take() else { return };
        if thread::panicking() {
            strong.is_poisoned.store(true, Ordering::Relaxed);
            strong.value.poison();
        }
        self.table.release(strong);
    }
}
