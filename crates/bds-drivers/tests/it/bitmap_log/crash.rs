//! The power is cut at every write, operations of the log fail, programs are killed: what is dirty
//! is in the bitmap that is found afterwards, or the bitmap is not to be used.

use std::path::Path;
use std::sync::{Arc, Mutex};

use bds_core::driver::{Prealloc, Truncate, ZeroFlags};
use bds_core::graph::NewImage;
use bds_core::{Options, Result};
use bds_io::sim::{CutMode, Fault, OpMask};
use bds_io::{Sim, SimConfig};

use super::{BLOCK, Disk, LEN, REGION, options, persistent, places};

const IMAGE: &str = "disk";
const LOG: &str = "disk.bds-cbt";

/// The bytes that a backup has, one for each of the places.
type Backup = Arc<Mutex<Vec<u8>>>;

/// A disk that was closed, with the bitmap 'daily' clean, 'off' disabled, and a backup of zeros.
fn prepared(format: &str, config: SimConfig) -> Sim {
    let sim = Sim::new(1, config);
    sim.block_on(async {
        let graph = super::graph(sim.fs());
        let image = NewImage {
            format: format.into(),
            path: IMAGE.into(),
            options: Options::new().with("size", LEN),
            skip_backing: false,
        };
        graph.create_image(image).await.unwrap();
        let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
        disk.node.add_bitmap(persistent("daily")).await.unwrap();
        disk.node.add_bitmap(persistent("off")).await.unwrap();
        disk.write(places().nth(3).unwrap(), 0).await.unwrap();
        disk.node.disable_bitmap("off").await.unwrap();
        disk.node.clear_bitmap("daily").await.unwrap();
        disk.close().await.unwrap();
    });
    sim
}

/// A guest that writes, while bitmaps are edited and backups are made.
async fn work(sim: &Sim, format: &'static str, backup: Backup, seed: u64) -> Result<()> {
    let disk = Arc::new(Disk::open(sim.fs(), options(format, IMAGE)).await?);
    for round in 0..3_u64 {
        let mut tasks = Vec::new();
        for writer in 0..3 {
            let disk = Arc::clone(&disk);
            tasks.push(bds_io::spawn(async move {
                for n in 0..3 {
                    let random = (seed * 64 + round * 16 + writer * 4 + n) as usize * 7919;
                    let at = places().nth(random % 24).unwrap();
                    let byte = u8::try_from(random % 250 + 1).unwrap();
                    let _may_fail = match n {
                        2 => disk.guest.flush().await,
                        1 if writer == 2 => {
                            let flags = ZeroFlags::MAY_UNMAP;
                            disk.guest.write_zeroes(at, BLOCK, flags).await.map(drop)
                        }
                        _ => disk.write(at, byte).await,
                    };
                }
            }));
        }
        if round == 1 {
            let disk = Arc::clone(&disk);
            tasks.push(bds_io::spawn(async move {
                let _may_fail = disk.node.add_bitmap(persistent("more")).await;
            }));
        }
        for task in tasks {
            task.await;
        }
        match round {
            0 => incremental(&disk, &backup).await?,
            1 => {
                let _may_fail = disk.node.remove_bitmap("more").await;
            }
            _ => {}
        }
    }
    Arc::into_inner(disk).unwrap().close().await
}

/// Copies what is dirty, then clears the bitmap; no write is under way.
async fn incremental(disk: &Disk, backup: &Backup) -> Result<()> {
    let bits = disk.node.copy_bitmap("daily")?;
    let mut copy = backup.lock().unwrap().clone();
    for (number, at) in places().enumerate().filter(|(_, at)| bits.is_dirty(*at)) {
        copy[number] = disk.read(at).await[0];
    }
    // From here on the backup counts, whether or not the bitmap was cleared.
    *backup.lock().unwrap() = copy;
    disk.node.clear_bitmap("daily").await
}

/// Opens the disk after a crash: what differs from the backup is dirty.
async fn check(sim: &Sim, format: &str, backup: &[u8], may_be_lost: bool, case: &str) {
    let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
    let found = disk.node.bitmaps().into_iter().find(|it| it.name.as_deref() == Some("daily"));
    let is_usable = found.as_ref().is_some_and(|info| !info.inconsistent);
    assert!(is_usable || may_be_lost, "{case}: {found:?}");
    if is_usable {
        assert!(found.unwrap().recording, "{case}");
        let bits = disk.node.copy_bitmap("daily").unwrap();
        for (number, at) in places().enumerate() {
            let now = disk.read(at).await[0];
            assert!(now == backup[number] || bits.is_dirty(at), "{case}: place {number}");
        }
    }
    if !may_be_lost {
        let off = disk.bitmap("off");
        assert!(!off.recording && !off.inconsistent, "{case}: state of a disabled one");
    }
    // It goes on: writes are recorded, and a close makes all exact.
    disk.write(places().nth(9).unwrap(), 7).await.unwrap();
    disk.close().await.unwrap();
    let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
    if is_usable {
        assert_eq!(disk.bitmap("daily").recovered_bytes, None, "{case}");
        assert!(disk.node.copy_bitmap("daily").unwrap().is_dirty(places().nth(9).unwrap()));
    }
    disk.close().await.unwrap();
}

/// Scenario 37: the power is cut at every write, also those inside log write, directory update and
/// store.
fn scenario_37_no_power_cut_loses_a_dirty_block(format: &'static str) {
    let full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let base = prepared(format, SimConfig::default());
    let mut cuts = 0;
    for seed in 0..if full { 20 } else { 1 } {
        for n in 1.. {
            let sim = base.fork(seed);
            let backup = Backup::new(Mutex::new(vec![0; 24]));
            sim.cut_after_writes(Some(sim.writes() + n));
            let outcome = sim.run_until_cut(work(&sim, format, Arc::clone(&backup), seed));
            sim.power_cut();
            let backup = backup.lock().unwrap().clone();
            let modes = [CutMode::LoseAll, CutMode::KeepAll, CutMode::Reorder, CutMode::Tear];
            let count = if full { modes.len() } else { 1 };
            for mode in modes.into_iter().cycle().skip(usize::try_from(n).unwrap()).take(count) {
                let after = sim.after_cut_by(seed ^ n << 8, mode);
                let case = format!("{format} seed {seed} cut {n} {mode:?}");
                after.block_on(check(&after, format, &backup, false, &case));
            }
            cuts += 1;
            if let Some(done) = outcome {
                done.unwrap();
                break;
            }
        }
    }
    assert!(cuts > 40, "{cuts} cuts");
}

#[test]
fn scenario_37_raw_no_power_cut_loses_a_dirty_block() {
    scenario_37_no_power_cut_loses_a_dirty_block("raw");
}

#[test]
#[cfg(feature = "qcow2")]
fn scenario_37_qcow2_no_power_cut_loses_a_dirty_block() {
    scenario_37_no_power_cut_loses_a_dirty_block("qcow2");
}

/// A closed disk with the bitmap 'daily', in which one block is dirty, and 'old'. `create`: options
/// of the image.
fn with_bitmaps(format: &str, create: Options, open: &Options) -> Sim {
    let sim = Sim::new(1, SimConfig::default());
    sim.block_on(async {
        let image = NewImage {
            format: format.into(),
            path: IMAGE.into(),
            options: create.with("size", LEN),
            skip_backing: false,
        };
        super::graph(sim.fs()).create_image(image).await.unwrap();
        let disk = Disk::open(sim.fs(), open.clone()).await.unwrap();
        disk.node.add_bitmap(persistent("daily")).await.unwrap();
        disk.node.add_bitmap(persistent("old")).await.unwrap();
        disk.write(places().nth(3).unwrap(), 1).await.unwrap();
        disk.close().await.unwrap();
    });
    sim
}

/// What `bds backup run` does to the bitmaps of a closed image, then a kill or a close.
async fn begin_a_point(sim: &Sim, open: Options, is_closed: bool) -> Result<()> {
    let disk = Disk::open(sim.fs(), open).await?;
    let edits = disk.graph.change().remove_bitmap(&disk.node, "old");
    edits.add_bitmap(&disk.node, persistent("new")).commit().await?;
    disk.graph.change().store_bitmaps(&disk.node).commit().await?;
    match is_closed {
        true => disk.close().await,
        false => {
            std::mem::forget(disk);
            Ok(())
        }
    }
}

/// The power is cut at every write of an edit of bitmaps and of their store, with no guest at work:
/// those that were there are usable, and so is a new one that is there.
fn no_power_cut_while_bitmaps_are_stored_loses_one(base: &Sim, open: &Options, words: &str) {
    let full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    for is_closed in [true, false] {
        for n in 1.. {
            let sim = base.fork(n);
            sim.cut_after_writes(Some(sim.writes() + n));
            let outcome = sim.run_until_cut(begin_a_point(&sim, open.clone(), is_closed));
            sim.power_cut();
            let modes = [CutMode::LoseAll, CutMode::KeepAll, CutMode::Reorder, CutMode::Tear];
            let count = if full { modes.len() } else { 1 };
            for mode in modes.into_iter().cycle().skip(usize::try_from(n).unwrap()).take(count) {
                let after = sim.after_cut_by(n, mode);
                let case = format!("{words}, closed: {is_closed}, cut {n} {mode:?}");
                after.block_on(async {
                    let disk = Disk::open(after.fs(), open.clone()).await.unwrap();
                    let place = places().nth(3).unwrap();
                    let daily = disk.bitmap("daily");
                    assert!(daily.recording && !daily.inconsistent, "{case}: {daily:?}");
                    assert!(disk.node.copy_bitmap("daily").unwrap().is_dirty(place), "{case}");
                    let all = disk.node.bitmaps();
                    let new = all.iter().find(|info| info.name.as_deref() == Some("new"));
                    assert!(new.is_none_or(|new| new.recording && !new.inconsistent), "{case}");
                    assert!(new.is_some() || outcome.is_none(), "{case}: it was stored");
                    disk.close().await.unwrap();
                });
            }
            if let Some(done) = outcome {
                done.unwrap();
                assert!(n > 5, "{n} writes");
                break;
            }
        }
    }
}

#[test]
fn no_power_cut_while_bitmaps_are_stored_loses_one_of_a_raw_disk() {
    let open = options("raw", IMAGE);
    let base = with_bitmaps("raw", Options::new(), &open);
    no_power_cut_while_bitmaps_are_stored_loses_one(&base, &open, "raw");
}

/// Also where the header's extension lies in two sectors, so that its change takes several steps.
#[test]
#[cfg(feature = "qcow2")]
fn no_power_cut_while_bitmaps_are_stored_loses_one_of_a_qcow2_disk() {
    let open = options("qcow2", IMAGE);
    let base = with_bitmaps("qcow2", Options::new(), &open);
    no_power_cut_while_bitmaps_are_stored_loses_one(&base, &open, "qcow2");
    let split = (1..64).find_map(|words| {
        let name = "d".repeat(8 * words);
        let data = format!("data-file.driver=file,data-file.filename={name}");
        let open = Options::parse(&format!(
            "driver=qcow2,node-name=disk,file.driver=file,file.filename={IMAGE},{data}"
        ))
        .unwrap();
        let base = with_bitmaps("qcow2", Options::new().with("data_file", name), &open);
        let header = base.snapshot_file(IMAGE);
        let magic = 0x2385_2875_u32.to_be_bytes();
        let at = header[..4096].windows(4).position(|bytes| bytes == magic).unwrap() + 8;
        (at / 512 != (at + 23) / 512).then_some((base, open))
    });
    let (base, open) = split.expect("the extension moves by 8 bytes");
    no_power_cut_while_bitmaps_are_stored_loses_one(&base, &open, "in two sectors");
}

/// Operations of the log fail, then the power is cut: guest writes go on where the log could be
/// given up, and no bitmap is wrong.
#[test]
fn no_failed_operation_of_the_log_makes_a_bitmap_wrong() {
    for format in ["raw", "qcow2"] {
        let base = prepared(format, SimConfig::default());
        for n in 1..60 {
            for fault in [Fault::once(libc::EIO), Fault::sticky(libc::ENOSPC)] {
                let sim = base.fork(n);
                let backup = Backup::new(Mutex::new(vec![0; 24]));
                sim.fail_nth(n, fault.on(OpMask::CHANGE).in_path("bds-cbt"));
                let _may_fail = sim.block_on(work(&sim, format, Arc::clone(&backup), n));
                sim.clear_faults();
                let backup = backup.lock().unwrap().clone();
                sim.power_cut();
                let after = sim.after_cut_by(n, CutMode::LoseAll);
                let case = format!("{format}: operation {n} fails");
                after.block_on(check(&after, format, &backup, true, &case));
            }
        }
    }
}

/// F9: a bitmap that was added in a session that is killed is there, and so is what was recorded.
#[test]
fn f9_a_kill_loses_no_bitmap() {
    for format in ["raw", "qcow2"] {
        let sim = prepared(format, SimConfig::calm());
        sim.block_on(async {
            let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
            disk.node.add_bitmap(persistent("new")).await.unwrap();
            disk.write(places().nth(20).unwrap(), 1).await.unwrap();
            disk.node.disable_bitmap("new").await.unwrap();
            disk.write(0, 2).await.unwrap();
            disk.node.enable_bitmap("off").await.unwrap();
            disk.node.merge_bitmaps("off", &[(&disk.node, "new")]).await.unwrap();
            std::mem::forget(disk);
        });
        sim.power_cut();
        let after = sim.after_cut_by(1, CutMode::KeepAll);
        after.block_on(async {
            let disk = Disk::open(after.fs(), options(format, IMAGE)).await.unwrap();
            let (new, off, daily) = (disk.bitmap("new"), disk.bitmap("off"), disk.bitmap("daily"));
            assert!(!new.recording && off.recording && daily.recording, "{format}");
            let place = places().nth(20).unwrap();
            assert_eq!(disk.dirty("new"), std::slice::from_ref(&(place..place + BLOCK)));
            assert!(disk.node.copy_bitmap("off").unwrap().is_dirty(place));
            let daily = disk.node.copy_bitmap("daily").unwrap();
            assert!(daily.is_dirty(0) && daily.is_dirty(place));
            assert!([&new, &off].iter().all(|info| !info.inconsistent));
            assert_eq!(new.recovered_bytes, Some(0), "a disabled one is exact");
            disk.close().await.unwrap();
        });
        let files = after.snapshot_file(IMAGE).len();
        assert!(files > 0);
    }
}

/// What a crash adds is reported, bounded by the regions that were written, and gone after a clear.
#[test]
fn over_copy_is_reported_and_bounded() {
    for format in ["raw", "qcow2"] {
        let sim = prepared(format, SimConfig::calm());
        sim.block_on(async {
            let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
            disk.write(5 * REGION, 1).await.unwrap();
            disk.write(5 * REGION + BLOCK, 1).await.unwrap();
            std::mem::forget(disk);
        });
        sim.power_cut();
        let after = sim.after_cut_by(1, CutMode::KeepAll);
        after.block_on(async {
            let disk = Disk::open(after.fs(), options(format, IMAGE)).await.unwrap();
            let info = disk.bitmap("daily");
            assert_eq!((info.recovered_bytes, info.count), (Some(REGION), REGION), "{format}");
            assert_eq!(disk.dirty("daily"), std::slice::from_ref(&(5 * REGION..6 * REGION)));
            assert_eq!(info.to_json()["recovered-bytes"], REGION);
            disk.node.clear_bitmap("daily").await.unwrap();
            assert_eq!(disk.bitmap("daily").recovered_bytes, None);
            disk.close().await.unwrap();
        });
    }
}

/// The disk grows, by a resize and by a write, in a session that crashes.
#[test]
fn a_disk_that_has_grown_is_dirty_where_it_is_new() {
    for format in ["raw", "qcow2"] {
        let sim = prepared(format, SimConfig::calm());
        sim.block_on(async {
            let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
            let change =
                Truncate { len: 40 * LEN, exact: true, prealloc: Prealloc::Off, zero_new: false };
            disk.guest.truncate(change).await.unwrap();
            disk.write(39 * LEN, 1).await.unwrap();
            disk.guest.flush().await.unwrap();
            std::mem::forget(disk);
        });
        sim.power_cut();
        let after = sim.after_cut_by(1, CutMode::KeepAll);
        after.block_on(async {
            let disk = Disk::open(after.fs(), options(format, IMAGE)).await.unwrap();
            let bits = disk.node.copy_bitmap("daily").unwrap();
            let areas: Vec<_> = bits.areas(0..40 * LEN).collect();
            assert_eq!(areas, std::slice::from_ref(&(LEN..40 * LEN)), "{format}");
            disk.close().await.unwrap();
        });
    }
}

/// In a steady state a write does nothing for the log; a clean close leaves no log behind.
#[test]
fn a_logged_region_costs_no_operation() {
    for format in ["raw", "qcow2"] {
        let sim = prepared(format, SimConfig::calm());
        sim.block_on(async {
            let disk = Disk::open(sim.fs(), options(format, IMAGE)).await.unwrap();
            disk.write(0, 1).await.unwrap();
            let before = sim.ops_of(OpMask::CHANGE);
            for n in 1..50 {
                disk.write(n * 4096, 1).await.unwrap();
            }
            let writes = sim.ops_of(OpMask::CHANGE) - before;
            // Those of qcow2 allocate clusters, whose metadata stays in memory.
            assert!(writes <= 49 + 4, "{format}: {writes} operations for 49 writes");
            disk.close().await.unwrap();
            let log = sim.fs().open(Path::new(LOG), &bds_io::OpenOptions::default());
            assert_eq!(log.is_ok(), format == "raw", "qcow2 stores them itself");
        });
    }
}
