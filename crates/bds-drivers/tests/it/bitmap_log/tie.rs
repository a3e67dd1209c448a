//! The sidecar of a raw image belongs to one disk in one state: another program that writes to the
//! image, another image, a damaged, foreign or missing file are noticed.

use std::path::Path;

use bds_core::{ErrorKind, Options};
use bds_io::{File, IoVec, OpenOptions, Sim, SimConfig};

use super::{BLOCK, Disk, LEN, options, persistent};

const IMAGE: &str = "disk";
const LOG: &str = "disk.bds-cbt";

fn file(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(path), &options).unwrap()
}

async fn write(sim: &Sim, path: &str, at: u64, bytes: Vec<u8>) {
    file(sim, path).write(at, IoVec::from(bytes), false).await.unwrap();
}

/// A raw image that was closed with the bitmaps 'daily' (block 3 is dirty) and 'off' (disabled).
async fn prepare(sim: &Sim) {
    file(sim, IMAGE).set_len(LEN).await.unwrap();
    let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
    assert!(disk.node.bitmaps().is_empty());
    disk.node.add_bitmap(persistent("daily")).await.unwrap();
    disk.node.add_bitmap(persistent("off")).await.unwrap();
    disk.node.disable_bitmap("off").await.unwrap();
    disk.write(3 * BLOCK, 1).await.unwrap();
    disk.close().await.unwrap();
}

fn on_sim(work: impl AsyncFnOnce(&Sim)) {
    let sim = Sim::new(1, SimConfig::calm());
    sim.block_on(work(&sim));
}

#[test]
fn a_clean_close_keeps_exact_bits_and_states() {
    on_sim(async |sim| {
        prepare(sim).await;
        for _ in 0..3 {
            let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
            let daily = disk.bitmap("daily");
            assert_eq!((daily.count, daily.recovered_bytes), (BLOCK, None));
            assert!(daily.persistent && daily.recording && !disk.bitmap("off").recording);
            assert_eq!(disk.bitmap("off").count, 0);
            disk.close().await.unwrap();
        }
    });
}

/// Another program writes to the image between two sessions.
#[test]
fn what_another_program_has_changed_is_dirty() {
    on_sim(async |sim| {
        prepare(sim).await;
        write(sim, IMAGE, 40 * BLOCK, vec![9; 512]).await;
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        assert_eq!(disk.dirty("daily"), std::slice::from_ref(&(0..LEN)));
        assert_eq!(disk.bitmap("daily").recovered_bytes, Some(LEN - BLOCK));
        assert_eq!(disk.bitmap("off").count, 0, "it records nothing, so it misses nothing");
        disk.node.clear_bitmap("daily").await.unwrap();
        disk.close().await.unwrap();
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        assert_eq!(disk.bitmap("daily").count, 0);
        disk.close().await.unwrap();
    });
}

/// The sidecar of one image beside another one.
#[test]
fn bitmaps_of_another_image_are_all_dirty() {
    on_sim(async |sim| {
        prepare(sim).await;
        file(sim, "copy").set_len(LEN).await.unwrap();
        write(sim, "copy.bds-cbt", 0, sim.snapshot_file(LOG)).await;
        let disk = Disk::open(sim.fs(), options("raw", "copy")).await.unwrap();
        assert_eq!(disk.dirty("daily"), std::slice::from_ref(&(0..LEN)));
        disk.close().await.unwrap();
    });
}

#[test]
fn without_a_sidecar_there_are_no_bitmaps() {
    on_sim(async |sim| {
        prepare(sim).await;
        sim.fs().remove(Path::new(LOG)).unwrap();
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        assert!(disk.node.bitmaps().is_empty());
        disk.close().await.unwrap();
    });
}

/// Nothing is created before a bitmap is added, nothing is left after the last one was removed, and
/// `off` keeps none.
#[test]
fn the_sidecar_comes_and_goes_with_the_bitmaps() {
    let is_there = |sim: &Sim| sim.fs().stat(Path::new(LOG)).is_ok();
    on_sim(async |sim| {
        file(sim, IMAGE).set_len(LEN).await.unwrap();
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        disk.write(0, 1).await.unwrap();
        assert!(disk.node.stores_bitmaps() && !is_there(sim));
        disk.node.add_bitmap(persistent("daily")).await.unwrap();
        assert!(is_there(sim));
        disk.node.remove_bitmap("daily").await.unwrap();
        disk.close().await.unwrap();
        assert!(!is_there(sim));
        prepare(sim).await;
        assert!(is_there(sim));
        // In a session that changes nothing else.
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        disk.node.remove_bitmap("daily").await.unwrap();
        disk.node.remove_bitmap("off").await.unwrap();
        disk.close().await.unwrap();
        assert!(!is_there(sim));
        let none = options("raw", IMAGE).with("bitmap-file", "off");
        let disk = Disk::open(sim.fs(), none).await.unwrap();
        assert!(!disk.node.stores_bitmaps());
        let refused = disk.node.add_bitmap(persistent("daily")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        disk.close().await.unwrap();
    });
}

/// Files that are no log are left alone: refused if they were named, passed over otherwise.
#[test]
fn files_that_are_no_log_are_not_overwritten() {
    on_sim(async |sim| {
        file(sim, IMAGE).set_len(LEN).await.unwrap();
        let other: Vec<u8> = (0..9000).map(|n| (n % 251) as u8).collect();
        write(sim, LOG, 0, other.clone()).await;
        let named = options("raw", IMAGE).with("bitmap-file", LOG);
        let error = Disk::open(sim.fs(), named).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.to_string().contains(LOG), "{error}");
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        assert!(disk.node.bitmaps().is_empty());
        disk.write(0, 1).await.unwrap();
        let refused = disk.node.add_bitmap(persistent("daily")).await;
        let _closed = disk.close().await;
        assert!(refused.is_err());
        assert_eq!(sim.snapshot_file(LOG), other);
    });
}

/// Damage of every kind: an error or nothing, or bitmaps that have at least what is dirty.
#[test]
fn a_damaged_sidecar_is_never_believed() {
    on_sim(async |sim| {
        prepare(sim).await;
        let whole = sim.snapshot_file(LOG);
        for at in (0..whole.len()).step_by(211).chain([0, 8, 4096, 8192]) {
            for is_cut in [false, true] {
                let case = format!("byte {at}, cut {is_cut}");
                let mut bytes = whole.clone();
                match is_cut {
                    true => bytes.truncate(at),
                    false => bytes[at] ^= 0x41,
                }
                let inner = sim.fork(2);
                inner.fs().remove(Path::new(LOG)).unwrap();
                inner.block_on(async {
                    write(&inner, LOG, 0, bytes).await;
                    let disk = Disk::open(inner.fs(), options("raw", IMAGE)).await.unwrap();
                    if let Some(id) = disk.node.find_bitmap("daily") {
                        assert_eq!(id.node(), disk.node.id());
                        let bits = disk.node.copy_bitmap("daily").unwrap();
                        assert!(bits.is_dirty(3 * BLOCK), "{case}");
                    }
                    disk.close().await.unwrap();
                });
            }
        }
    });
}

/// Two nodes cannot keep their bitmaps in one file.
#[test]
fn one_writer_at_a_time() {
    on_sim(async |sim| {
        prepare(sim).await;
        file(sim, "other").set_len(LEN).await.unwrap();
        let first = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        first.write(0, 1).await.unwrap();
        let second = options("raw", "other").with("bitmap-file", LOG);
        let second = Disk::open(sim.fs(), second).await.unwrap();
        let refused = second.node.add_bitmap(persistent("more")).await.unwrap_err();
        assert!(refused.to_string().contains("used by another"), "{refused}");
        let _closed = second.close().await;
        first.close().await.unwrap();
    });
}

/// The option cannot change while the image is open.
#[test]
fn the_option_is_parsed() {
    on_sim(async |sim| {
        file(sim, IMAGE).set_len(LEN).await.unwrap();
        let empty = options("raw", IMAGE).with("bitmap-file", "");
        let error = Disk::open(sim.fs(), empty).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let disk = Disk::open(sim.fs(), options("raw", IMAGE)).await.unwrap();
        let change = |value: &str| Options::new().with("bitmap-file", value);
        assert!(disk.graph.reopen(&disk.node, change("auto")).await.is_ok());
        let refused = disk.graph.reopen(&disk.node, change("off")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        disk.close().await.unwrap();
    });
}
