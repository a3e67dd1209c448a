//! What is refused, before anything is written; what an open node does with the new options.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bds_core::driver::{AmendControl, Amendment, WriteFlags};
use bds_core::graph::{BitmapOptions, NewImage};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Tool, qemu_img, qemu_io};
use serde_json::json;

use super::{HostImage, IMAGE, amendment, close, contents, format_data, graph, open};
use crate::kit::filled;

/// An image of version 2 whose snapshots have no extra data, as programs before QEMU 1.1 wrote
/// them.
pub(super) fn without_extra_data(img: &Tool, io: &Tool) -> HostImage {
    let host = HostImage::new(img, "compat=0.10,cluster_size=4096", "384k");
    host.io(io, &["write -P 1 0 40k", "write -P 2 100k 60k"]);
    host.snapshot(img, "one");
    host.io(io, &["write -P 3 10k 40k"]);
    host.snapshot(img, "two");
    let mut bytes = std::fs::read(host.image()).unwrap();
    let be = |bytes: &[u8], at: usize, len: usize| {
        bytes[at..at + len].iter().fold(0usize, |n, byte| n << 8 | usize::from(*byte))
    };
    let (count, start) = (be(&bytes, 60, 4), be(&bytes, 64, 8));
    let (mut at, mut table) = (start, Vec::new());
    for _ in 0..count {
        let (names, extra) =
            (be(&bytes, at + 12, 2) + be(&bytes, at + 14, 2), be(&bytes, at + 36, 4));
        table.extend(&bytes[at..at + 36]);
        table.extend([0; 4]);
        let end = at + 40 + extra + names;
        table.extend(&bytes[at + 40 + extra..end]);
        table.resize(table.len().next_multiple_of(8), 0);
        at = end.next_multiple_of(8);
    }
    table.resize(at - start, 0);
    bytes.resize(bytes.len().max(at), 0);
    bytes[start..at].copy_from_slice(&table);
    std::fs::write(host.image(), bytes).unwrap();
    host
}

fn image(create: &str) -> Sim {
    let sim = Sim::new(7, SimConfig::calm());
    sim.block_on(async {
        let graph = graph(&sim);
        let options = Options::parse(create).unwrap();
        let image =
            NewImage { format: "qcow2".into(), path: IMAGE.into(), options, skip_backing: true };
        graph.create_image(image).await.unwrap();
        graph.shutdown().await.check_leaks().unwrap();
    });
    sim
}

#[test]
fn snapshots_of_version_2_get_a_disk_length() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let host = without_extra_data(&img, &io);
    let before = ["one", "two"].map(|name| host.read(&img, Some(name)));
    let sim = host.sim(1);
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        let error = disk.amend(amendment("size=512k")).await.unwrap_err();
        assert!(error.to_string().contains("amend -o compat=1.1"), "{error}");
        disk.amend(amendment("compat=1.1,size=512k")).await.unwrap();
        assert_eq!(disk.len(), 512 << 10);
        let report = disk.check(&|_, _| {}).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        close(&graph, disk).await;
    });
    let ours = HostImage::of_sim(&sim);
    let (code, report) = ours.check(&img);
    assert_eq!(code, 0, "{report}");
    for (name, before) in ["one", "two"].iter().zip(&before) {
        assert!(ours.read(&img, Some(name)).starts_with(before), "{name}");
    }
    img.must(["snapshot", "-a", "one", &ours.image()]);
    assert!(ours.read(&img, None) == before[0], "its length is that of before, too");
}

#[test]
fn nothing_is_written_before_everything_is_checked() {
    let sim = image("size=1M,cluster_size=4096");
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        let before = sim.snapshot_file(IMAGE);
        for (options, kind, words) in [
            ("refcount_bits=8,size=1000", ErrorKind::InvalidInput, "multiple of 512"),
            (
                "refcount_bits=8,compat=0.10",
                ErrorKind::InvalidInput,
                "Refcount widths other than 16",
            ),
            ("refcount_bits=8,size=512k", ErrorKind::NotSupported, "made shorter"),
            ("refcount_bits=8,size=8E", ErrorKind::OutOfRange, ""),
            ("lazy_refcounts=on,encrypt.format=luks", ErrorKind::InvalidInput, "image creation"),
        ] {
            let error = disk.amend(amendment(options)).await.unwrap_err();
            assert!(error.to_string().contains(words), "{options}: {error}");
            assert!(error.kind() == kind || words.is_empty(), "{options}: {error:?}");
        }
        assert_eq!(sim.snapshot_file(IMAGE), before);
        // What holds already is no change.
        disk.amend(amendment("compat=1.1,refcount_bits=16,lazy_refcounts=off")).await.unwrap();
        assert_eq!(sim.snapshot_file(IMAGE), before);

        let node = disk.node().unwrap();
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        let error = reader.amend(amendment("refcount_bits=8")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        let mem = graph.open(Options::parse("driver=mem,size=1M").unwrap()).await.unwrap();
        let mem = Backend::new(&mem, BackendOptions { writable: true, ..Default::default() });
        let error = mem.unwrap().amend(amendment("refcount_bits=8")).await.unwrap_err();
        assert!(error.to_string().contains("'mem' does not support option amendment"), "{error}");
    });
}

#[test]
fn options_of_the_open_node_must_fit_the_new_version() {
    let sim = image("size=1M,cluster_size=4096");
    sim.block_on(async {
        let graph = graph(&sim);
        let options = json!({
            "driver": "qcow2", "lazy-refcounts": true,
            "file": {"driver": "file", "filename": IMAGE},
        });
        let node = graph.open(Options::from_json(options).unwrap()).await.unwrap();
        let disk =
            Backend::new(&node, BackendOptions { writable: true, ..Default::default() }).unwrap();
        disk.write(0, filled(1, 8192), WriteFlags::empty()).await.unwrap();
        let error = disk.amend(amendment("compat=0.10")).await.unwrap_err();
        assert!(error.to_string().contains("lazy refcounts need"), "{error}");
        disk.amend(amendment("refcount_bits=64")).await.unwrap();
        disk.write(8192, filled(2, 8192), WriteFlags::empty()).await.unwrap();
        disk.flush().await.unwrap();
        assert!(disk.check(&|_, _| {}).await.unwrap().is_clean());
        drop(node);
        close(&graph, disk).await;
    });
}

#[test]
fn a_persistent_bitmap_in_memory_stands_against_version_2() {
    let sim = image("size=1M,cluster_size=4096");
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        let node = disk.node().unwrap();
        let options = BitmapOptions { persistent: true, ..BitmapOptions::named("b") };
        node.add_bitmap(options).await.unwrap();
        let error = disk.amend(amendment("compat=0.10")).await.unwrap_err();
        assert!(error.to_string().contains("remove them first"), "{error}");
        disk.amend(amendment("refcount_bits=8,size=2M")).await.unwrap();
        // Nothing was written by the guest.
        let info = node.bitmaps().into_iter().next().unwrap();
        assert_eq!(info.count, 1 << 20, "the new length alone: {info:?}");
        drop(node);
        close(&graph, disk).await;
    });
}

#[test]
fn the_disk_grows_last_and_reads_zeros_there() {
    for create in ["size=64k,cluster_size=4096", "size=64k,cluster_size=4096,compat=0.10"] {
        let sim = image(create);
        sim.block_on(async {
            let graph = graph(&sim);
            let disk = open(&graph, false).await.unwrap();
            disk.write(0, filled(1, 65536), WriteFlags::empty()).await.unwrap();
            disk.amend(amendment("compat=1.1,refcount_bits=32,size=128k")).await.unwrap();
            assert_eq!(disk.len(), 128 << 10);
            let bytes = contents(&disk).await;
            assert!(bytes[..65536].iter().all(|byte| *byte == 1));
            assert!(bytes[65536..].iter().all(|byte| *byte == 0));
            assert_eq!(format_data(&disk).await["refcount-bits"], 32);
            close(&graph, disk).await;
        });
    }
}

#[test]
fn progress_rises_to_its_total() {
    let sim = image("size=64M,cluster_size=512,compat=0.10");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let last = Arc::new(AtomicU64::new(0));
    sim.block_on(async {
        let graph = graph(&sim);
        let disk = open(&graph, false).await.unwrap();
        disk.write(0, filled(1, 4 << 20), WriteFlags::empty()).await.unwrap();
        let noted = Arc::clone(&seen);
        let control = AmendControl::new(move |done, total| {
            assert!(done <= total && done >= last.swap(done, Ordering::Relaxed));
            noted.lock().unwrap().push((done, total));
        });
        let options = Options::parse("compat=1.1,refcount_bits=64").unwrap();
        disk.amend(Amendment { options, control, ..Amendment::default() }).await.unwrap();
        close(&graph, disk).await;
    });
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 50, "{}", seen.len());
    let (done, total) = seen.last().unwrap();
    assert_eq!(done, total);
}
