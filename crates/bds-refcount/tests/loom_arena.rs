//! Explores every interleaving of a few operations on few objects with loom.
//!
//! `CARGO_TARGET_DIR=target/loom RUSTFLAGS="--cfg loom" cargo test -p bds-refcount --test
//! loom_arena --release`
//!
//! The value holds a loom cell, so loom also fails a test when the value is read without being
//! ordered after the write, or while a reaper changes it: the `unsafe` arguments of `slot.rs`,
//! checked. Loom's `Arc` fails a test that leaks the arena.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in helpers too")]

use std::{
    sync::{
        Arc as StdArc,
        atomic::{AtomicUsize as StdAtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Wake, Waker},
};

use bds_refcount::{
    Arena, ArenaConfig, Handle, Holder, Kind, RcuCell, Release, Stale, Strong, WaitUnread, Watch,
};
use loom::{cell::UnsafeCell, thread};

/// A number that loom watches, and a count of its drops.
struct Value {
    cell: UnsafeCell<u32>,
    drops: StdArc<StdAtomicUsize>,
}

// SAFETY: for loom's eyes only: it reports unordered access to the cell, which is what these tests
// look for.
unsafe impl Sync for Value {}

impl Value {
    fn read(&self) -> u32 {
        // SAFETY: loom fails the test if a write is not ordered before this.
        self.cell.with(|cell| unsafe { *cell })
    }

    fn write(&mut self, number: u32) {
        // SAFETY: `&mut self`; and loom fails the test if any other access is not ordered before
        // this.
        self.cell.with_mut(|cell| unsafe { *cell = number });
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        self.write(0); // must be ordered after everything
        self.drops.fetch_add(1, Relaxed);
    }
}

#[derive(Clone, Default)]
struct Drops(StdArc<StdAtomicUsize>);

impl Drops {
    fn value(&self, number: u32) -> Value {
        Value { cell: UnsafeCell::new(number), drops: StdArc::clone(&self.0) }
    }

    fn count(&self) -> usize {
        self.0.load(Relaxed)
    }
}

fn arena() -> Arena<Value> {
    // Few slots keep the model small.
    Arena::with_config(ArenaConfig { index_bits: 1, ..ArenaConfig::new(Kind::new(1)) })
}

fn one() -> (Arena<Value>, Drops, Strong<Value>, Handle<Value>) {
    let (arena, drops) = (arena(), Drops::default());
    let strong = arena.insert(drops.value(1)).unwrap();
    let handle = strong.handle();
    (arena, drops, strong, handle)
}

#[test]
fn exactly_one_of_two_releases_is_last() {
    loom::model(|| {
        let (arena, drops, first, handle) = one();
        let second = first.clone();
        let other = thread::spawn(move || {
            second.read();
            second.release()
        });
        first.read();
        let mine = first.release();
        let theirs = other.join().unwrap();
        assert_ne!(mine, theirs, "one is last, one is not");
        assert_eq!(arena.check(handle), Err(Stale::Dying));
        let (_, mut dead) = arena.reap_one().unwrap();
        dead.write(2); // ordered after both reads
        drop(dead);
        assert!(arena.reap_one().is_none());
        assert_eq!(drops.count(), 1);
    });
}

#[test]
fn acquire_against_the_last_release_never_resurrects() {
    loom::model(|| {
        let (arena, drops, strong, handle) = one();
        let theirs = arena.clone();
        let other = thread::spawn(move || match theirs.acquire(handle) {
            Ok(strong) => {
                assert_eq!(strong.read(), 1);
                Some(strong.release())
            }
            Err(stale) => {
                assert_eq!(stale, Stale::Dying);
                assert_eq!(theirs.acquire(handle).err(), Some(Stale::Dying), "and stays so");
                None
            }
        });
        let mine = strong.release();
        let theirs = other.join().unwrap();
        let lasts = [Some(mine), theirs].iter().filter(|r| **r == Some(Release::Last)).count();
        assert_eq!(lasts, 1);
        assert_eq!(arena.reap_all(), 1);
        assert_eq!(drops.count(), 1);
        assert_eq!(arena.acquire(handle).err(), Some(Stale::Released));
    });
}

#[test]
fn acquire_sees_what_the_inserter_wrote() {
    loom::model(|| {
        let arena = arena();
        let drops = Drops::default();
        drop(arena.insert(drops.value(7)).unwrap()); // its page exists, its slot is used again
        let name = Handle::<Value>::from_u64({
            let (handle, dead) = arena.reap_one().unwrap();
            drop(dead);
            handle.to_u64() + (1 << 24)
        });
        let theirs = arena.clone();
        let other = thread::spawn(move || {
            match theirs.acquire(name) {
                Ok(strong) => assert_eq!(strong.read(), 8),
                Err(stale) => assert_eq!(stale, Stale::NeverIssued),
            }
            theirs.check(name).is_ok()
        });
        let strong = arena.insert(drops.value(8)).unwrap();
        assert_eq!(strong.handle(), name);
        other.join().unwrap();
    });
}

#[test]
fn a_stale_handle_never_reaches_the_next_object_in_its_slot() {
    loom::model(|| {
        let arena =
            Arena::with_config(ArenaConfig { index_bits: 0, ..ArenaConfig::new(Kind::new(1)) });
        let drops = Drops::default();
        let old = arena.insert(drops.value(1)).unwrap();
        let handle = old.handle();
        let theirs = arena.clone();
        let other = thread::spawn(move || {
            if let Ok(strong) = theirs.acquire(handle) {
                assert_eq!(strong.read(), 1);
            }
        });
        drop(old);
        theirs_next(&arena, &drops, handle);
        other.join().unwrap();
        arena.reap_all();
        assert_eq!((arena.live(), arena.dead()), (0, 0));
    });

    /// Reaps the old object if it is dead already, and puts another in its slot.
    fn theirs_next(arena: &Arena<Value>, drops: &Drops, old: Handle<Value>) {
        if arena.reap_all() == 1 {
            let next = arena.insert(drops.value(2)).unwrap();
            assert_ne!(next.handle(), old);
            assert_eq!(next.read(), 2);
        }
    }
}

#[test]
fn two_reapers_never_get_the_same_object() {
    loom::model(|| {
        let (arena, drops, first, _) = one();
        let second = arena.insert(drops.value(2)).unwrap();
        drop(second);
        let theirs = arena.clone();
        let other = thread::spawn(move || match theirs.reap_one() {
            Some((_, mut dead)) => {
                dead.write(9);
                1
            }
            None => 0,
        });
        drop(first);
        let mine = arena.reap_all();
        let theirs = other.join().unwrap();
        assert_eq!(mine + theirs + arena.reap_all(), 2);
        assert_eq!(drops.count(), 2);
        assert_eq!(arena.stats().free, 2);
    });
}

#[test]
fn two_last_releases_both_reach_the_graveyard() {
    loom::model(|| {
        let (arena, drops, first, _) = one();
        let second = arena.insert(drops.value(2)).unwrap();
        let other = thread::spawn(move || second.release());
        assert_eq!(first.release(), Release::Last);
        assert!(arena.has_dead());
        assert_eq!(other.join().unwrap(), Release::Last);
        assert_eq!(arena.graveyard_len(), 2);
        assert_eq!(arena.reap_all(), 2);
        assert_eq!(drops.count(), 2);
    });
}

#[test]
fn the_last_release_against_the_last_arena_handle_leaks_nothing() {
    loom::model(|| {
        let (arena, drops, strong, _) = one();
        let other = thread::spawn(move || strong.release());
        drop(arena);
        assert_eq!(other.join().unwrap(), Release::Last);
        assert_eq!(drops.count(), 1);
    });
}

#[test]
fn two_last_releases_in_an_orphaned_arena_drop_both_once() {
    loom::model(|| {
        let (arena, drops, first, _) = one();
        let second = arena.insert(drops.value(2)).unwrap();
        drop(arena);
        let other = thread::spawn(move || second.release());
        assert_eq!(first.release(), Release::Last);
        assert_eq!(other.join().unwrap(), Release::Last);
        assert_eq!(drops.count(), 2);
    });
}

#[test]
fn two_last_releases_against_the_last_arena_handle() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let (arena, drops, first, _) = one();
        let second = arena.insert(drops.value(2)).unwrap();
        let one = thread::spawn(move || drop(first));
        let two = thread::spawn(move || drop(second));
        drop(arena);
        one.join().unwrap();
        two.join().unwrap();
        assert_eq!(drops.count(), 2);
    });
}

#[test]
fn into_dead_against_acquire_gives_the_object_to_one_side() {
    loom::model(|| {
        let (arena, drops, strong, handle) = one();
        let theirs = arena.clone();
        let other = thread::spawn(move || {
            if let Ok(strong) = theirs.acquire(handle) {
                assert_eq!(strong.read(), 1);
            }
        });
        match strong.into_dead() {
            Ok(mut dead) => {
                dead.write(5);
                assert_eq!(arena.check(handle), Err(Stale::Dying));
            }
            Err(strong) => assert_eq!(strong.read(), 1),
        }
        other.join().unwrap();
        arena.reap_all();
        assert_eq!(drops.count(), 1);
        assert_eq!(arena.stats().free, 2);
    });
}

struct Count(StdAtomicUsize);

impl Wake for Count {
    fn wake(self: StdArc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

fn poll(watch: &mut Watch<Value>, wakes: &StdArc<Count>) -> bool {
    let waker = Waker::from(StdArc::clone(wakes));
    let mut context = Context::from_waker(&waker);
    matches!(std::pin::Pin::new(watch).poll(&mut context), Poll::Ready(()))
}

fn poll_unread(wait: &mut WaitUnread<'_, Value>, wakes: &StdArc<Count>) -> bool {
    let waker = Waker::from(StdArc::clone(wakes));
    std::pin::Pin::new(wait).poll(&mut Context::from_waker(&waker)).is_ready()
}

#[test]
fn a_watcher_that_waits_is_woken_exactly_once() {
    loom::model(|| {
        let (arena, _drops, strong, handle) = one();
        let wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
        let theirs = arena.clone();
        let their_wakes = StdArc::clone(&wakes);
        let other = thread::spawn(move || {
            let mut watch = theirs.watch(handle);
            let ready = poll(&mut watch, &their_wakes);
            (watch, ready)
        });
        drop(strong);
        assert_eq!(arena.reap_all(), 1);
        let (watch, ready) = other.join().unwrap();
        assert!(watch.has_fired());
        assert_eq!(wakes.0.load(Relaxed), usize::from(!ready), "woken if it had to wait");
    });
}

#[test]
fn an_old_handle_never_shows_the_holders_of_the_next_object_in_its_slot() {
    loom::model(|| {
        let arena =
            Arena::with_config(ArenaConfig { index_bits: 0, ..ArenaConfig::new(Kind::new(1)) });
        let drops = Drops::default();
        let old = arena.insert(drops.value(1)).unwrap();
        let handle = old.handle();
        let old = old.held_by(Holder::new("owner", 1));
        let theirs = arena.clone();
        let other = thread::spawn(move || theirs.holders(handle));
        drop(old);
        arena.reap_all();
        let next = arena.insert(drops.value(2)).unwrap();
        let _next = next.held_by(Holder::new("owner", 2));
        let seen = other.join().unwrap();
        assert!(seen.iter().all(|holder| holder.name == 1.into()));
    });
}

#[test]
fn two_inserts_get_two_slots() {
    loom::model(|| {
        let arena = arena();
        let drops = Drops::default();
        let theirs = arena.clone();
        let their_drops = drops.clone();
        // The page exists before the threads part, as loom does not see what makes it visible.
        drop(arena.insert(drops.value(0)).unwrap());
        arena.reap_all();
        let other = thread::spawn(move || theirs.insert(their_drops.value(2)).unwrap());
        let mine = arena.insert(drops.value(1)).unwrap();
        let theirs = other.join().unwrap();
        assert!(!mine.ptr_eq(&theirs));
        assert_eq!((mine.read(), theirs.read()), (1, 2));
        assert!(arena.insert(drops.value(3)).is_err());
    });
}

/// The reader sees one of the values, alive, and the replaced one is dropped with its last reader,
/// whether that is the reader's thread or the replacer's.
#[test]
fn a_cell_is_replaced_while_it_is_read() {
    loom::model(|| {
        let drops = Drops::default();
        let cell = loom::sync::Arc::new(RcuCell::new(drops.value(1)));
        let reader = {
            let cell = cell.clone();
            thread::spawn(move || {
                let seen = cell.read();
                assert!(matches!(seen.read(), 1 | 2));
            })
        };
        cell.replace(drops.value(2));
        assert_eq!(cell.read().read(), 2);
        reader.join().unwrap();
        assert_eq!((drops.count(), cell.waiting()), (1, 0));
        drop(cell);
        assert_eq!(drops.count(), 2);
    });
}

/// Two readers that overlap on one counter, so that it may not be 0 when the replacer looks.
#[test]
fn overlapping_readers_leave_no_retired_value() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let drops = Drops::default();
        let cell = loom::sync::Arc::new(RcuCell::new(drops.value(1)));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let cell = cell.clone();
                thread::spawn(move || assert!(matches!(cell.read().read(), 1 | 2)))
            })
            .collect();
        cell.replace(drops.value(2));
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!((drops.count(), cell.waiting()), (1, 0));
    });
}

/// Two replacements and a reader at once: each replaced value is dropped once, none is left.
#[test]
fn two_replacers_and_a_reader_leave_no_retired_value() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let drops = Drops::default();
        let cell = loom::sync::Arc::new(RcuCell::new(drops.value(1)));
        let reader = {
            let cell = cell.clone();
            thread::spawn(move || assert!(matches!(cell.read().read(), 1..=3)))
        };
        let other = {
            let (cell, value) = (cell.clone(), drops.value(2));
            thread::spawn(move || cell.replace(value))
        };
        cell.replace(drops.value(3));
        reader.join().unwrap();
        other.join().unwrap();
        assert!(matches!(cell.read().read(), 2 | 3));
        assert_eq!((drops.count(), cell.waiting()), (2, 0));
    });
}

/// A wait beside the reader that holds up the drop: woken if it had to wait, complete once the
/// value is dropped.
#[test]
fn wait_unread_is_woken_when_the_last_reader_leaves() {
    loom::model(|| {
        let drops = Drops::default();
        let cell = loom::sync::Arc::new(RcuCell::new(drops.value(1)));
        let reader = {
            let cell = cell.clone();
            thread::spawn(move || assert!(matches!(cell.read().read(), 1 | 2)))
        };
        cell.replace(drops.value(2));
        let wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
        let mut wait = cell.wait_unread();
        let is_ready = poll_unread(&mut wait, &wakes);
        assert!(!is_ready || drops.count() == 1, "complete only after the drop");
        reader.join().unwrap();
        assert_eq!(wakes.0.load(Relaxed), usize::from(!is_ready), "woken if it had to wait");
        assert!(poll_unread(&mut wait, &wakes) && drops.count() == 1);
    });
}

/// Waits in two threads, one of which replaces the value: neither wake-up is lost.
#[test]
fn two_waits_are_both_woken() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let drops = Drops::default();
        let cell = loom::sync::Arc::new(RcuCell::new(drops.value(1)));
        let reader = {
            let cell = cell.clone();
            thread::spawn(move || assert!(matches!(cell.read().read(), 1 | 2)))
        };
        cell.replace(drops.value(2));
        let other = {
            let cell = cell.clone();
            thread::spawn(move || {
                let wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
                let is_ready = poll_unread(&mut cell.wait_unread(), &wakes);
                drop(cell);
                is_ready
            })
        };
        let wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
        let mut wait = cell.wait_unread();
        let is_ready = poll_unread(&mut wait, &wakes);
        other.join().unwrap();
        reader.join().unwrap();
        assert_eq!(
            wakes.0.load(Relaxed),
            usize::from(!is_ready),
            "another wait's drop takes no waker of ours"
        );
        assert!(poll_unread(&mut wait, &wakes));
    });
}

#[test]
fn exactly_one_of_three_releases_is_last() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let (arena, drops, first, handle) = one();
        let others: Vec<_> = (0..2)
            .map(|_| {
                let strong = first.clone();
                thread::spawn(move || strong.release())
            })
            .collect();
        let mut lasts = usize::from(first.release() == Release::Last);
        for other in others {
            lasts += usize::from(other.join().unwrap() == Release::Last);
        }
        assert_eq!(lasts, 1);
        assert_eq!(arena.acquire(handle).err(), Some(Stale::Dying));
        assert_eq!(arena.reap_all(), 1);
        assert_eq!(drops.count(), 1);
    });
}

/// A watch dropped while its object dies: another watch of the object is still woken.
#[test]
fn a_dropped_watch_removes_no_other() {
    loom::model(|| {
        let (arena, _drops, strong, handle) = one();
        let wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
        let mut kept = arena.watch(handle);
        let is_ready = poll(&mut kept, &wakes);
        let mut dropped = arena.watch(handle);
        let other_wakes = StdArc::new(Count(StdAtomicUsize::new(0)));
        poll(&mut dropped, &other_wakes);
        let other = thread::spawn(move || drop(dropped));
        drop(strong);
        other.join().unwrap();
        assert_eq!(arena.reap_all(), 1);
        assert!(kept.has_fired() && !is_ready);
        assert_eq!(wakes.0.load(Relaxed), 1, "woken exactly once");
    });
}
