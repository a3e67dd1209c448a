//! Random requests and verbs on two nodes against sets of granules.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use crate::driver::{Truncate, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::graph::{BitmapLease, BitmapOptions, Change, NodeRef};
use crate::options::Options;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, On, State, backend};
use crate::test_kit::{iov, run};

const LEN: u64 = 40_000;
const NAMES: [&str; 3] = ["a", "b", "c"];

/// A node and a bitmap of it, by number.
type Place = (usize, usize);

#[derive(Clone, Debug)]
enum Verb {
    Add(Place, u32, bool),
    Remove(Place),
    Clear(Place),
    Enable(Place),
    Disable(Place),
    Merge(Place, Vec<Place>),
    Split(Place),
    Abdicate(Place),
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        node: usize,
        at: u64,
        len: u64,
        fails: bool,
    },
    Compressed {
        node: usize,
        at: u64,
    },
    Zero {
        node: usize,
        at: u64,
        len: u64,
    },
    Discard {
        node: usize,
        at: u64,
        len: u64,
    },
    Truncate {
        node: usize,
        len: u64,
        fails: bool,
    },
    Lease(Place),
    Reclaim(Place),
    /// One verb alone.
    Verb(Verb),
    /// Several in one change.
    Change(Vec<Verb>),
}

fn verb() -> impl Strategy<Value = Verb> {
    let place = (0..2usize, 0..NAMES.len());
    prop_oneof![
        4 => (place.clone(), 9..14u32, any::<bool>()).prop_map(|(p, g, d)| Verb::Add(p, g, d)),
        1 => place.clone().prop_map(Verb::Remove),
        2 => place.clone().prop_map(Verb::Clear),
        2 => place.clone().prop_map(Verb::Enable),
        2 => place.clone().prop_map(Verb::Disable),
        3 => (place.clone(), prop::collection::vec(place.clone(), 0..3))
            .prop_map(|(to, from)| Verb::Merge(to, from)),
        3 => place.clone().prop_map(Verb::Split),
        2 => place.prop_map(Verb::Abdicate),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..2usize, 0..LEN, 0..6000u64);
    prop_oneof![
        4 => (range.clone(), any::<bool>())
            .prop_map(|((node, at, len), fails)| Step::Write { node, at, len, fails }),
        1 => (0..2usize, 0..LEN).prop_map(|(node, at)| Step::Compressed { node, at }),
        2 => range.clone().prop_map(|(node, at, len)| Step::Zero { node, at, len }),
        2 => range.prop_map(|(node, at, len)| Step::Discard { node, at, len }),
        1 => (0..2usize, 0..2 * LEN, any::<bool>())
            .prop_map(|(node, len, fails)| Step::Truncate { node, len, fails }),
        3 => (0..2usize, 0..NAMES.len()).prop_map(Step::Lease),
        1 => (0..2usize, 0..NAMES.len()).prop_map(Step::Reclaim),
        5 => verb().prop_map(Step::Verb),
        4 => prop::collection::vec(verb(), 1..5).prop_map(Step::Change),
    ]
}

type Granules = BTreeSet<u64>;

/// A bitmap as it should be.
#[derive(Clone, Debug)]
struct Model {
    granularity: u64,
    is_enabled: bool,
    dirty: Granules,
    /// `Some(None)`: leased; `Some(Some)`: split.
    lease: Option<Option<Granules>>,
}

impl Model {
    fn is_split(&self) -> bool {
        matches!(self.lease, Some(Some(_)))
    }

    fn record(&mut self, range: &Range<u64>) {
        if self.is_enabled && range.start < range.end {
            let granules = range.start / self.granularity..range.end.div_ceil(self.granularity);
            match &mut self.lease {
                Some(Some(successor)) => successor.extend(granules),
                _ => self.dirty.extend(granules),
            }
        }
    }

    fn areas(&self, dirty: &Granules, len: u64) -> Vec<Range<u64>> {
        let mut areas: Vec<Range<u64>> = Vec::new();
        for n in dirty {
            let area = n * self.granularity..((n + 1) * self.granularity).min(len);
            match areas.last_mut() {
                Some(last) if last.end == area.start => last.end = area.end,
                _ => areas.push(area),
            }
        }
        areas
    }
}

#[derive(Clone, Debug)]
struct Disk {
    len: u64,
    bitmaps: BTreeMap<&'static str, Model>,
}

impl Disk {
    fn record(&mut self, range: &Range<u64>) {
        let range = range.start..range.end.min(self.len);
        self.bitmaps.values_mut().for_each(|it| it.record(&range));
    }
}

/// Both nodes as they should be.
#[derive(Clone, Debug)]
struct World([Disk; 2]);

impl World {
    fn get(&mut self, (node, name): Place) -> Option<&mut Model> {
        self.0[node].bitmaps.get_mut(NAMES[name])
    }

    /// A bitmap that is there and not leased.
    fn free(&mut self, place: Place) -> Result<&mut Model, ErrorKind> {
        let model = self.get(place).ok_or(ErrorKind::NotFound)?;
        if model.lease.is_some() { Err(ErrorKind::InUse) } else { Ok(model) }
    }

    /// Makes the edit, unless it is refused.
    fn edit(&mut self, verb: &Verb) -> Result<(), ErrorKind> {
        match verb {
            Verb::Add(place, shift, is_disabled) => {
                let bitmaps = &mut self.0[place.0].bitmaps;
                if bitmaps.contains_key(NAMES[place.1]) {
                    return Err(ErrorKind::AlreadyExists);
                }
                let model = Model {
                    granularity: 1 << shift,
                    is_enabled: !is_disabled,
                    dirty: Granules::new(),
                    lease: None,
                };
                bitmaps.insert(NAMES[place.1], model);
            }
            Verb::Remove(place) => {
                self.free(*place)?;
                self.0[place.0].bitmaps.remove(NAMES[place.1]);
            }
            Verb::Clear(place) => self.free(*place)?.dirty.clear(),
            Verb::Enable(place) => self.free(*place)?.is_enabled = true,
            Verb::Disable(place) => self.free(*place)?.is_enabled = false,
            Verb::Merge(to, sources) => {
                self.free(*to)?;
                for from in sources {
                    let (target_len, len) = (self.0[to.0].len, self.0[from.0].len);
                    let source = self.free(*from)?.clone();
                    if target_len != len {
                        return Err(ErrorKind::InvalidInput);
                    }
                    let target = self.free(*to)?;
                    for area in source.areas(&source.dirty, len) {
                        let granularity = target.granularity;
                        target
                            .dirty
                            .extend(area.start / granularity..area.end.div_ceil(granularity));
                    }
                }
            }
            Verb::Split(place) => {
                let model = self.get(*place).filter(|model| model.lease == Some(None));
                model.ok_or(ErrorKind::InvalidInput)?.lease = Some(Some(Granules::new()));
            }
            Verb::Abdicate(place) => {
                let model = self.get(*place).filter(|model| model.is_split());
                let model = model.ok_or(ErrorKind::InvalidInput)?;
                model.dirty = model.lease.take().flatten().unwrap_or_default();
            }
        }
        Ok(())
    }
}

/// The real nodes beside their model.
struct Test {
    graph: DiskGraph,
    nodes: [NodeRef; 2],
    disks: [Backend; 2],
    states: [std::sync::Arc<State>; 2],
    leases: BTreeMap<Place, BitmapLease>,
    world: World,
}

impl Test {
    async fn new(inline: bool) -> Self {
        let graph = DiskGraph::new();
        let config = || Config {
            inline,
            zero_flags: Some(ZeroFlags::empty()),
            options: Options::new().with("discard", "unmap"),
            ..Config::default()
        };
        let bytes = || vec![1; usize::try_from(LEN).unwrap()];
        let (one, first) = graph.node("one", bytes(), config()).await;
        let (two, second) = graph.node("two", bytes(), config()).await;
        let disks = [backend(&one), backend(&two)];
        let disk = Disk { len: LEN, bitmaps: BTreeMap::new() };
        let world = World([disk.clone(), disk]);
        let leases = BTreeMap::new();
        Self { graph, nodes: [one, two], disks, states: [first, second], leases, world }
    }

    async fn step(&mut self, step: &Step) {
        match *step {
            Step::Write { node, at, len, fails } => {
                let (at, end) = self.clip(node, at, len);
                if fails {
                    self.states[node].fail_once(On::Write, None);
                }
                let data = iov(&vec![2; usize::try_from(end - at).unwrap()], 2);
                let written = self.disks[node].write(at, data, WriteFlags::empty()).await;
                assert_eq!(written.is_err(), fails && at < end);
                self.states[node].clear_faults();
                self.world.0[node].record(&(at..end));
            }
            Step::Compressed { node, at } => {
                let (at, end) = self.clip(node, at, 512);
                let data = iov(&vec![3; usize::try_from(end - at).unwrap()], 1);
                self.disks[node].write_compressed(at, data).await.unwrap();
                self.world.0[node].record(&(at..end));
            }
            Step::Zero { node, at, len } => {
                let (at, end) = self.clip(node, at, len);
                let zeroed = self.disks[node].write_zeroes(at, end - at, ZeroFlags::empty()).await;
                let _done = zeroed.unwrap();
                self.world.0[node].record(&(at..end));
            }
            Step::Discard { node, at, len } => {
                let (at, end) = self.clip(node, at, len);
                self.disks[node].discard(at, end - at).await.unwrap();
                self.world.0[node].record(&(at..end));
            }
            Step::Truncate { node, len, fails } => self.truncate(node, len, fails).await,
            Step::Lease(place) => {
                let lease = self.nodes[place.0].lease_bitmap(NAMES[place.1], "a test");
                let wanted = self.world.free(place).map(|model| model.lease = Some(None));
                assert_eq!(lease.as_ref().map(drop).map_err(|error| error.kind()), wanted);
                if let Ok(lease) = lease {
                    self.leases.insert(place, lease);
                }
            }
            Step::Reclaim(place) => {
                let Some(lease) = self.leases.remove(&place) else { return };
                lease.reclaim();
                let model = self.world.get(place).unwrap();
                model.dirty.extend(model.lease.take().flatten().unwrap_or_default());
            }
            Step::Verb(ref verb) => {
                let mut after = self.world.clone();
                let wanted = after.edit(verb);
                let done = self.alone(verb).await;
                assert_eq!(done.map_err(|error| error.kind()), wanted, "{verb:?}");
                if wanted.is_ok() {
                    self.world = after;
                }
            }
            Step::Change(ref verbs) => self.change(verbs).await,
        }
    }

    fn clip(&self, node: usize, at: u64, len: u64) -> (u64, u64) {
        let end = self.world.0[node].len;
        (at.min(end), (at + len).min(end))
    }

    async fn truncate(&mut self, node: usize, len: u64, fails: bool) {
        if fails {
            self.states[node].fail_once(On::Truncate, None);
        }
        let change = Truncate::to(len);
        let resized = self.disks[node].truncate(change).await.map_err(|error| error.kind());
        self.states[node].clear_faults();
        let disk = &mut self.world.0[node];
        if disk.bitmaps.values().any(|model| model.lease.is_some()) {
            return assert_eq!(resized, Err(ErrorKind::InUse));
        }
        assert_eq!(resized, if fails { Err(ErrorKind::Io) } else { Ok(()) });
        let before = disk.len;
        if !fails {
            disk.len = len;
            for model in disk.bitmaps.values_mut() {
                let granules = len.div_ceil(model.granularity);
                model.dirty.retain(|n| *n < granules);
            }
        }
        // What was grown, or what a resize that failed may have cut off.
        disk.record(&(before.min(len)..disk.len));
    }

    async fn alone(&mut self, verb: &Verb) -> crate::error::Result<()> {
        let node = |place: &Place| self.nodes[place.0].clone();
        match verb {
            Verb::Add(place, shift, disabled) => {
                node(place).add_bitmap(options(*place, *shift, *disabled)).await.map(drop)
            }
            Verb::Remove(place) => node(place).remove_bitmap(NAMES[place.1]).await,
            Verb::Clear(place) => node(place).clear_bitmap(NAMES[place.1]).await,
            Verb::Enable(place) => node(place).enable_bitmap(NAMES[place.1]).await,
            Verb::Disable(place) => node(place).disable_bitmap(NAMES[place.1]).await,
            Verb::Merge(to, from) => {
                let sources: Vec<_> =
                    from.iter().map(|it| (&self.nodes[it.0], NAMES[it.1])).collect();
                node(to).merge_bitmaps(NAMES[to.1], &sources).await
            }
            Verb::Split(place) => match self.leases.get(place) {
                Some(lease) => lease.split(),
                None => Err(no_lease()),
            },
            Verb::Abdicate(place) => match self.leases.get(place) {
                // The guard would be taken, and reclaimed if it was not split.
                Some(lease) if lease.successor().is_none() => Err(no_lease()),
                Some(_) => self.leases.remove(place).unwrap().abdicate(),
                None => Err(no_lease()),
            },
        }
    }

    /// Makes several edits in one change: all of them, or none.
    async fn change(&mut self, verbs: &[Verb]) {
        let mut after = self.world.clone();
        let mut change = self.graph.graph().change();
        let mut wanted = Ok(());
        let mut abdicated = Vec::new();
        for verb in verbs {
            if let Verb::Split(place) | Verb::Abdicate(place) = verb
                && !self.leases.contains_key(place)
            {
                continue;
            }
            wanted = wanted.and_then(|()| {
                let is_gone = |place: &Place| abdicated.contains(place);
                match verb {
                    Verb::Split(place) | Verb::Abdicate(place) if is_gone(place) => {
                        Err(ErrorKind::Stale)
                    }
                    verb => after.edit(verb),
                }
            });
            if let (Verb::Abdicate(place), Ok(())) = (verb, wanted) {
                abdicated.push(*place);
            }
            change = self.with(change, verb);
        }
        let done = change.commit().await;
        let kind = done.as_ref().map(drop).map_err(|error| error.kind());
        assert_eq!(kind, wanted, "{verbs:?}: {done:?}");
        if wanted.is_ok() {
            self.world = after;
            abdicated.iter().for_each(|place| drop(self.leases.remove(place)));
        }
    }

    fn with(&self, change: Change, verb: &Verb) -> Change {
        let node = |place: &Place| &self.nodes[place.0];
        match verb {
            Verb::Add(place, shift, disabled) => {
                change.add_bitmap(node(place), options(*place, *shift, *disabled))
            }
            Verb::Remove(place) => change.remove_bitmap(node(place), NAMES[place.1]),
            Verb::Clear(place) => change.clear_bitmap(node(place), NAMES[place.1]),
            Verb::Enable(place) => change.enable_bitmap(node(place), NAMES[place.1]),
            Verb::Disable(place) => change.disable_bitmap(node(place), NAMES[place.1]),
            Verb::Merge(to, from) => {
                let sources: Vec<_> =
                    from.iter().map(|it| (&self.nodes[it.0], NAMES[it.1])).collect();
                change.merge_bitmaps(node(to), NAMES[to.1], &sources)
            }
            Verb::Split(place) => change.split_bitmap(&self.leases[place]),
            Verb::Abdicate(place) => change.abdicate_bitmap(&self.leases[place], None),
        }
    }

    fn check(&self) {
        for (node, disk) in self.nodes.iter().zip(&self.world.0) {
            assert_eq!(node.len(), disk.len);
            assert_eq!(node.bitmaps().len(), disk.bitmaps.len());
            for (name, model) in &disk.bitmaps {
                let info = super::info(node, name);
                assert_eq!(super::dirty(node, name), model.areas(&model.dirty, disk.len), "{name}");
                assert_eq!(info.count, model.dirty.len() as u64 * model.granularity);
                assert_eq!(u64::from(info.granularity), model.granularity);
                assert_eq!((info.recording, info.busy), (model.is_enabled, model.lease.is_some()));
            }
        }
        for (place, lease) in &self.leases {
            let disk = &self.world.0[place.0];
            let model = &disk.bitmaps[NAMES[place.1]];
            let found = lease.successor().map(|bits| bits.areas(0..u64::MAX).collect::<Vec<_>>());
            let wanted = model.lease.clone().flatten();
            assert_eq!(found, wanted.map(|dirty| model.areas(&dirty, disk.len)));
        }
    }
}

fn options(place: Place, shift: u32, disabled: bool) -> BitmapOptions {
    let granularity = Some(1 << shift);
    BitmapOptions { granularity, disabled, ..BitmapOptions::named(NAMES[place.1]) }
}

fn no_lease() -> crate::error::Error {
    crate::error::Error::new(ErrorKind::InvalidInput, "there is nothing to split or abdicate")
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(120))]

    #[test]
    fn bitmaps_match_sets_of_granules(
        inline in any::<bool>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        run(1, async {
            let mut test = Test::new(inline).await;
            for step in &steps {
                test.step(step).await;
                test.check();
            }
        });
    }
}
