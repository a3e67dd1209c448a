//! Tests the write-intent log: its layout on arbitrary bytes, and the rule that what is recovered
//! is at least what is dirty, after power cuts, failed operations and dropped futures.

use std::path::Path;
use std::sync::{Arc, Mutex};

use bds_io::sim::{CutMode, Fault, OpMask};
use bds_io::sync::Semaphore;
use bds_io::{File, OpenOptions, Sim, SimConfig};
use proptest::prelude::*;

use super::page::{
    BITS_LEN, EndState, HEADERS_LEN, Header, LogPage, PAGE_LEN, REGIONS, Shape, Snapshot, Tie,
    parse_snapshots, snapshots_to_bytes,
};
use super::regions::Regions;
use super::{Facts, Found, IntentLog};
use crate::bitmap::HBitmap;
use crate::error::{ErrorKind, Result};
use crate::test_kit::lock;

const REGION: u64 = 64 << 10;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 16 * 24;
const LEN: u64 = BLOCKS * BLOCK;
/// Most writes at once.
const WRITES: u32 = 8;
const ID: [u8; 16] = [7; 16];

fn header() -> Header {
    Header {
        epoch: 5,
        disk_id: ID,
        disk_len: LEN,
        shape: Shape::new(REGION, 1).unwrap(),
        log_at: HEADERS_LEN,
        snapshot_at: HEADERS_LEN + 2 * PAGE_LEN as u64,
        snapshot_len: 99,
        snapshot_checksum: 1234,
        end_state: EndState::Open,
        tie: Tie { inode: 5, modified_ns: 6 },
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_without_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        len in 0..2 * PAGE_LEN,
        disk_len in any::<u64>(),
    ) {
        let mut page = bytes.clone();
        page.resize(len, 0);
        prop_assert_eq!(Header::parse(&page), None);
        let _parsed = parse_snapshots(&bytes, disk_len);
        let is_empty = page.len() == PAGE_LEN && page.iter().all(|byte| *byte == 0);
        let wanted = if is_empty { LogPage::Empty } else { LogPage::Damaged };
        prop_assert_eq!(LogPage::parse(&page, 0, 1), wanted);
    }

    /// A page of which any sector is another one's is noticed: a header is not used, a log page
    /// counts as all of its regions.
    #[test]
    fn torn_pages_are_noticed(
        bits in prop::collection::vec(any::<u8>(), PAGE_LEN),
        sectors in 1..255u8,
        epoch in 1..4u64,
    ) {
        let tear = |old: &[u8], new: &[u8]| -> Vec<u8> {
            let parts = old.chunks(512).zip(new.chunks(512)).enumerate();
            parts.flat_map(|(n, (old, new))| if sectors >> n & 1 == 1 { new } else { old }).copied().collect()
        };
        let (old, new) = (header().to_page(), Header { epoch: 7, disk_len: LEN * 2, ..header() });
        let torn = tear(&old, &new.to_page());
        let parsed = Header::parse(&torn);
        prop_assert!(parsed.is_none() || parsed == Some(header()) || parsed == Some(new));
        let page = |bits: &[u8]| -> Vec<u64> {
            bits.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let words = |bits: &[u8]| [vec![0; 3 * BITS_LEN / 8], page(bits)].concat();
        let old = LogPage::to_page(&words(&[0xf0; BITS_LEN]), 3, 3);
        let new = LogPage::to_page(&words(&bits[..BITS_LEN]), 3, epoch);
        let torn = tear(&old, &new);
        let parsed = LogPage::parse(&torn, 3, epoch);
        if torn == new {
            prop_assert_eq!(parsed, LogPage::Regions(bits[..BITS_LEN].to_vec()));
        } else if torn != old {
            prop_assert_eq!(parsed, LogPage::Damaged);
        }
        prop_assert_eq!(LogPage::parse(&new, 4, epoch), LogPage::Damaged, "of another place");
    }

    #[test]
    fn snapshots_are_read_back(
        bitmaps in prop::collection::vec(
            (".{0,20}", any::<bool>(), 9..20u32, prop::collection::vec(0..LEN, 0..9)), 0..5),
        cut in 0..60usize,
    ) {
        let all: Vec<Snapshot> = bitmaps
            .iter()
            .map(|(name, is_enabled, shift, dirty)| {
                let bits = HBitmap::new(LEN, 1 << shift).unwrap();
                dirty.iter().for_each(|at| bits.set(*at..*at + 1));
                Snapshot { name: name.as_str().into(), is_enabled: *is_enabled, bits: bits.into() }
            })
            .collect();
        let bytes = snapshots_to_bytes(&all).unwrap();
        let read = parse_snapshots(&bytes, LEN).unwrap();
        prop_assert_eq!(read.len(), all.len());
        for (read, wrote) in read.iter().zip(&all) {
            prop_assert_eq!((&read.name, read.is_enabled), (&wrote.name, wrote.is_enabled));
            prop_assert!(read.bits.areas(0..LEN).eq(wrote.bits.areas(0..LEN)));
        }
        if cut > 0 && cut < bytes.len() {
            prop_assert!(parse_snapshots(&bytes[..bytes.len() - cut], LEN).is_err());
        }
        prop_assert!(bytes.len() == 4 || parse_snapshots(&bytes, LEN * 64).is_err());
    }
}

/// The last region of a page, and the first of the next one; the last of all, and what is behind.
#[test]
fn regions_find_their_pages() {
    let shape = Shape::new(REGION, 2).unwrap();
    let regions = Regions::new(shape);
    let boundary = REGIONS * REGION;
    regions.set(&(boundary - 1..boundary + 1));
    assert!(regions.covers(&(boundary - REGION..boundary + REGION)));
    assert!(!regions.covers(&(boundary - REGION - 1..boundary)));
    assert!(!regions.covers(&(boundary..boundary + REGION + 1)));
    let end = 2 * REGIONS * REGION;
    assert!(!regions.covers(&(u64::MAX - 5..u64::MAX)));
    regions.set(&(end + 7 * REGION..end + 8 * REGION));
    assert!(regions.covers(&(u64::MAX - 5..u64::MAX)) && regions.covers(&(end - 1..end)));
    let words = regions.take();
    let found: Vec<u64> = (0..2)
        .flat_map(|number| {
            let page = LogPage::to_page(&words, number, 9);
            LogPage::parse(&page, number, 9).regions(number).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(found, [REGIONS - 1, REGIONS, 2 * REGIONS - 1]);
    assert_eq!(shape.bytes_of(REGIONS), boundary..boundary + REGION);
    assert_eq!(shape.bytes_of(2 * REGIONS - 1), end - REGION..u64::MAX);
    assert!(LogPage::Damaged.regions(1).eq(REGIONS..2 * REGIONS));
    assert_eq!((regions.count(), LogPage::Empty.regions(0).count()), (0, 0));
}

fn open(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(path), &options).unwrap()
}

async fn recover(sim: &Sim) -> Result<Option<Found>> {
    Found::read(&open(sim, "disk.bds-cbt")).await
}

fn facts() -> Facts {
    Facts { disk_id: ID, disk_len: LEN, tie: Tie::default() }
}

/// A disk with a log, a bitmap, and a backup of what was dirty.
struct Disk {
    data: File,
    log: IntentLog,
    bits: Arc<HBitmap>,
    /// Held shared by writes, and alone when an epoch begins: the tracker's part.
    writes: Semaphore,
    /// The bytes as the last backup has them.
    backup: Mutex<Vec<u8>>,
}

impl Disk {
    async fn create(sim: &Sim) -> Result<Arc<Self>> {
        let bits = Arc::new(HBitmap::new(LEN, 4096).unwrap());
        let data = open(sim, "disk");
        data.set_len(LEN).await.unwrap();
        data.sync_data().await.unwrap();
        let log = IntentLog::new(Shape::new(REGION, 1).unwrap());
        log.protect(true);
        let file = open(sim, "disk.bds-cbt");
        log.start(file, None, facts(), &Self::snapshot(&bits)).await?;
        let backup = Mutex::new(vec![0; usize::try_from(LEN).unwrap()]);
        Ok(Arc::new(Self { data, log, bits, writes: Semaphore::new(WRITES as usize), backup }))
    }

    fn snapshot(bits: &Arc<HBitmap>) -> [Snapshot; 1] {
        [Snapshot { name: "daily".into(), is_enabled: true, bits: Arc::clone(bits) }]
    }

    /// A write of one block: logged, written, recorded.
    async fn write(&self, block: u64, byte: u8) -> Result<()> {
        let _write = self.writes.acquire().await;
        let range = block * BLOCK..(block + 1) * BLOCK;
        self.log.log(range.clone()).await?;
        let bytes = vec![byte; usize::try_from(BLOCK).unwrap()];
        let written = super::log::write(&self.data, range.start, bytes).await;
        self.bits.set(range);
        written
    }

    /// Copies what is dirty; then the bitmap is clean, and a checkpoint says so.
    async fn backup(&self) -> Result<()> {
        while let Some(area) = self.bits.claim(0..LEN, BLOCK) {
            let bytes = super::recover::read(&self.data, area.start, area.end - area.start).await?;
            let start = usize::try_from(area.start).unwrap();
            lock(&self.backup)[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        self.checkpoint().await
    }

    /// What the log forgets must not be lost in a crash. Writes may go on.
    async fn checkpoint(&self) -> Result<()> {
        let no_writes = self.writes.acquire_many(WRITES).await;
        self.log.begin_epoch().await?;
        drop(no_writes);
        let flushed = self.data.sync_data().await;
        flushed.map_err(|error| crate::Error::io(error, "flush"))?;
        self.log.checkpoint(LEN, &Self::snapshot(&self.bits)).await
    }

    /// Writers side by side; checkpoints meanwhile, backups while none writes.
    async fn work(self: &Arc<Self>, seed: u64) {
        for round in 0..6_u64 {
            let mut tasks: Vec<_> = (0..4_u64)
                .map(|writer| {
                    let disk = Arc::clone(self);
                    bds_io::spawn(async move {
                        for n in 0..4_u64 {
                            let random = (seed * 64 + round * 16 + writer * 4 + n)
                                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                                >> 33;
                            let byte = u8::try_from(random % 255 + 1).unwrap();
                            // Refused if the log cannot be written: then nothing is written.
                            let _written = disk.write(random % BLOCKS, byte).await;
                        }
                    })
                })
                .collect();
            if round % 2 == 0 {
                let disk = Arc::clone(self);
                tasks.push(bds_io::spawn(async move {
                    let _checkpoint = disk.checkpoint().await;
                }));
            }
            for task in tasks {
                task.await;
            }
            if round % 3 == 1 {
                let _backup = self.backup().await;
            }
        }
    }
}

/// Every block that differs from the backup is dirty in the bitmap that is recovered.
fn check(after: &Sim, backup: &[u8], case: &str) {
    let (found, disk) = after.block_on(async {
        let found = recover(after).await.unwrap().unwrap();
        (found, after.snapshot_file("disk"))
    });
    let bits = &found.bitmaps(LEN, false).unwrap()[0].bits;
    for (block, (old, new)) in backup.chunks(4096).zip(disk.chunks(4096)).enumerate() {
        assert!(old == new || bits.is_dirty(block as u64 * BLOCK), "block {block}: {case}");
    }
}

/// The power is cut with each write in turn; what was not flushed is lost, kept, reordered, torn.
#[test]
fn no_power_cut_loses_a_dirty_block() {
    let mut cuts = 0;
    let full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    for seed in 0..if full { 20 } else { 2 } {
        // By default every third cut: the drivers' tests cut the power at each write.
        for n in (1..).step_by(if full { 1 } else { 3 }) {
            let sim = Sim::new(seed, SimConfig::default());
            let disk = sim.block_on(Disk::create(&sim)).unwrap();
            sim.cut_after_writes(Some(sim.writes() + n));
            let is_done = sim.run_until_cut(disk.work(seed)).is_some();
            let backup = lock(&disk.backup).clone();
            sim.power_cut();
            for mode in [CutMode::LoseAll, CutMode::KeepAll, CutMode::Reorder, CutMode::Tear] {
                let after = sim.after_cut_by(seed ^ n << 8, mode);
                check(&after, &backup, &format!("seed {seed} cut {n} {mode:?}"));
            }
            cuts += 1;
            if is_done {
                break;
            }
        }
    }
    assert!(cuts > 40, "{cuts} cuts");
}

/// Operations fail; a write without its log is not done, and the rule holds after a cut at the end.
#[test]
fn no_failed_operation_loses_a_dirty_block() {
    for n in 1..60 {
        for fault in [Fault::once(libc::EIO), Fault::sticky(libc::EIO)] {
            let sim = Sim::new(n, SimConfig::default());
            let disk = sim.block_on(Disk::create(&sim)).unwrap();
            sim.fail_nth(n, fault.on(OpMask::CHANGE).in_path("bds-cbt"));
            sim.block_on(disk.work(n));
            sim.clear_faults();
            let backup = lock(&disk.backup).clone();
            sim.power_cut();
            for mode in [CutMode::LoseAll, CutMode::KeepAll, CutMode::Tear] {
                check(&sim.after_cut_by(n, mode), &backup, &format!("operation {n} fails"));
            }
        }
    }
}

/// Futures are dropped at each await; what they began runs to its end and undoes nothing.
#[test]
fn no_dropped_future_loses_a_dirty_block() {
    for n in 0..400 {
        let sim = Sim::new(n as u64, SimConfig::default());
        let disk = sim.block_on(Disk::create(&sim)).unwrap();
        let both = Arc::clone(&disk);
        let work = async move {
            both.write(3, 1).await.unwrap();
            both.backup().await.unwrap();
            both.write(100, 2).await.unwrap();
            both.checkpoint().await.unwrap();
            both.write(100, 3).await.unwrap();
        };
        let was_dropped = sim.drop_at(work, n);
        sim.block_on(async {
            disk.write(200, 9).await.unwrap();
            disk.write(4, 8).await.unwrap();
        });
        let backup = lock(&disk.backup).clone();
        sim.power_cut();
        for mode in [CutMode::LoseAll, CutMode::KeepAll] {
            check(&sim.after_cut_by(n as u64, mode), &backup, &format!("dropped at {n}"));
        }
        if !was_dropped {
            return;
        }
    }
    panic!("the sweep has no end");
}

#[test]
fn requests_that_wait_together_share_a_flush() {
    let sim = Sim::new(1, SimConfig::calm());
    let disk = sim.block_on(Disk::create(&sim)).unwrap();
    let before = sim.ops_of(OpMask::SYNC);
    sim.block_on(async {
        let writers: Vec<_> = (0..24)
            .map(|region| {
                let disk = Arc::clone(&disk);
                bds_io::spawn(
                    async move { disk.log.log(region * REGION..region * REGION + 1).await },
                )
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
    let flushes = sim.ops_of(OpMask::SYNC) - before;
    assert!(flushes <= 6, "{flushes} flushes for 24 regions");
    sim.block_on(disk.log.log(0..LEN)).unwrap();
    assert_eq!(sim.ops_of(OpMask::SYNC) - before, flushes, "all is logged");
    assert!(!disk.log.needs(&(0..LEN)));
}

#[test]
fn a_checkpoint_empties_the_log_and_the_file_stays_small() {
    let sim = Sim::new(1, SimConfig::calm());
    let disk = sim.block_on(Disk::create(&sim)).unwrap();
    let mut lens = Vec::new();
    for round in 0..20_u64 {
        sim.block_on(async {
            disk.write(round * 8 % BLOCKS, 5).await.unwrap();
            assert!(disk.log.needs(&(0..LEN)));
            disk.checkpoint().await.unwrap();
            let found = recover(&sim).await.unwrap().unwrap();
            assert!(found.regions.is_empty());
            let bitmap = found.bitmaps(LEN, false).unwrap().remove(0);
            assert_eq!(bitmap.added_bytes, 0);
            assert!(bitmap.bits.areas(0..LEN).eq(disk.bits.areas(0..LEN)));
        });
        lens.push(sim.snapshot_file("disk.bds-cbt").len());
    }
    assert_eq!(lens.iter().max(), lens.get(2), "{lens:?}");
}

/// A log is taken up again after a crash, several times, also with regions of another length, and
/// keeps what it had until the new state is durable.
#[test]
fn a_log_is_continued_after_crashes() {
    let mut sim = Sim::new(1, SimConfig::calm());
    let disk = sim.block_on(Disk::create(&sim)).unwrap();
    sim.block_on(disk.write(0, 1)).unwrap();
    drop(disk);
    for round in 1..6_u64 {
        let region_len = [REGION, 2 * REGION][usize::try_from(round / 3).unwrap()];
        for n in 1.. {
            let (after, is_done) = cut_in_restart(&sim, region_len, n, round);
            let dirty = after.block_on(async {
                let found = recover(&after).await.unwrap().unwrap();
                found.bitmaps(LEN, false).unwrap().remove(0).bits
            });
            for earlier in 0..round {
                assert!(dirty.is_dirty(earlier * 5 * REGION), "round {round} cut {n}: {earlier}");
            }
            if is_done {
                sim = after;
                break;
            }
        }
    }
}

/// Recovers, starts the log again, logs a region that was clean; the power is cut at write `n`.
fn cut_in_restart(sim: &Sim, region_len: u64, n: u64, round: u64) -> (Sim, bool) {
    sim.power_cut();
    let sim = sim.after_cut_by(0, CutMode::KeepAll);
    sim.cut_after_writes(Some(sim.writes() + n));
    let file = open(&sim, "disk.bds-cbt");
    let is_done = sim.run_until_cut(async move {
        let log = IntentLog::new(Shape::new(region_len, 1).unwrap());
        log.protect(true);
        let found = Found::read(&file).await?.unwrap();
        let bits = Arc::new(found.bitmaps(LEN, false)?.remove(0).bits);
        log.start(file, Some(found), facts(), &Disk::snapshot(&bits)).await?;
        log.log(round * 5 * REGION..round * 5 * REGION + 1).await
    });
    let is_done = is_done.transpose().unwrap().is_some();
    sim.power_cut();
    (sim.after_cut_by(n, CutMode::LoseAll), is_done)
}

#[test]
fn a_log_that_was_given_up_says_that_all_is_dirty() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.block_on(async {
        let disk = Disk::create(&sim).await.unwrap();
        disk.log.invalidate().await.unwrap();
        disk.log.give_up().await;
        assert!(!disk.log.needs(&(0..u64::MAX)) && !disk.log.needs_start());
        let bitmap = recover(&sim).await.unwrap().unwrap().bitmaps(LEN, false).unwrap().remove(0);
        assert_eq!((&*bitmap.name, bitmap.bits.dirty_bytes()), ("daily", LEN));
    });
}

#[test]
fn other_files_are_refused() {
    let sim = Sim::new(1, SimConfig::calm());
    sim.block_on(async {
        let disk = Disk::create(&sim).await.unwrap();
        disk.data.set_len(0).await.unwrap();
        assert!(Found::read(&disk.data).await.unwrap().is_none(), "empty");
        super::log::write(&disk.data, 0, vec![1; 9000]).await.unwrap();
        let refused = Found::read(&disk.data).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidImage);
        let file = open(&sim, "disk.bds-cbt");
        file.set_len(file.len().unwrap() - 1).await.unwrap();
        assert_eq!(recover(&sim).await.unwrap_err().kind(), ErrorKind::InvalidImage, "cut short");
        for (region_len, pages) in [(0, 1), (4096, 1), (100_000, 1), (1 << 32, 1), (REGION, 0)] {
            assert_eq!(Shape::new(region_len, pages), None, "{region_len} {pages}");
        }
        assert_eq!(Shape::for_disk(1 << 40).region_len(), 8 << 20);
    });
}
