//! Behaviour of the arena for one caller at a time, case by case. Sequences are in `properties.rs`,
//! threads in `threads.rs`.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in helpers too")]

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bds_refcount::{
    Arena, ArenaConfig, ArenaStats, Full, Handle, Holder, Kind, Release, Stale, Strong,
};

const NODE: Kind = Kind::new(1);
const EDGE: Kind = Kind::new(2);

fn tiny<T>(generation_bits: u32, index_bits: u32) -> Arena<T> {
    Arena::with_config(ArenaConfig { generation_bits, index_bits, ..ArenaConfig::new(NODE) })
}

fn adds_up(stats: ArenaStats) {
    let ArenaStats { capacity, live, dead, free, retired } = stats;
    assert_eq!(live + dead + free + retired, capacity, "{stats:?}");
}

/// A value that counts its drops.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn stale_says_what_is_wrong_with_a_handle() {
    let arena: Arena<u32> = tiny(1, 1); // each slot serves one object
    let other: Arena<u32> = Arena::new(NODE);
    let edges: Arena<u32> = Arena::new(EDGE);
    let foreign = other.insert(1).unwrap();
    let edge = edges.insert(2).unwrap();

    let check = |handle: Handle<u32>, stale: Stale| {
        assert_eq!(arena.acquire(handle).err(), Some(stale), "{handle:?}");
        assert_eq!(arena.check(handle).err(), Some(stale), "{handle:?}");
        assert_eq!(arena.count(handle), 0);
        assert!(arena.holders(handle).is_empty());
        assert!(arena.watch(handle).has_fired());
    };
    check(Handle::NULL, Stale::Null);
    check(foreign.handle(), Stale::WrongArena);
    check(edge.handle(), Stale::WrongKind);

    let node = arena.insert(3).unwrap();
    let handle = node.handle();
    let bits = handle.to_u64();
    check(Handle::from_u64(bits + 1), Stale::NeverIssued); // the other slot
    check(Handle::from_u64(bits + 2), Stale::NeverIssued); // beyond the last slot
    check(Handle::from_u64(bits + (1 << 24)), Stale::NeverIssued); // a later generation
    check(Handle::from_u64(bits - (1 << 24)), Stale::NeverIssued); // generation 0
    assert_eq!(arena.check(handle), Ok(()));
    assert_eq!(node.release(), Release::Last);
    check(handle, Stale::Dying);
    let (reaped, dead) = arena.reap_one().unwrap();
    assert_eq!((reaped, *dead), (handle, 3));
    check(handle, Stale::Dying);
    drop(dead);
    check(handle, Stale::Retired);

    let roomy: Arena<u32> = tiny(24, 0);
    let first = roomy.insert(1).unwrap();
    let handle = first.handle();
    drop(first);
    roomy.reap_all();
    assert_eq!(roomy.acquire(handle).err(), Some(Stale::Released), "free");
    let second = roomy.insert(2).unwrap();
    assert_eq!(roomy.acquire(handle).err(), Some(Stale::Released), "reused");
    assert_ne!(second.handle(), handle);
}

#[test]
fn release_is_last_only_for_the_last() {
    let arena = Arena::new(NODE);
    let a = arena.insert("x").unwrap();
    let b = a.clone();
    let c = arena.acquire(a.handle()).unwrap();
    assert!(a.ptr_eq(&c));
    assert_eq!((a.count(), *c), (3, "x"));
    assert_eq!(b.release(), Release::NotLast);
    drop(a);
    assert_eq!(c.release(), Release::Last);
    assert_eq!(arena.graveyard_len(), 1);
}

#[test]
fn release_drops_nothing_and_reap_drops_once() {
    let drops = Arc::new(AtomicUsize::new(0));
    let arena = Arena::new(NODE);
    let node = arena.insert(Counted(Arc::clone(&drops))).unwrap();
    assert!(!arena.has_dead());
    drop(node);
    assert!(arena.has_dead());
    assert_eq!(drops.load(Ordering::Relaxed), 0);
    let (_, dead) = arena.reap_one().unwrap();
    assert!(!arena.has_dead());
    assert_eq!((arena.dead(), drops.load(Ordering::Relaxed)), (1, 0));
    adds_up(arena.stats());
    drop(dead);
    assert_eq!((arena.dead(), drops.load(Ordering::Relaxed)), (0, 1));
    assert!(arena.reap_one().is_none());
}

#[test]
fn a_dead_value_can_be_changed_and_taken() {
    let arena = Arena::new(NODE);
    drop(arena.insert(vec![1]).unwrap());
    let (handle, mut dead) = arena.reap_one().unwrap();
    dead.push(2);
    assert_eq!(dead.handle(), handle);
    assert_eq!(dead.into_inner(), [1, 2]);
    assert_eq!(arena.check(handle), Err(Stale::Released));
    adds_up(arena.stats());
}

#[test]
fn dead_objects_are_reaped_in_the_order_of_their_last_releases() {
    let arena = Arena::new(NODE);
    let nodes: Vec<_> = (0..5).map(|n| arena.insert(n).unwrap()).collect();
    let mut nodes = nodes.into_iter();
    nodes.by_ref().take(2).for_each(drop);
    let (_, first) = arena.reap_one().unwrap();
    nodes.for_each(drop);
    let rest: Vec<i32> = arena.reap().map(|(_, dead)| *dead).collect();
    assert_eq!((*first, rest), (0, vec![1, 2, 3, 4]));
}

#[test]
fn into_dead_needs_the_only_reference() {
    let arena = Arena::new(NODE);
    let node = arena.insert(5).unwrap();
    let other = node.clone();
    let node = node.into_dead().unwrap_err();
    assert_eq!(node.count(), 2);
    drop(other);
    let handle = node.handle();
    let mut watch = arena.watch(handle);
    let wakes = Wakes::default();
    assert!(!wakes.poll(&mut watch));
    let dead = node.into_dead().unwrap();
    assert_eq!(wakes.count(), 1);
    assert_eq!(arena.check(handle), Err(Stale::Dying));
    assert!(!arena.has_dead(), "it bypassed the graveyard");
    assert_eq!(arena.dead(), 1);
    assert_eq!(dead.into_inner(), 5);
    assert_eq!(arena.stats().free, arena.capacity());
}

#[test]
fn exhausted_generations_retire_slots_until_the_arena_is_full() {
    let arena = tiny(2, 1); // 2 slots, 3 generations each
    let mut issued = Vec::new();
    for n in 0..6 {
        let node = arena.insert(n).unwrap();
        issued.push(node.handle());
        drop(node);
        assert_eq!(arena.reap_all(), 1);
        adds_up(arena.stats());
    }
    assert_eq!(arena.retired(), 2);
    assert_eq!(arena.insert(6).err(), Some(Full { capacity: 2, retired: 2 }));
    issued.sort();
    issued.dedup();
    assert_eq!(issued.len(), 6);
    assert!(issued.iter().all(|&handle| arena.check(handle) == Err(Stale::Retired)));
}

#[test]
fn a_full_arena_has_a_free_slot_after_reap_not_after_release() {
    let arena = tiny(24, 1);
    let a = arena.insert(1).unwrap();
    let _b = arena.insert(2).unwrap();
    assert_eq!(arena.insert(3).err(), Some(Full { capacity: 2, retired: 0 }));
    drop(a);
    assert!(arena.insert(3).is_err());
    arena.reap_all();
    assert!(arena.insert(3).is_ok());
}

#[test]
fn insert_with_gives_the_value_its_handle() {
    let arena: Arena<u64> = Arena::new(NODE);
    let node = arena
        .insert_with(|handle| {
            assert_eq!(arena.acquire(handle).err(), Some(Stale::NeverIssued), "not yet");
            handle.to_u64()
        })
        .unwrap();
    assert_eq!(*node, node.handle().to_u64());
}

#[test]
fn insert_with_that_panics_frees_the_slot_and_its_handle_stays_stale() {
    let arena: Arena<u32> = tiny(24, 0);
    let leaked = Cell::new(Handle::NULL);
    let made = catch_unwind(AssertUnwindSafe(|| {
        arena.insert_with(|handle| {
            leaked.set(handle);
            panic!("no value")
        })
    }));
    assert!(made.is_err());
    let node = arena.insert(1).unwrap();
    assert_ne!(node.handle(), leaked.get());
    assert_eq!(arena.acquire(leaked.get()).err(), Some(Stale::Released));
}

#[test]
fn a_value_whose_drop_panics_still_frees_its_slot() {
    struct Bomb(bool);
    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(!self.0, "in drop");
        }
    }
    let arena = tiny(24, 0);
    drop(arena.insert(Bomb(true)).unwrap());
    assert!(catch_unwind(AssertUnwindSafe(|| arena.reap_all())).is_err());
    adds_up(arena.stats());
    assert_eq!((arena.dead(), arena.live()), (0, 0));
    assert!(arena.insert(Bomb(false)).is_ok(), "the one slot is free");
}

#[test]
fn a_drop_that_panics_in_an_orphaned_arena_does_not_leak_the_rest() {
    struct Bomb(Option<Counted>);
    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(self.0.is_some(), "in drop");
        }
    }
    let drops = Arc::new(AtomicUsize::new(0));
    let arena = Arena::new(NODE);
    let bomb = arena.insert(Bomb(None)).unwrap();
    let other = arena.insert(Bomb(Some(Counted(Arc::clone(&drops))))).unwrap();
    drop((bomb, other));
    assert!(catch_unwind(AssertUnwindSafe(|| drop(arena))).is_err());
    assert_eq!(drops.load(Ordering::Relaxed), 1);
    assert_eq!(Arc::strong_count(&drops), 1);
}

// ---- holders

#[test]
fn holders_are_listed_while_they_hold() {
    let arena = Arena::new(NODE);
    let node = arena.insert(()).unwrap();
    let handle = node.handle();
    let line = line!() + 1;
    let edge = node.clone().held_by(Holder::new("edge", "top"));
    let job = arena.acquire_held(handle, Holder::new("job", 7)).unwrap();
    let copy = job.clone();
    assert_eq!((copy.count(), copy.anonymous()), (4, 1));
    let texts = |arena: &Arena<()>| -> Vec<String> {
        let holders = arena.holders(handle);
        holders.iter().map(|h| format!("{} {}", h.kind, h.name)).collect()
    };
    assert_eq!(texts(&arena), ["edge top", "job #7", "job #7"]);
    assert_eq!(arena.holders(handle)[0].since.line(), line);
    assert!(arena.holders(handle)[0].to_string().starts_with("edge 'top' (since "));
    let job = job.pass_to(Holder::new("test", "x".to_string()));
    drop(copy);
    assert_eq!(texts(&arena), ["edge top", "test x"]);
    let strong: Strong<()> = job.into_strong();
    assert_eq!(texts(&arena), ["edge top"]);
    drop((strong, node));
    assert_eq!(edge.release(), Release::Last);
    assert!(arena.holders(handle).is_empty());
}

#[test]
fn holders_are_not_listed_for_the_next_object_in_the_slot() {
    let arena = tiny(24, 0);
    let first = arena.insert(1).unwrap().held_by(Holder::new("owner", "first"));
    let old = first.handle();
    drop(first);
    arena.reap_all();
    let second = arena.insert(2).unwrap().held_by(Holder::new("owner", "second"));
    assert!(arena.holders(old).is_empty());
    assert_eq!(second.holders().len(), 1);
    assert_eq!(second.anonymous(), 0);
}

// ---- watches

#[derive(Default)]
struct Wakes(Arc<WakeCount>);

#[derive(Default)]
struct WakeCount(AtomicUsize);

impl std::task::Wake for WakeCount {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Wakes {
    fn count(&self) -> usize {
        self.0.0.load(Ordering::Relaxed)
    }

    fn poll(&self, future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
        let waker = Arc::clone(&self.0).into();
        let mut context = std::task::Context::from_waker(&waker);
        std::pin::Pin::new(future).poll(&mut context).is_ready()
    }
}

#[test]
fn a_watch_fires_at_the_last_release_and_wakes_once_from_the_reap() {
    let arena = Arena::new(NODE);
    let node = arena.insert(1).unwrap();
    let wakes = Wakes::default();
    let mut watch = arena.watch(node.handle());
    assert!(!watch.has_fired());
    assert!(!wakes.poll(&mut watch));
    assert!(!wakes.poll(&mut watch), "registered once, however often polled");
    let again = node.clone();
    drop(node);
    assert_eq!(arena.deliver_watches(), 0);
    drop(again);
    assert!(watch.has_fired());
    assert_eq!(wakes.count(), 0, "never from inside a release");
    let (_, dead) = arena.reap_one().unwrap();
    assert_eq!(wakes.count(), 1);
    drop(dead);
    let next = arena.insert(2).unwrap();
    assert!(watch.has_fired(), "also when the slot is used again");
    assert!(wakes.poll(&mut watch));
    drop(next);
    arena.reap_all();
    assert_eq!(wakes.count(), 1);
    assert!(arena.watch(watch.handle()).has_fired(), "at once if already dead");
}

#[test]
fn watches_are_delivered_without_reaping_once() {
    let arena = Arena::new(NODE);
    let nodes: Vec<_> = (0..3).map(|n| arena.insert(n).unwrap()).collect();
    let wakes = Wakes::default();
    let mut watches: Vec<_> = nodes.iter().map(|node| arena.watch(node.handle())).collect();
    for watch in &mut watches {
        assert!(!wakes.poll(&mut watch.fired_pinned()));
    }
    drop(nodes);
    watches.pop(); // dropping cancels
    assert_eq!(arena.deliver_watches(), 2);
    assert_eq!(arena.deliver_watches(), 0);
    assert_eq!(arena.graveyard_len(), 3);
    assert_eq!(arena.reap_all(), 3);
    assert_eq!(wakes.count(), 2);
}

/// `fired()` returns an opaque future; box it to poll it by hand.
trait FiredPinned {
    fn fired_pinned(&mut self) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>>;
}

impl<T> FiredPinned for bds_refcount::Watch<T> {
    fn fired_pinned(&mut self) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(self.fired())
    }
}

// ---- the arena is dropped

#[test]
fn values_outlive_the_arena_handle_and_are_dropped_by_their_last_release() {
    let drops = Arc::new(AtomicUsize::new(0));
    let arena = Arena::new(NODE);
    let dead = arena.insert(Counted(Arc::clone(&drops))).unwrap();
    let live = arena.insert(Counted(Arc::clone(&drops))).unwrap();
    let second = live.clone();
    let kept = arena.insert(Counted(Arc::clone(&drops))).unwrap();
    drop(kept);
    let (_, kept) = arena.reap_one().unwrap();
    drop(dead);
    assert_eq!(drops.load(Ordering::Relaxed), 0);
    drop(arena);
    assert_eq!(drops.load(Ordering::Relaxed), 1, "the graveyard was emptied with the arena");
    assert_eq!(live.release(), Release::NotLast);
    assert_eq!(second.release(), Release::Last);
    assert_eq!(drops.load(Ordering::Relaxed), 2);
    drop(kept);
    assert_eq!(drops.load(Ordering::Relaxed), 3);
}

#[test]
fn the_last_release_of_an_orphaned_arena_frees_it() {
    // For AddressSanitizer: the release still drains when the arena's memory loses its last slot.
    let drops = Arc::new(AtomicUsize::new(0));
    let arena = Arena::new(NODE);
    let only = arena.insert(Counted(Arc::clone(&drops))).unwrap();
    drop(arena);
    assert_eq!(only.release(), Release::Last);
    assert_eq!(Arc::strong_count(&drops), 1);
}

/// A node that owns the next one.
struct Link(#[expect(dead_code, reason = "owned for its drop")] Option<Strong<Link>>);

fn chain(arena: &Arena<Link>, len: usize) -> Strong<Link> {
    let mut head = arena.insert(Link(None)).unwrap();
    for _ in 1..len {
        head = arena.insert(Link(Some(head))).unwrap();
    }
    head
}

fn on_a_small_stack(run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(64 * 1024).spawn(run).unwrap().join().unwrap();
}

#[test]
fn a_chain_of_100_000_is_reaped_without_recursion() {
    on_a_small_stack(|| {
        let arena = Arena::new(NODE);
        let head = chain(&arena, 100_000);
        assert_eq!(arena.live(), 100_000);
        assert_eq!(head.release(), Release::Last);
        assert_eq!(arena.graveyard_len(), 1);
        assert_eq!(arena.reap_all(), 100_000);
        let stats = arena.stats();
        assert_eq!((stats.live, stats.dead, stats.free), (0, 0, stats.capacity));
    });
}

#[test]
fn a_chain_of_100_000_in_an_orphaned_arena_is_dropped_without_recursion() {
    on_a_small_stack(|| {
        let arena = Arena::new(NODE);
        let head = chain(&arena, 100_000);
        let last = chain(&arena, 1);
        let watch = arena.watch(last.handle());
        drop(arena);
        assert_eq!(head.release(), Release::Last);
        assert_eq!(last.release(), Release::Last);
        assert!(watch.has_fired());
    });
}

#[test]
fn handles_of_another_arena_are_refused_also_after_its_drop() {
    let arena = Arena::new(NODE);
    let _node = arena.insert(1).unwrap();
    let gone = Arena::new(NODE);
    let handle = gone.insert(2).unwrap().handle();
    drop(gone);
    assert_eq!(arena.acquire(handle).err(), Some(Stale::WrongArena));
    let next = Arena::<i32>::new(NODE);
    assert_eq!(next.acquire(handle).err(), Some(Stale::WrongArena), "tags return late");
}
