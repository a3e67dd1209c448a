//! Races of many threads, too large for loom. Nothing here depends on timing; a race that does not
//! happen just proves less.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in helpers too")]

use std::{
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use bds_refcount::{Arena, ArenaConfig, Handle, Holder, HolderKind, Kind, Release, Stale, Strong};

const NODE: Kind = Kind::new(1);
const THREADS: usize = 4;

/// Runs `work` on all threads, which start together.
fn together<R: Send>(work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let barrier = Barrier::new(THREADS);
    thread::scope(|scope| {
        let start = |n| {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                work(n)
            })
        };
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn of_n_concurrent_releases_exactly_one_is_last() {
    for _ in 0..500 {
        let arena = Arena::new(NODE);
        let strong = arena.insert(()).unwrap();
        let handle = strong.handle();
        let shares: Vec<_> = (0..THREADS).map(|_| Mutex::new(Some(strong.clone()))).collect();
        drop(strong);
        let releases = together(|n| {
            let release = shares[n].lock().unwrap().take().unwrap().release();
            if release == Release::Last {
                // Property 9: after the last release no acquire succeeds.
                assert_eq!(arena.acquire(handle).err(), Some(Stale::Dying));
            }
            release
        });
        assert_eq!(releases.iter().filter(|&&release| release == Release::Last).count(), 1);
        assert_eq!(arena.reap_all(), 1);
    }
}

#[test]
fn acquire_against_release_never_resurrects() {
    for _ in 0..500 {
        let arena = Arena::new(NODE);
        let strong = Mutex::new(Some(arena.insert(()).unwrap()));
        let handle = strong.lock().unwrap().as_ref().unwrap().handle();
        let lasts: usize = together(|n| {
            if n == 0 {
                let strong = strong.lock().unwrap().take().unwrap();
                return usize::from(strong.release() == Release::Last);
            }
            let mut lasts = 0;
            loop {
                match arena.acquire(handle) {
                    Ok(strong) => lasts += usize::from(strong.release() == Release::Last),
                    Err(stale) => {
                        assert_eq!(stale, Stale::Dying);
                        assert_eq!(arena.acquire(handle).err(), Some(Stale::Dying));
                        return lasts;
                    }
                }
            }
        })
        .into_iter()
        .sum();
        assert_eq!(lasts, 1);
        assert_eq!(arena.reap_all(), 1);
    }
}

/// A value that knows its handle.
struct Named(u64, Arc<AtomicUsize>);

impl Drop for Named {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_handle_resolves_to_its_own_object_or_an_error_while_slots_are_reused() {
    const ROUNDS: usize = 3_000;
    let arena: Arena<Named> = Arena::with_config(ArenaConfig {
        generation_bits: 12,
        index_bits: 3,
        ..ArenaConfig::new(NODE)
    });
    let drops = Arc::new(AtomicUsize::new(0));
    let seen: Mutex<Vec<Handle<Named>>> = Mutex::new(Vec::new());
    let made: usize = together(|n| {
        let mut made = 0;
        let mut own: Option<Strong<Named>> = None;
        for round in 0..ROUNDS {
            match (round + n) % 4 {
                0 => {
                    let drops = &drops;
                    let value = |handle: Handle<Named>| Named(handle.to_u64(), Arc::clone(drops));
                    if let Ok(strong) = arena.insert_with(value) {
                        made += 1;
                        seen.lock().unwrap().push(strong.handle());
                        own = Some(strong);
                    }
                }
                1 => {
                    let handle = {
                        let seen = seen.lock().unwrap();
                        seen.get(seen.len().wrapping_sub(1 + round % 9)).copied()
                    };
                    let Some(handle) = handle else { continue };
                    let holder = Holder::new("iterator", 1);
                    if let Ok(held) = arena.acquire_held(handle, holder) {
                        assert_eq!(held.0, handle.to_u64());
                        assert!(
                            arena
                                .holders(handle)
                                .iter()
                                .any(|h| h.kind == HolderKind::new("iterator"))
                        );
                        own = Some(held.into_strong());
                    }
                }
                2 => own = None,
                _ => {
                    if let Some((handle, dead)) = arena.reap_one() {
                        assert_eq!(dead.0, handle.to_u64());
                        assert_eq!(arena.check(handle), Err(Stale::Dying));
                    }
                }
            }
        }
        drop(own);
        made
    })
    .into_iter()
    .sum();
    arena.reap_all();
    assert_eq!(drops.load(Ordering::Relaxed), made);
    let stats = arena.stats();
    assert_eq!((stats.live, stats.dead), (0, 0));
    let mut handles = seen.into_inner().unwrap();
    handles.sort();
    handles.dedup();
    assert_eq!(handles.len(), made, "no handle was given out twice");
    assert!(handles.iter().all(|&handle| arena.check(handle).is_err()));
}

/// A node that owns the next one.
struct Link(
    #[expect(dead_code, reason = "owned for its drop")] Option<Strong<Link>>,
    Arc<AtomicUsize>,
);

impl Drop for Link {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn concurrent_releases_empty_an_orphaned_arena() {
    const CHAIN: usize = 200;
    for _ in 0..50 {
        let arena = Arena::new(NODE);
        let drops = Arc::new(AtomicUsize::new(0));
        let chains: Vec<_> = (0..THREADS)
            .map(|_| {
                let mut head = None;
                for _ in 0..CHAIN {
                    head = Some(arena.insert(Link(head, Arc::clone(&drops))).unwrap());
                }
                Mutex::new(head)
            })
            .collect();
        let arena = Mutex::new(Some(arena));
        together(|n| {
            if n == 1 {
                arena.lock().unwrap().take();
            }
            chains[n].lock().unwrap().take();
        });
        // The draining thread has returned, so all are dropped.
        assert_eq!(drops.load(Ordering::Relaxed), THREADS * CHAIN);
        assert_eq!(Arc::strong_count(&drops), 1);
    }
}

#[test]
fn watchers_on_many_threads_are_all_released() {
    for _ in 0..200 {
        let arena = Arena::new(NODE);
        let strong = Mutex::new(Some(arena.insert(()).unwrap()));
        let handle = strong.lock().unwrap().as_ref().unwrap().handle();
        together(|n| {
            if n == 0 {
                drop(strong.lock().unwrap().take());
                arena.reap_all();
            } else {
                block_on(arena.watch(handle));
                assert!(arena.acquire(handle).is_err());
            }
        });
    }
}

fn block_on(future: impl Future<Output = ()>) {
    struct Unpark(thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    while future.as_mut().poll(&mut context).is_pending() {
        thread::park();
    }
}
