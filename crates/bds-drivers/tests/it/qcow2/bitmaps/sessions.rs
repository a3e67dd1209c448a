//! Sessions of a graph on the simulated disk, with guest writes and all edits of persistent
//! bitmaps; the power is cut at every write. Without a write-intent log, a bitmap that is valid
//! afterwards is exactly what it was in memory. With one, each bitmap is there and valid, and has
//! at least what it had in memory. Either way it records every sector that differs from when it was
//! clean.

use std::cell::RefCell;
use std::collections::BTreeMap;

use bds_core::Options;
use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::{BitmapOptions, Graph, NodeRef};
use bds_core::request::Backend;
use bds_io::sim::CutMode;
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::Chance;

use crate::qcow2::harness::{self, Shape, close, graph, make, open, read};

const LEN: u64 = 256 << 10;
const SECTOR: u64 = 512;
const SECTORS: usize = (LEN / SECTOR) as usize;

/// What a bitmap must be, by the operations that have completed.
#[derive(Clone, Debug)]
struct Expected {
    granularity: u32,
    is_enabled: bool,
    dirty: Vec<bool>,
    /// The disk when it was clean or was enabled, if it records.
    base: Vec<u64>,
    /// The image has it, marked or not.
    is_stored: bool,
}

/// The disk and its bitmaps, as the program knows them.
#[derive(Clone, Debug)]
struct World {
    /// The stamp of each sector.
    disk: Vec<u64>,
    bitmaps: BTreeMap<String, Expected>,
    /// Being removed, or added to the log: may be there or not.
    leaving: Option<String>,
    /// Being edited, with a log: it may be as before or as after the edit.
    editing: Option<String>,
    last_stamp: u64,
    log: Log,
}

/// Whether the image keeps a write-intent log of its bitmaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Log {
    Kept,
    Off,
}

impl Log {
    fn options(self) -> Options {
        let text = if self == Log::Kept { "auto" } else { "off" };
        harness::options().with("bitmap-log", text)
    }
}

impl World {
    fn new(log: Log) -> Self {
        let (bitmaps, disk) = (BTreeMap::new(), vec![0; SECTORS]);
        Self { disk, bitmaps, leaving: None, editing: None, last_stamp: 0, log }
    }

    fn wrote(&mut self, first: usize, count: usize, stamp: u64) {
        self.disk[first..first + count].fill(stamp);
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.is_enabled) {
            let per_granule = bitmap.granularity as usize / SECTOR as usize;
            let last = (first + count - 1) / per_granule;
            bitmap.dirty[first / per_granule..=last].fill(true);
        }
    }

    fn stored(&mut self) {
        self.bitmaps.values_mut().for_each(|bitmap| bitmap.is_stored = true);
    }
}

fn stamped(stamp: u64, count: usize) -> Vec<u8> {
    stamp.to_le_bytes().repeat(count * SECTOR as usize / 8)
}

/// Sectors and how many, at random.
fn place(chance: &mut Chance) -> (usize, usize) {
    let first = usize::try_from(chance.below(SECTORS as u64)).unwrap();
    let count = 1 + usize::try_from(chance.below(12)).unwrap();
    (first, count.min(SECTORS - first))
}

/// One step. The world changes when it has completed.
async fn step(
    graph: &Graph,
    node: &NodeRef,
    backend: &Backend,
    world: &RefCell<World>,
    chance: &mut Chance,
) {
    let names: Vec<String> = world.borrow().bitmaps.keys().cloned().collect();
    let name = match names.is_empty() {
        true => String::new(),
        false => names[usize::try_from(chance.below(names.len() as u64)).unwrap()].clone(),
    };
    match chance.below(12) {
        0..=3 => {
            let (first, count) = place(chance);
            let stamp = world.borrow().last_stamp + 1;
            world.borrow_mut().last_stamp = stamp;
            let iov = Buf::from_slice(&stamped(stamp, count)).iov();
            backend.write(first as u64 * SECTOR, iov, WriteFlags::empty()).await.unwrap();
            world.borrow_mut().wrote(first, count, stamp);
        }
        4 => {
            let (first, count) = place(chance);
            let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
            let _ = backend.write_zeroes(at, len, ZeroFlags::MAY_UNMAP).await.unwrap();
            world.borrow_mut().wrote(first, count, 0);
        }
        5 => backend.flush().await.unwrap(),
        6 if names.len() < 4 => {
            let granularity = 512 << chance.below(5);
            let disabled = chance.one_in(4);
            let number = world.borrow().last_stamp * 10 + chance.below(10);
            let name = format!("b{number}");
            if names.contains(&name) {
                return;
            }
            let options = BitmapOptions {
                granularity: Some(granularity),
                persistent: true,
                disabled,
                ..BitmapOptions::named(&name)
            };
            world.borrow_mut().leaving = Some(name.clone());
            node.add_bitmap(options).await.unwrap();
            let mut world = world.borrow_mut();
            world.leaving = None;
            let base = world.disk.clone();
            let granules = LEN as usize / granularity as usize;
            let dirty = vec![false; granules];
            let is_enabled = !disabled;
            let is_stored = world.log == Log::Kept;
            let new = Expected { granularity, is_enabled, dirty, base, is_stored };
            world.bitmaps.insert(name, new);
        }
        7 if !names.is_empty() => {
            world.borrow_mut().leaving = Some(name.clone());
            node.remove_bitmap(&name).await.unwrap();
            let mut world = world.borrow_mut();
            world.bitmaps.remove(&name);
            world.leaving = None;
        }
        8 if !names.is_empty() => {
            world.borrow_mut().editing = Some(name.clone());
            node.clear_bitmap(&name).await.unwrap();
            let mut world = world.borrow_mut();
            world.editing = None;
            let base = world.disk.clone();
            let bitmap = world.bitmaps.get_mut(&name).unwrap();
            bitmap.dirty.fill(false);
            bitmap.base = base;
        }
        9 if !names.is_empty() => {
            let is_enabled = !world.borrow().bitmaps[&name].is_enabled;
            world.borrow_mut().editing = Some(name.clone());
            match is_enabled {
                true => node.enable_bitmap(&name).await.unwrap(),
                false => node.disable_bitmap(&name).await.unwrap(),
            }
            let mut world = world.borrow_mut();
            world.editing = None;
            let base = world.disk.clone();
            let bitmap = world.bitmaps.get_mut(&name).unwrap();
            bitmap.is_enabled = is_enabled;
            // What it has recorded so far is in `dirty`.
            bitmap.base = base;
        }
        10 if names.len() > 1 => {
            let from = names.iter().find(|other| **other != name).unwrap();
            world.borrow_mut().editing = Some(name.clone());
            node.merge_bitmaps(&name, &[(node, from)]).await.unwrap();
            let mut world = world.borrow_mut();
            world.editing = None;
            let source = world.bitmaps[from].clone();
            let target = world.bitmaps.get_mut(&name).unwrap();
            let (from, to) = (source.granularity as usize, target.granularity as usize);
            for granule in (0..source.dirty.len()).filter(|granule| source.dirty[*granule]) {
                let (first, last) = (granule * from / to, ((granule + 1) * from - 1) / to);
                target.dirty[first..=last].fill(true);
            }
        }
        _ => {
            graph.change().store_bitmaps(node).commit().await.unwrap();
            world.borrow_mut().stored();
        }
    }
}

/// Some sessions, each closed cleanly.
async fn sessions(sim: &Sim, world: &RefCell<World>, seed: u64) {
    let mut chance = Chance::new(seed);
    for session in 0..3 {
        let graph = graph(sim);
        let options = world.borrow().log.options();
        let (node, backend) = open(&graph, options).await;
        assert_eq!(check_valid(&node, &world.borrow()), world.borrow().bitmaps.len(), "{session}");
        for _ in 0..14 {
            step(&graph, &node, &backend, world, &mut chance).await;
        }
        close(&graph, node, backend).await;
        world.borrow_mut().stored();
    }
}

/// Compares bitmaps that are valid with what they must be, and returns how many are.
fn check_valid(node: &NodeRef, world: &World) -> usize {
    let mut valid = 0;
    for info in node.bitmaps() {
        let name = info.name.as_deref().unwrap();
        let Some(expected) = world.bitmaps.get(name) else {
            assert_eq!(world.leaving.as_deref(), Some(name), "it was removed");
            continue;
        };
        assert_eq!(info.granularity, expected.granularity, "{name}");
        if info.inconsistent {
            assert_eq!(world.log, Log::Off, "{name} is inconsistent in spite of the log");
            continue;
        }
        valid += 1;
        if world.log == Log::Kept && world.editing.as_deref() == Some(name) {
            continue;
        }
        assert_eq!(info.recording, expected.is_enabled, "{name}");
        let bits = node.copy_bitmap(name).unwrap();
        let step = u64::from(info.granularity);
        let dirty: Vec<bool> = (0..bits.granules()).map(|g| bits.is_dirty(g * step)).collect();
        match info.recovered_bytes {
            Some(added) if added > 0 => {
                let missing = (0..dirty.len()).find(|at| expected.dirty[*at] && !dirty[*at]);
                assert_eq!(missing, None, "{name}: dirty in memory, clean after the crash");
            }
            _ => assert_eq!(dirty, expected.dirty, "{name}"),
        }
    }
    for (name, expected) in world.bitmaps.iter().filter(|(_, expected)| expected.is_stored) {
        let is_there = node.find_bitmap(name).is_some() || world.leaving.as_ref() == Some(name);
        assert!(is_there, "{name} is gone: {expected:?}");
    }
    valid
}

#[derive(Debug, Default)]
struct Coverage {
    cuts: u64,
    valid: usize,
    recovered: usize,
    inconsistent: usize,
    leaks: u64,
}

/// After a cut: bitmaps, disk, and what comes after.
async fn check_after_cut(after: &Sim, world: &World, coverage: &mut Coverage) {
    let graph = graph(after);
    let read_only = world.log.options().with("read-only", true);
    let (node, backend) = open(&graph, read_only).await;
    let valid = check_valid(&node, world);
    coverage.valid += valid;
    let bitmaps = node.bitmaps();
    coverage.inconsistent += bitmaps.iter().filter(|info| info.inconsistent).count();
    coverage.recovered += bitmaps.iter().filter(|info| info.recovered_bytes.is_some()).count();
    // Behind the dirty bit refcounts may be anything: a repair comes first.
    let is_dirty = backend.info().await.unwrap().is_dirty;
    if !is_dirty {
        let report = backend.check(&|_, _| {}).await.unwrap();
        assert_eq!(report.corruptions, 0, "{report:?}");
        coverage.leaks += report.leaks;
    }
    let bytes = read(&backend, 0, LEN as usize).await.unwrap();
    for info in bitmaps.iter().filter(|info| info.recording && !info.inconsistent) {
        let name = info.name.as_deref().unwrap();
        if world.log == Log::Kept && world.editing.as_deref() == Some(name) {
            continue;
        }
        let Some(expected) = world.bitmaps.get(name) else { continue };
        let bits = node.copy_bitmap(name).unwrap();
        for sector in 0..SECTORS {
            let at = sector * SECTOR as usize;
            let stamp = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let is_recorded = bits.is_dirty(at as u64);
            assert!(is_recorded || stamp == expected.base[sector], "{name}: sector {sector}");
        }
    }
    close(&graph, node, backend).await;
    if is_dirty {
        return;
    }
    let (node, backend) = open(&graph, world.log.options()).await;
    for info in node.bitmaps().iter().filter(|info| info.inconsistent) {
        node.remove_bitmap(info.name.as_deref().unwrap()).await.unwrap();
    }
    let new = BitmapOptions { persistent: true, ..BitmapOptions::named("after the cut") };
    node.add_bitmap(new).await.unwrap();
    let iov = Buf::from_slice(&[7; 512]).iov();
    backend.write(0, iov, WriteFlags::empty()).await.unwrap();
    close(&graph, node, backend).await;
    let (node, backend) = open(&graph, world.log.options().with("read-only", true)).await;
    assert!(node.bitmaps().iter().all(|info| !info.inconsistent));
    assert!(node.copy_bitmap("after the cut").unwrap().is_dirty(0));
    assert_eq!(backend.check(&|_, _| {}).await.unwrap().corruptions, 0);
    close(&graph, node, backend).await;
}

fn sweep(shape: Shape, log: Log, seeds: std::ops::Range<u64>, every: u64) -> Coverage {
    const MODES: [CutMode; 5] =
        [CutMode::Random, CutMode::Tear, CutMode::LoseAll, CutMode::KeepAll, CutMode::Reorder];
    let mut coverage = Coverage::default();
    for seed in seeds {
        let base = Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
        make(&base, &shape);
        let all = {
            let sim = base.fork(seed);
            let world = RefCell::new(World::new(log));
            sim.block_on(sessions(&sim, &world, seed));
            sim.writes()
        };
        for n in (base.writes() + 1..=all).filter(|n| (n + seed) % every == 0) {
            coverage.cuts += 1;
            let sim = base.fork(seed);
            let world = RefCell::new(World::new(log));
            sim.cut_after_writes(Some(n));
            let _ = sim.run_until_cut(sessions(&sim, &world, seed));
            sim.power_cut();
            let mode = MODES[usize::try_from((seed + n) % 5).unwrap()];
            let after = sim.after_cut_by(seed ^ (n << 20), mode);
            let world = world.into_inner();
            after.block_on(check_after_cut(&after, &world, &mut coverage));
        }
    }
    #[expect(clippy::print_stdout, reason = "the coverage is logged")]
    {
        println!("{coverage:?}");
    }
    coverage
}

#[test]
fn sessions_that_are_cut_leave_no_wrong_bitmap() {
    let coverage = sweep(Shape { size: LEN, ..Shape::default() }, Log::Off, 0..8, 2);
    assert!(coverage.cuts > 200 && coverage.valid > 80, "{coverage:?}");
    assert!(coverage.inconsistent > 80 && coverage.recovered == 0, "{coverage:?}");
}

#[test]
fn with_a_log_sessions_that_are_cut_keep_all_bitmaps() {
    let coverage = sweep(Shape { size: LEN, ..Shape::default() }, Log::Kept, 0..8, 5);
    assert!(coverage.cuts > 200 && coverage.valid > 250, "{coverage:?}");
    assert!(coverage.inconsistent == 0 && coverage.recovered > 80, "{coverage:?}");
}

#[test]
fn sessions_that_are_cut_leave_no_wrong_bitmap_in_small_clusters_and_beside_a_data_file() {
    let small = Shape { size: LEN, cluster: 512, refcount_bits: 64, ..Shape::default() };
    let data = Shape { size: LEN, cluster: 4096, data_file: true, ..Shape::default() };
    let lazy = Shape { size: LEN, cluster: 65536, lazy: true, ..Shape::default() };
    for shape in [small, data, lazy] {
        for log in [Log::Off, Log::Kept] {
            let coverage = sweep(shape, log, 20..24, 6);
            assert!(coverage.cuts > 30 && coverage.valid > 10, "{log:?} {coverage:?}");
        }
    }
}
