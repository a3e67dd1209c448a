//! Rewrites the backing file that a qcow2 image records: limits, QEMU's view, power cuts, faults.

use bds_core::driver::{BackingRecord, WriteFlags};
use bds_core::graph::Graph;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::sim::{CutMode, Fault};
use bds_io::{Sim, SimConfig};
use bds_testkit::{Scratch, pattern, qemu_img};
use serde_json::{Value, json};

use crate::kit::{ImageKind, TestEnv, filled, sim_with_image};

const MODES: [CutMode; 5] =
    [CutMode::Random, CutMode::Reorder, CutMode::Tear, CutMode::LoseAll, CutMode::KeepAll];

type Recorded = (Option<String>, Option<String>);

fn kinds() -> Vec<ImageKind> {
    let q = |name, cluster| ImageKind::qcow2(name, cluster).sized(1 << 18, 1 << 19);
    vec![
        q("512", 512).version_2().backed(60_000),
        q("2k-backed", 2048).backed(60_000),
        q("4k-zstd-backed", 4096).create("compression_type", "zstd").backed(60_000),
        q("4k-v2", 4096).version_2().backed(60_000),
        q("64k-lazy", 65536).lazy().backed(60_000),
        q("4k-data", 4096).with_data_file(),
    ]
}

async fn open(graph: &Graph, read_only: bool) -> Result<Backend> {
    let options = json!({
        "driver": "qcow2", "node-name": "disk", "read-only": read_only, "backing": null,
        "file": {"driver": "file", "filename": "/disks/disk"},
    });
    let node = graph.open(Options::from_json(options)?).await?;
    let writable = !read_only;
    Backend::new(&node, BackendOptions { name: "user".into(), writable, ..Default::default() })
}

async fn recorded(disk: &Backend) -> Recorded {
    let info = disk.info().await.unwrap();
    (info.backing_file.map(|name| name.into_string().unwrap()), info.backing_format)
}

fn shown(record: Option<&BackingRecord>) -> Recorded {
    let name = |record: &BackingRecord| record.name.clone().into_string().unwrap();
    (record.map(name), record.and_then(|record| record.format.clone()))
}

/// Records in the order in which they are set.
fn records() -> Vec<Option<BackingRecord>> {
    let long = "l".repeat(700);
    vec![
        Some(BackingRecord::new("other.qcow2", Some("qcow2"))),
        None,
        Some(BackingRecord::new(long, Some("host_device"))),
        Some(BackingRecord::new("x", None)),
        None,
        Some(BackingRecord::new("base", Some("raw"))),
    ]
}

#[test]
fn qemu_sees_what_was_recorded() {
    let Some(img) = qemu_img() else { return };
    for kind in kinds() {
        let scratch = Scratch::new();
        let sim = sim_with_image(3, SimConfig::default(), &kind);
        let env = TestEnv::Sim(sim.clone());
        for record in records() {
            let graph = env.graph();
            let result = env.block_on(async {
                let disk = open(&graph, false).await.unwrap();
                disk.write(512, filled(7, 9000), WriteFlags::empty()).await.unwrap();
                let result = disk.set_backing_record(record.clone()).await;
                if result.is_ok() {
                    assert_eq!(recorded(&disk).await, shown(record.as_ref()));
                }
                drop(disk);
                graph.shutdown().await.check_leaks().unwrap();
                result
            });
            if let Err(error) = result {
                // A name of 700 bytes and a 512-byte cluster.
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{}: {error}", kind.name);
                assert!(kind.cluster < 4096, "{}", kind.name);
                continue;
            }
            let path = env.on_host("disk", &scratch);
            let info = img.must(["info", "--output=json", path.to_str().unwrap()]).json();
            let text = |key: &str| info.get(key).and_then(Value::as_str).map(str::to_owned);
            let seen = (text("backing-filename"), text("backing-filename-format"));
            assert_eq!(seen, shown(record.as_ref()), "{}", kind.name);
            if !kind.has_data_file {
                let file = format!("file.driver=file,file.filename={}", path.display());
                let image = format!("driver=qcow2,backing=,{file}");
                img.must(["check", "--image-opts", &image]);
            }
        }
    }
}

#[test]
fn a_power_cut_leaves_the_old_record_or_the_new() {
    let calm = SimConfig { short_io_rate: 0.0, ..SimConfig::default() };
    let mut cuts = 0;
    for kind in kinds() {
        let base = sim_with_image(5, calm.clone(), &kind);
        for (seed, record) in records().into_iter().enumerate() {
            for n in 0.. {
                let sim = base.fork(seed as u64);
                let graph = TestEnv::Sim(sim.clone()).graph();
                let disk = sim.block_on(open(&graph, false)).unwrap();
                let old = sim.block_on(recorded(&disk));
                let write = disk.write(512, filled(7, 9000), WriteFlags::empty());
                sim.block_on(write).unwrap();
                sim.cut_after_writes(Some(sim.writes() + n));
                let ended = sim.run_until_cut(disk.set_backing_record(record.clone()));
                let is_refused =
                    matches!(&ended, Some(Err(error)) if error.kind() == ErrorKind::NoSpace);
                sim.power_cut();
                let gone = sim.run_until_cut(async move {
                    let _held = (disk, graph);
                    std::future::pending::<()>().await;
                });
                assert!(gone.is_none());
                for mode in MODES {
                    let after = sim.after_cut_by(seed as u64 ^ n << 8, mode);
                    let what = format!("{} seed {seed} cut {n} {mode:?}", kind.name);
                    let found = after_cut(&after, ended.is_some() && !is_refused);
                    let is_new = found == shown(record.as_ref());
                    assert!(
                        is_new || ended.is_none() && found == old || is_refused,
                        "{what}: {found:?}"
                    );
                }
                cuts += 1;
                if ended.is_some() {
                    break;
                }
            }
        }
    }
    assert!(cuts > 100, "{cuts}");
}

/// The record on the disk after a cut; what was written before the record is there if it `ended`.
fn after_cut(after: &Sim, ended: bool) -> Recorded {
    let graph = TestEnv::Sim(after.clone()).graph();
    after.block_on(async {
        let disk = open(&graph, true).await.unwrap();
        let iov = filled(0, 9000);
        disk.read(512, iov.clone()).await.unwrap();
        if ended {
            let mut bytes = vec![0; 9000];
            iov.copy_to(0, &mut bytes);
            assert_eq!(bytes, vec![7; 9000], "the record got ahead of data");
        }
        let found = recorded(&disk).await;
        drop(disk);
        graph.shutdown().await.check_leaks().unwrap();
        found
    })
}

#[test]
fn a_failed_write_or_flush_leaves_the_old_record_or_the_new() {
    let kind = ImageKind::qcow2("4k", 4096).sized(1 << 18, 1 << 19).backed(60_000);
    let base = sim_with_image(6, SimConfig::calm(), &kind);
    let (mut failed, mut done) = (0, 0);
    for n in 0..40 {
        for fault in [Fault::once(5), Fault::once(28), Fault::sticky(5)] {
            let sim = base.fork(n);
            let graph = TestEnv::Sim(sim.clone()).graph();
            let disk = sim.block_on(open(&graph, false)).unwrap();
            let old = sim.block_on(recorded(&disk));
            sim.fail_nth(n, fault);
            let record = Some(BackingRecord::new("other", Some("qcow2")));
            let result = sim.block_on(disk.set_backing_record(record.clone()));
            sim.clear_faults();
            drop(disk);
            sim.block_on(graph.reap());
            let graph = TestEnv::Sim(sim.clone()).graph();
            let found = sim.block_on(async { recorded(&open(&graph, true).await.unwrap()).await });
            let is_new = found == shown(record.as_ref());
            match result {
                Ok(()) => assert!(is_new),
                Err(_) => assert!(is_new || found == old, "{n}: {found:?}"),
            }
            if result.is_ok() { done += 1 } else { failed += 1 }
        }
    }
    assert!(failed > 10 && done > 10, "{failed} {done}");
}

#[test]
fn what_breaks_a_rule_is_refused_before_anything_is_written() {
    let kind = ImageKind::qcow2("4k", 4096).sized(1 << 18, 1 << 19);
    let sim = sim_with_image(8, SimConfig::calm(), &kind);
    let graph = TestEnv::Sim(sim.clone()).graph();
    let record = |name: &str, format: Option<&str>| Some(BackingRecord::new(name, format));
    sim.block_on(async {
        let disk = open(&graph, false).await.unwrap();
        let before = sim.snapshot_file("/disks/disk");
        let refused = [
            (record("", None), ErrorKind::InvalidInput),
            (record("a\0b", None), ErrorKind::InvalidInput),
            (record(&"n".repeat(1024), None), ErrorKind::InvalidInput),
            (record("base", Some("")), ErrorKind::InvalidInput),
            (record("base", Some("a-format-of-16-b")), ErrorKind::InvalidInput),
        ];
        for (record, kind) in refused {
            let check = disk.check_backing_record(record.clone()).await.unwrap_err();
            let error = disk.set_backing_record(record).await.unwrap_err();
            assert_eq!((error.kind(), check.kind()), (kind, kind), "{error}");
        }
        assert_eq!(sim.snapshot_file("/disks/disk"), before);
        let longest = record(&"n".repeat(1023), Some("123456789012345"));
        disk.check_backing_record(longest.clone()).await.unwrap();
        assert_eq!(sim.snapshot_file("/disks/disk"), before, "a check writes nothing");
        disk.set_backing_record(longest.clone()).await.unwrap();
        assert_eq!(recorded(&disk).await, shown(longest.as_ref()));

        let options = BackendOptions { name: "reader".into(), ..Default::default() };
        let reader = Backend::new(&disk.node().unwrap(), options).unwrap();
        let error: Error = reader.set_backing_record(None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let raw = graph.open(Options::parse("driver=mem,size=1M").unwrap()).await.unwrap();
        let raw =
            Backend::new(&raw, BackendOptions { writable: true, ..Default::default() }).unwrap();
        let error = raw.set_backing_record(None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
    });
}

#[test]
fn guest_writes_go_on_meanwhile() {
    let kind = ImageKind::qcow2("4k-tiny-cache", 4096)
        .sized(1 << 20, 1 << 20)
        .open("l2-cache-size", 8192)
        .backed(60_000);
    for seed in 0..20 {
        let sim = sim_with_image(seed, SimConfig::default(), &kind);
        let graph = TestEnv::Sim(sim.clone()).graph();
        sim.block_on(async {
            let disk = open(&graph, false).await.unwrap();
            let writes = async {
                for at in (0..1 << 20).step_by(20_480) {
                    let bytes = bds_io::Buf::from_slice(&pattern(seed, at, 4096)).iov();
                    disk.write(at, bytes, WriteFlags::empty()).await.unwrap();
                }
            };
            let record = async {
                for n in 0..8 {
                    let record = BackingRecord::new(format!("base{n}"), Some("raw"));
                    disk.set_backing_record(Some(record)).await.unwrap();
                }
            };
            futures_util::future::join(writes, record).await;
            disk.flush().await.unwrap();
            let report = disk.check(&|_, _| {}).await.unwrap();
            assert!(report.is_clean(), "seed {seed}: {report:?}");
            assert_eq!(recorded(&disk).await.0.as_deref(), Some("base7"));
            for at in (0..1 << 20).step_by(20_480) {
                let iov = filled(0, 4096);
                disk.read(at, iov.clone()).await.unwrap();
                let mut bytes = vec![0; 4096];
                iov.copy_to(0, &mut bytes);
                assert_eq!(bytes, pattern(seed, at, 4096), "seed {seed} at {at}");
            }
        });
    }
}
