//! The note of what a backing file showed: which bases are refused, which are not, and crashes
//! while it is written.

use bds_core::driver::OpenFlags;
use bds_core::graph::NodeRef;
use bds_core::options::Options;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Result};
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};
use bds_io::sim::CutMode;
use bds_io::{Sim, SimConfig};

use super::harness::{BASE, IMAGE, base_bytes, graph, options};

const LEN: u64 = 4 << 20;
/// Byte of `autoclear_features` with bit 61.
const BIT_AT: usize = 88;

/// An overlay of a raw base; its file.
fn unmarked(sim: &Sim) -> Vec<u8> {
    make(sim, 65536);
    sim.snapshot_file(IMAGE)
}

fn make(sim: &Sim, cluster: u64) {
    sim.put_file(BASE, &base_bytes(LEN));
    let file = MemPort::default();
    let wanted = Options::new()
        .with("size", LEN)
        .with("cluster_size", cluster)
        .with("backing_file", BASE)
        .with("backing_fmt", "raw");
    fuzzing::create(wanted, &file, None).unwrap();
    sim.put_file(IMAGE, &file.bytes());
}

/// As [`unmarked`], with the note.
fn marked(sim: &Sim, cluster: u64) -> Vec<u8> {
    make(sim, cluster);
    sim.block_on(async {
        let graph = graph(sim);
        let node = graph.open(options()).await.unwrap();
        let is_marked = writer(&node).mark_base().await.unwrap();
        assert!(is_marked);
        node.close().await.unwrap().into_result().unwrap();
        graph.shutdown().await.check_leaks().unwrap();
    });
    sim.snapshot_file(IMAGE)
}

fn writer(node: &NodeRef) -> Backend {
    Backend::new(node, BackendOptions { writable: true, ..Default::default() }).unwrap()
}

/// Opens the overlay read-only, and closes it.
fn open(sim: &Sim, more: &[(&'static str, bool)], flags: OpenFlags) -> Result<bool> {
    let graph = graph(sim);
    sim.block_on(async {
        let wanted = more.iter().fold(options(), |options, (key, value)| options.with(key, *value));
        let opened = graph.open_with(wanted, OpenFlags { read_only: true, ..flags }).await;
        let info = match &opened {
            Ok(node) => {
                let reader = Backend::new(node, BackendOptions::default()).unwrap();
                Ok(reader.info().await.unwrap().marks_base)
            }
            Err(error) => Err(error.duplicate()),
        };
        drop(opened);
        graph.shutdown().await.check_leaks().unwrap();
        info
    })
}

fn plainly(sim: &Sim) -> Result<bool> {
    open(sim, &[], OpenFlags::default())
}

fn world() -> Sim {
    Sim::new(1, SimConfig::calm())
}

#[test]
fn a_wrong_base_under_the_right_name_is_refused() {
    let sim = world();
    marked(&sim, 512);
    assert!(plainly(&sim).unwrap(), "also in the smallest cluster");
    let sim = world();
    marked(&sim, 65536);
    assert!(plainly(&sim).unwrap(), "the right one is taken");
    let mut grown = base_bytes(LEN);
    grown.resize(grown.len() + 4096, 7);
    let mut booted = base_bytes(LEN);
    booted[(1 << 20) + 1024 + 48] ^= 1; // a superblock's time of the last mount
    let other: Vec<u8> = base_bytes(LEN).iter().map(|byte| byte.wrapping_add(1)).collect();
    for (base, words) in [
        (grown, None),
        (booted, Some("was written to after this overlay was made")),
        (other, Some("not what this overlay was made on")),
        (base_bytes(LEN / 2), Some("it has 2097152 bytes and had 4194304")),
    ] {
        sim.put_file(BASE, &base);
        let Some(words) = words else {
            assert!(plainly(&sim).is_ok(), "a base may grow");
            continue;
        };
        let error = plainly(&sim).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(text.contains(words), "{text}");
        assert!(text.contains(IMAGE) && text.contains(BASE), "both are named: {text}");
        // The user may know better.
        open(&sim, &[("backing-check", false)], OpenFlags::default()).unwrap();
        open(&sim, &[], OpenFlags { force_share: true, ..OpenFlags::default() }).unwrap();
        let no_backing = OpenFlags { info_only: true, ..OpenFlags::default() };
        open(&sim, &[], no_backing).unwrap();
        open(&sim, &[], OpenFlags { for_check: true, ..OpenFlags::default() }).unwrap();
    }
    sim.put_file(BASE, &base_bytes(LEN));
    assert!(plainly(&sim).unwrap(), "it is back");
}

#[test]
fn what_is_not_known_is_not_refused() {
    let sim = world();
    let image = marked(&sim, 65536);
    sim.put_file(BASE, &vec![0x77; usize::try_from(LEN).unwrap()]);
    plainly(&sim).unwrap_err();

    // Another writer cleared the bits it does not know.
    let mut cleared = image.clone();
    cleared[BIT_AT] &= !0x20;
    sim.put_file(IMAGE, &cleared);
    assert!(!plainly(&sim).unwrap());

    // A later version of the note, and two of them.
    let kind = 0x6264_7362_u32.to_be_bytes();
    let at = image.windows(4).position(|bytes| bytes == kind).unwrap();
    let mut later = image.clone();
    later[at + 11] = 9;
    sim.put_file(IMAGE, &later);
    assert!(!plainly(&sim).unwrap());
}

/// What is written above another base, or none, makes an overlay of that one.
#[test]
fn the_first_write_above_another_base_drops_the_note() {
    let other = || vec![0x77; usize::try_from(LEN).unwrap()];
    for (wanted, base, keeps) in [
        (options(), base_bytes(LEN), true),
        (options().with("backing-check", false), base_bytes(LEN), true),
        (options().with("backing-check", false), other(), false),
        // An overlay that is opened to be put above a disk in use.
        (options().with("backing", serde_json::Value::Null), base_bytes(LEN), false),
    ] {
        for writes in [false, true] {
            let sim = world();
            marked(&sim, 65536);
            sim.put_file(BASE, &base);
            sim.block_on(async {
                let graph = graph(&sim);
                let node = graph.open(wanted.clone()).await.unwrap();
                let disk = writer(&node);
                if writes {
                    disk.write_at(0, &[1; 512]).unwrap();
                }
                let marks = disk.info().await.unwrap().marks_base;
                assert_eq!(marks, keeps || !writes, "{wanted:?}");
                drop(disk);
                node.close().await.unwrap().into_result().unwrap();
                graph.shutdown().await.check_leaks().unwrap();
            });
            sim.put_file(BASE, &base_bytes(LEN));
            assert_eq!(plainly(&sim).unwrap(), keeps || !writes, "{wanted:?}");
        }
    }
}

#[test]
fn the_note_goes_with_the_recorded_name_and_by_itself() {
    for forgets in [false, true] {
        let sim = world();
        marked(&sim, 65536);
        sim.block_on(async {
            let graph = graph(&sim);
            let node = graph.open(options()).await.unwrap();
            let disk = writer(&node);
            // Written to by its own guest, it still notes the base.
            disk.write_at(0, &[1; 512]).unwrap();
            disk.flush().await.unwrap();
            assert!(disk.info().await.unwrap().marks_base);
            match forgets {
                true => disk.forget_base().await.unwrap(),
                false => {
                    let record = bds_core::driver::BackingRecord::new(BASE, Some("raw"));
                    disk.set_backing_record(Some(record)).await.unwrap();
                }
            }
            assert!(!disk.info().await.unwrap().marks_base);
            drop(disk);
            node.close().await.unwrap().into_result().unwrap();
            graph.shutdown().await.check_leaks().unwrap();
        });
        assert!(!plainly(&sim).unwrap());
        sim.put_file(BASE, &base_bytes(LEN / 2));
        plainly(&sim).unwrap();
    }
}

/// Power fails at every write of the note: the image opens, with the note or without.
#[test]
fn a_power_cut_leaves_the_note_or_none() {
    let (mut with, mut without) = (0, 0);
    let mut image = marked(&world(), 65536);
    // The extension is there without its bit, and the bytes where it lies are known to be used.
    image[BIT_AT] &= !0x20;
    for is_first in [true, false] {
        if is_first {
            // As made: without the extension.
            image = unmarked(&world());
        }
        for cut in 0.. {
            let sim = Sim::new(cut, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
            sim.put_file(BASE, &base_bytes(LEN));
            sim.put_file(IMAGE, &image);
            let graph = graph(&sim);
            let node = sim.block_on(graph.open(options())).unwrap();
            let disk = writer(&node);
            sim.cut_after_writes(Some(sim.writes() + cut));
            let ended = sim.run_until_cut(disk.mark_base());
            sim.power_cut();
            let gone = sim.run_until_cut(async move {
                let _held = (disk, node, graph);
                std::future::pending::<()>().await;
            });
            assert!(gone.is_none());
            for mode in [
                CutMode::KeepAll,
                CutMode::LoseAll,
                CutMode::Reorder,
                CutMode::Tear,
                CutMode::Random,
            ] {
                let after = sim.after_cut_by(cut, mode);
                let is_marked = plainly(&after).unwrap();
                assert!(is_marked || ended.is_none(), "it is durable when it returns");
                with += u32::from(is_marked);
                without += u32::from(!is_marked);
            }
            if ended.is_some() {
                break;
            }
        }
    }
    assert!(with > 3 && without > 3, "both: {with} and {without}");
}
