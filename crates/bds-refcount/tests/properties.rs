//! Random sequences of operations against a plain model: properties 1 to 15 of the lifecycle
//! contract, as far as an arena without a graph has them. Each test and each check names the
//! property it stands for.
//!
//! Widths are tiny (1 to 3 bits of generation, 0 to 4 of index), so slots are used again, retired
//! and exhausted all the time.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in helpers too")]

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use bds_refcount::{
    Arena, ArenaConfig, ArenaStats, Dead, Handle, Held, Holder, HolderName, Kind, Release, Stale,
    Strong, Watch,
};
use proptest::{collection::vec, prelude::*};

const NODE: Kind = Kind::new(1);
const EDGE: Kind = Kind::new(2);

/// A command. Numbers choose among what there is, modulo how many there are.
#[derive(Clone, Debug)]
enum Command {
    Insert,
    /// An object that owns a reference on another one, like a parent its child.
    InsertParent(usize),
    InsertWith,
    InsertPanics,
    Acquire(usize),
    AcquireHeld(usize),
    Clone(usize),
    Name(usize),
    Unname(usize),
    Release(usize),
    Drop(usize),
    ReleaseHeld(usize),
    IntoDead(usize),
    ReapOne,
    Finish(usize),
    TakeValue(usize),
    ReapAll,
    Watch(usize),
    DropWatch(usize),
    Deliver,
    CloneAndRelease(usize),
    Foreign(usize),
}

fn command() -> impl Strategy<Value = Command> {
    use Command::*;
    let n = any::<usize>;
    prop_oneof![
        6 => Just(Insert),
        3 => n().prop_map(InsertParent),
        1 => Just(InsertWith),
        1 => Just(InsertPanics),
        5 => n().prop_map(Acquire),
        2 => n().prop_map(AcquireHeld),
        2 => n().prop_map(Clone),
        2 => n().prop_map(Name),
        1 => n().prop_map(Unname),
        5 => n().prop_map(Release),
        4 => n().prop_map(Drop),
        3 => n().prop_map(ReleaseHeld),
        2 => n().prop_map(IntoDead),
        4 => Just(ReapOne),
        4 => n().prop_map(Finish),
        2 => n().prop_map(TakeValue),
        1 => Just(ReapAll),
        3 => n().prop_map(Watch),
        1 => n().prop_map(DropWatch),
        1 => Just(Deliver),
        1 => n().prop_map(CloneAndRelease),
        1 => n().prop_map(Foreign),
    ]
}

// ---- the model

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Live,
    /// In the graveyard.
    Dying,
    /// Reaped, not dropped yet.
    Closing,
    Ended,
}

/// An object in the model: a number of references and a state. Named holders are counted apart.
struct Object {
    state: State,
    count: usize,
    names: Vec<u64>,
    child: Option<u64>,
    /// Watches with a registered waker that was not woken.
    waiting: usize,
}

#[derive(Default)]
struct Model {
    objects: HashMap<u64, Object>,
    graveyard: VecDeque<u64>,
    drops: usize,
    wakes: usize,
}

impl Model {
    fn inserted(&mut self, handle: u64, child: Option<u64>) {
        let new = Object { state: State::Live, count: 1, names: Vec::new(), child, waiting: 0 };
        assert!(self.objects.insert(handle, new).is_none(), "property 1: a handle is issued once");
    }

    fn at(&mut self, handle: u64) -> &mut Object {
        self.objects.get_mut(&handle).unwrap()
    }

    fn release(&mut self, handle: u64) -> Release {
        let object = self.at(handle);
        object.count -= 1;
        if object.count > 0 {
            return Release::NotLast;
        }
        object.state = State::Dying;
        self.graveyard.push_back(handle);
        Release::Last
    }

    fn close(&mut self, handle: u64) {
        let object = self.at(handle);
        object.state = State::Closing;
        self.wakes += std::mem::take(&mut self.at(handle).waiting);
    }

    fn end(&mut self, handle: u64) {
        let object = self.at(handle);
        assert_eq!(object.state, State::Closing, "property 11: once each");
        object.state = State::Ended;
        let child = object.child.take();
        self.drops += 1;
        if let Some(child) = child {
            self.release(child);
        }
    }
}

// ---- the arena under test

struct Value {
    handle: u64,
    #[expect(dead_code, reason = "owned for its drop")]
    child: Option<Strong<Value>>,
    drops: Arc<AtomicUsize>,
}

impl Drop for Value {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct World {
    config: ArenaConfig,
    arena: Arena<Value>,
    foreign: Arena<Value>,
    edges: Arena<Value>,
    strongs: Vec<Strong<Value>>,
    held: Vec<(u64, Held<Value>)>,
    dead: Vec<Dead<Value>>,
    /// With whether it had to wait when it was made.
    watches: Vec<(Watch<Value>, bool)>,
    drops: Arc<AtomicUsize>,
    wakes: Arc<Wakes>,
    next_name: u64,
    /// Every handle that was ever given out, also by inserts that failed later.
    issued: Vec<Handle<Value>>,
    model: Model,
}

impl World {
    fn new(generation_bits: u32, index_bits: u32) -> Self {
        let config = ArenaConfig { kind: NODE, generation_bits, index_bits };
        Self {
            config,
            arena: Arena::with_config(config),
            foreign: Arena::with_config(config),
            edges: Arena::with_config(ArenaConfig { kind: EDGE, ..config }),
            strongs: Vec::new(),
            held: Vec::new(),
            dead: Vec::new(),
            watches: Vec::new(),
            drops: Arc::default(),
            wakes: Arc::default(),
            next_name: 0,
            issued: Vec::new(),
            model: Model::default(),
        }
    }

    fn value(&self, handle: u64, child: Option<Strong<Value>>) -> Value {
        Value { handle, child, drops: Arc::clone(&self.drops) }
    }

    fn insert(&mut self, child: Option<Strong<Value>>) {
        let child_handle = child.as_ref().map(|child| child.handle().to_u64());
        let free = self.arena.stats().free;
        let drops = Arc::clone(&self.drops);
        let made = self.arena.insert_with(|handle| Value { handle: handle.to_u64(), child, drops });
        match made {
            Ok(strong) => {
                assert!(free > 0);
                self.issued.push(strong.handle());
                self.model.inserted(strong.handle().to_u64(), child_handle);
                self.strongs.push(strong);
            }
            Err(full) => {
                assert_eq!(free, 0, "full only when nothing is free");
                assert_eq!(full.retired, self.arena.retired());
                if let Some(child) = child_handle {
                    self.model.release(child); // dropped with the maker
                }
            }
        }
    }

    fn insert_panics(&mut self) {
        let issued = &mut self.issued;
        let arena = &self.arena;
        let quiet = std::panic::AssertUnwindSafe(|| {
            let _ = arena.insert_with(|handle| {
                issued.push(handle);
                std::panic::resume_unwind(Box::new("no value"))
            });
        });
        let before = self.arena.stats().free;
        let made = std::panic::catch_unwind(quiet);
        assert_eq!(made.is_err(), before > 0);
        if made.is_err() {
            // Property 13, failed creation: one generation is used up, nothing else is left.
            let handle = self.issued.last().unwrap().to_u64();
            let gone = Object {
                state: State::Ended,
                count: 0,
                names: Vec::new(),
                child: None,
                waiting: 0,
            };
            assert!(self.model.objects.insert(handle, gone).is_none());
        }
    }

    fn run(&mut self, command: Command) {
        use Command::*;
        match command {
            Insert => {
                // `insert` while a slot is free; `insert_with` meets the full arena.
                if self.arena.stats().free == 0 {
                    return self.insert(None);
                }
                let strong = self.arena.insert(self.value(0, None)).unwrap();
                let handle = strong.handle().to_u64();
                self.issued.push(strong.handle());
                self.model.inserted(handle, None);
                self.strongs.push(strong);
            }
            InsertParent(n) => {
                let child = pick(&self.strongs, n).map(|n| self.strongs.swap_remove(n));
                self.insert(child);
            }
            InsertWith => self.insert(None),
            InsertPanics => self.insert_panics(),
            Acquire(n) => {
                let Some(n) = pick(&self.issued, n) else { return };
                let handle = self.issued[n];
                if let Ok(strong) = self.arena.acquire(handle) {
                    assert_eq!(strong.handle(), handle, "property 3: never another object");
                    assert!(strong.handle == 0 || strong.handle == handle.to_u64());
                    self.strongs.push(strong);
                    self.model.at(handle.to_u64()).count += 1;
                } else {
                    // `check_all` proves that the model refuses it too.
                    assert_ne!(self.model.at(handle.to_u64()).state, State::Live, "property 4");
                }
            }
            AcquireHeld(n) => {
                let Some(n) = pick(&self.issued, n) else { return };
                let handle = self.issued[n];
                let name = self.new_name();
                let holder = Holder::new("job", name);
                if let Ok(held) = self.arena.acquire_held(handle, holder) {
                    self.held.push((name, held));
                    let object = self.model.at(handle.to_u64());
                    object.count += 1;
                    object.names.push(name);
                }
            }
            Clone(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let strong = self.strongs[n].clone();
                self.model.at(strong.handle().to_u64()).count += 1;
                self.strongs.push(strong);
            }
            Name(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let strong = self.strongs.swap_remove(n);
                let name = self.new_name();
                self.model.at(strong.handle().to_u64()).names.push(name);
                self.held.push((name, strong.held_by(Holder::new("edge", name))));
            }
            Unname(n) => {
                let Some(n) = pick(&self.held, n) else { return };
                let (name, held) = self.held.swap_remove(n);
                self.model.at(held.handle().to_u64()).names.retain(|other| *other != name);
                self.strongs.push(held.into_strong());
            }
            Release(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let strong = self.strongs.swap_remove(n);
                let expected = self.model.release(strong.handle().to_u64());
                assert_eq!(strong.release(), expected, "property 9");
            }
            Drop(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let strong = self.strongs.swap_remove(n);
                self.model.release(strong.handle().to_u64());
            }
            ReleaseHeld(n) => {
                let Some(n) = pick(&self.held, n) else { return };
                let (name, held) = self.held.swap_remove(n);
                let handle = held.handle().to_u64();
                self.model.at(handle).names.retain(|other| *other != name);
                let expected = self.model.release(handle);
                assert_eq!(held.release(), expected, "property 9");
            }
            IntoDead(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let strong = self.strongs.swap_remove(n);
                let handle = strong.handle().to_u64();
                match strong.into_dead() {
                    Ok(dead) => {
                        let object = self.model.at(handle);
                        assert_eq!(object.count, 1, "property 14");
                        object.count = 0;
                        self.model.close(handle);
                        self.dead.push(dead);
                    }
                    Err(strong) => {
                        assert!(self.model.at(handle).count > 1, "property 14");
                        self.strongs.push(strong);
                    }
                }
            }
            ReapOne => match (self.arena.reap_one(), self.model.graveyard.pop_front()) {
                (None, None) => {}
                (Some((handle, dead)), Some(expected)) => {
                    assert_eq!(handle.to_u64(), expected, "property 11: in the order of death");
                    assert_eq!(dead.handle(), handle);
                    self.model.close(expected);
                    self.dead.push(dead);
                }
                (reaped, expected) => panic!("property 7: {:?} {expected:?}", reaped.map(|r| r.0)),
            },
            Finish(n) => {
                let Some(n) = pick(&self.dead, n) else { return };
                let dead = self.dead.swap_remove(n);
                self.model.end(dead.handle().to_u64());
            }
            TakeValue(n) => {
                let Some(n) = pick(&self.dead, n) else { return };
                let dead = self.dead.swap_remove(n);
                let handle = dead.handle().to_u64();
                let value = dead.into_inner();
                assert!(value.handle == 0 || value.handle == handle);
                assert_ne!(self.arena.check(Handle::from_u64(handle)), Err(Stale::Dying));
                drop(value);
                self.model.end(handle);
            }
            ReapAll => {
                let mut expected = 0;
                while let Some(handle) = self.model.graveyard.pop_front() {
                    self.model.close(handle);
                    self.model.end(handle);
                    expected += 1;
                }
                assert_eq!(self.arena.reap_all(), expected);
            }
            Watch(n) => {
                let Some(n) = pick(&self.issued, n) else { return };
                let mut watch = self.arena.watch(self.issued[n]);
                let waker = Waker::from(Arc::clone(&self.wakes));
                let ready = std::pin::Pin::new(&mut watch).poll(&mut Context::from_waker(&waker));
                let object = self.model.at(self.issued[n].to_u64());
                let live = object.state == State::Live;
                assert_eq!(ready == Poll::Pending, live, "property 49: at once if dead");
                object.waiting += usize::from(live);
                self.watches.push((watch, live));
            }
            DropWatch(n) => {
                let Some(n) = pick(&self.watches, n) else { return };
                let (watch, waited) = self.watches.swap_remove(n);
                // Cancels the wake-up unless it was delivered; all of an object are delivered
                // together.
                let object = self.model.at(watch.handle().to_u64());
                if waited && object.waiting > 0 {
                    object.waiting -= 1;
                }
            }
            Deliver => {
                let mut expected = 0;
                let dying: Vec<u64> = self.model.graveyard.iter().copied().collect();
                for handle in dying {
                    expected += std::mem::take(&mut self.model.at(handle).waiting);
                }
                self.model.wakes += expected;
                assert_eq!(self.arena.deliver_watches(), expected);
            }
            CloneAndRelease(n) => {
                let Some(n) = pick(&self.strongs, n) else { return };
                let before = self.strongs[n].count();
                let clone = self.strongs[n].clone();
                assert_eq!(clone.release(), bds_refcount::Release::NotLast, "property 15");
                assert_eq!(self.strongs[n].count(), before, "property 15");
            }
            Foreign(n) => {
                for (arena, stale) in
                    [(&self.foreign, Stale::WrongArena), (&self.edges, Stale::WrongKind)]
                {
                    if let Ok(strong) = arena.insert(self.value(0, None)) {
                        let handle = strong.handle();
                        assert_eq!(self.arena.acquire(handle).err(), Some(stale), "property 3");
                        assert_eq!(self.arena.check(handle), Err(stale), "property 3");
                        drop(strong);
                        arena.reap_all();
                    }
                    self.model.drops += 1; // reaped, or refused by a full arena
                    if let Some(n) = pick(&self.issued, n) {
                        assert!(arena.acquire(self.issued[n]).is_err(), "property 3");
                    }
                }
            }
        }
    }

    fn new_name(&mut self) -> u64 {
        self.next_name += 1;
        self.next_name
    }

    /// The "always" group: everything observable agrees with the model.
    fn check_all(&mut self) {
        let last_generation = (1_u64 << self.config.generation_bits) - 1;
        for &handle in &self.issued {
            let object = &self.model.objects[&handle.to_u64()];
            let generation = handle.to_u64() >> 24 & 0x00FF_FFFF;
            let checked = self.arena.check(handle);
            match object.state {
                State::Live => {
                    assert!(object.count >= 1, "property 7");
                    assert_eq!(checked, Ok(()), "property 4");
                }
                State::Dying | State::Closing => {
                    assert_eq!(object.count, 0, "property 7");
                    assert_eq!(checked, Err(Stale::Dying), "property 4");
                }
                State::Ended => {
                    assert!(
                        matches!(checked, Err(Stale::Released | Stale::Retired)),
                        "property 1: stale for ever, {checked:?}"
                    );
                    if generation == last_generation {
                        assert_eq!(checked, Err(Stale::Retired), "property 2");
                    }
                }
            }
            assert_eq!(self.arena.count(handle), object.count, "property 6");
            let mut names: Vec<u64> = self
                .arena
                .holders(handle)
                .into_iter()
                .map(|holder| match holder.name {
                    HolderName::Id(id) => id,
                    HolderName::Text(text) => panic!("{text}"),
                })
                .collect();
            let mut expected = object.names.clone();
            names.sort_unstable();
            expected.sort_unstable();
            assert_eq!(names, expected, "property 6: by name");
        }
        for strong in &self.strongs {
            let object = &self.model.objects[&strong.handle().to_u64()];
            assert_eq!(strong.anonymous(), object.count - object.names.len());
        }
        for (watch, _) in &self.watches {
            let live = self.model.objects[&watch.handle().to_u64()].state == State::Live;
            assert_eq!(watch.has_fired(), !live, "property 49");
        }
        self.check_counts();
    }

    fn check_counts(&self) {
        let mut states = BTreeMap::new();
        for object in self.model.objects.values() {
            *states.entry(object.state as u8).or_insert(0) += 1;
        }
        let of = |state: State| states.get(&(state as u8)).copied().unwrap_or(0);
        let ArenaStats { capacity, live, dead, free, retired } = self.arena.stats();
        assert_eq!(live + dead + free + retired, capacity, "property 2");
        assert_eq!(capacity, 1 << self.config.index_bits);
        assert_eq!(live, of(State::Live));
        assert_eq!(dead, of(State::Dying) + of(State::Closing));
        assert_eq!(self.arena.graveyard_len(), of(State::Dying), "property 7");
        assert_eq!(self.arena.has_dead(), of(State::Dying) > 0);
        let last_generation = (1_u64 << self.config.generation_bits) - 1;
        let exhausted = |(handle, object): &(&u64, &Object)| {
            object.state == State::Ended && **handle >> 24 & 0x00FF_FFFF == last_generation
        };
        assert_eq!(retired, self.model.objects.iter().filter(exhausted).count(), "property 2");
        let mut snapshot: Vec<u64> =
            self.arena.snapshot().into_iter().map(Handle::to_u64).collect();
        snapshot.sort_unstable();
        let mut expected: Vec<u64> = self
            .model
            .objects
            .iter()
            .filter(|(_, object)| object.state == State::Live)
            .map(|(handle, _)| *handle)
            .collect();
        expected.sort_unstable();
        assert_eq!(snapshot, expected);
        assert_eq!(self.drops.load(Ordering::Relaxed), self.model.drops, "property 11");
        assert_eq!(self.wakes.0.load(Ordering::Relaxed), self.model.wakes, "property 49");
    }

    /// Property 13: when all references are released and all objects reaped, nothing is left.
    fn finish(mut self) {
        self.strongs.clear();
        self.held.clear();
        self.dead.clear();
        self.arena.reap_all();
        let stats = self.arena.stats();
        assert_eq!((stats.live, stats.dead), (0, 0), "property 13");
        assert_eq!(stats.free + stats.retired, stats.capacity, "property 13");
        for &handle in &self.issued {
            assert!(self.arena.acquire(handle).is_err(), "property 1");
        }
        self.watches.clear();
        drop(self.arena);
        // Each value holds an Arc on `drops`; all are gone with the values.
        assert_eq!(Arc::strong_count(&self.drops), 1, "property 13");
    }
}

fn pick<X>(from: &[X], n: usize) -> Option<usize> {
    if from.is_empty() { None } else { Some(n % from.len()) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_agrees_with_the_model(
        generation_bits in 1_u32..=3,
        index_bits in 0_u32..=4,
        commands in vec(command(), 1..150),
    ) {
        let mut world = World::new(generation_bits, index_bits);
        for command in commands {
            world.run(command);
            world.check_all();
        }
        world.finish();
    }

    /// Property 3: random numbers never resolve and never panic, near valid handles or far from
    /// them.
    #[test]
    fn random_numbers_are_never_handles(far in any::<u64>(), flips in 1_u64..=u64::MAX) {
        let arena = Arena::with_config(ArenaConfig {
            generation_bits: 3,
            index_bits: 4,
            kind: NODE,
        });
        let strongs: Vec<Strong<u64>> =
            (0..5).map(|_| arena.insert_with(Handle::to_u64).unwrap()).collect();
        let near = strongs[2].handle().to_u64() ^ flips;
        for number in [far, near, far & 0xFF, strongs[2].handle().to_u64() ^ (flips & 0x0F00_000F)] {
            let handle = Handle::from_u64(number);
            prop_assert_eq!(handle.to_u64(), number);
            let ours = strongs.iter().any(|strong| strong.handle() == handle);
            prop_assert_eq!(arena.check(handle).is_ok(), ours);
            prop_assert_eq!(arena.acquire(handle).is_ok(), ours);
            prop_assert_eq!(arena.count(handle) > 0, ours);
            prop_assert_eq!(arena.watch(handle).has_fired(), !ours);
            let _ = format!("{handle} {handle:?}");
            if let Ok(strong) = arena.acquire(handle) {
                prop_assert_eq!(*strong, number, "never another object's data");
            }
        }
    }
}

/// Property 1, driven past exhaustion: every handle of every slot, each once, all stale at the end.
#[test]
fn an_arena_driven_to_exhaustion_issues_every_handle_once() {
    for (generation_bits, index_bits) in [(1, 0), (2, 2), (3, 1), (3, 4)] {
        let arena = Arena::with_config(ArenaConfig { kind: NODE, generation_bits, index_bits });
        let mut issued = Vec::new();
        while let Ok(strong) = arena.insert(()) {
            issued.push(strong.handle());
            drop(strong);
            arena.reap_all();
        }
        let objects = ((1 << generation_bits) - 1) << index_bits;
        assert_eq!(issued.len(), objects);
        issued.sort();
        issued.dedup();
        assert_eq!(issued.len(), objects);
        assert!(issued.iter().all(|&handle| arena.acquire(handle).is_err()));
        assert_eq!(arena.retired(), arena.capacity());
    }
}

/// Property 10: a release in a drop during unwinding is like any other.
#[test]
fn release_works_while_unwinding() {
    let arena = Arena::new(NODE);
    let strong = arena.insert(1).unwrap();
    let handle = strong.handle();
    let held = strong.clone().held_by(Holder::new("user", "test"));
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _owned = (strong, held);
        std::panic::resume_unwind(Box::new("unwinding"));
    }));
    assert!(unwound.is_err());
    assert_eq!(arena.check(handle), Err(Stale::Dying));
    assert_eq!(arena.reap_all(), 1);
}
