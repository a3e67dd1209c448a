//! Tests of the compress filter: writes become compressed clusters. The sweeps (`sweep/`) inject
//! faults into it.

use bds_core::driver::{Attempt, Precision, StatusFlags, WriteFlags, ZeroFlags};
use bds_core::graph::NewImage;
use bds_core::request::Backend;
use bds_core::{ErrorKind, Options};
use bds_io::{Sim, SimConfig};
use serde_json::{Value, json};

use crate::kit::Fixture;

const CLUSTER: u64 = 65536;
/// Ends inside a cluster.
const LEN: u64 = CLUSTER * 10 + 5 * 512;

fn image(fixture: &Fixture, create: Value) -> Value {
    let mut options = create;
    options["size"] = json!(LEN);
    let image = NewImage {
        format: "qcow2".into(),
        path: "/disks/disk".into(),
        options: Options::from_json(options).unwrap(),
        skip_backing: false,
    };
    fixture.sim.block_on(fixture.graph.create_image(image)).unwrap();
    let file = json!({"driver": "file", "filename": "/disks/disk"});
    json!({"driver": "compress", "file": {"driver": "qcow2", "node-name": "disk", "file": file}})
}

fn flags(fixture: &Fixture, disk: &Backend, offset: u64) -> StatusFlags {
    fixture.sim.block_on(disk.block_status(offset, 1, Precision::Cheap)).unwrap().flags
}

#[test]
fn writes_of_any_size_become_compressed_clusters() {
    let fixture = Fixture::new(1);
    let image = image(&fixture, json!({"compression_type": "zstd"}));
    let disk = fixture.backend(image).unwrap();
    assert_eq!(u64::from(disk.node().unwrap().limits().request_alignment), CLUSTER);
    let mut model = vec![0; usize::try_from(LEN).unwrap()];
    // Small, whole, over several, again, at the very end.
    for (at, len, byte) in [
        (100, 50, 1),
        (CLUSTER, 65536, 2),
        (CLUSTER * 3 + 7, 150_000, 3),
        (CLUSTER * 4 + 9, 100, 4),
        (LEN - 700, 700, 5),
        (LEN - 1, 1, 6),
    ] {
        fixture.write(&disk, at, &vec![byte; len]).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + len].fill(byte);
    }
    assert!(fixture.read(&disk, 0, model.len()).unwrap() == model);
    for cluster in [0, 1, 3, 4, 5, 10] {
        let flags = flags(&fixture, &disk, cluster * CLUSTER);
        assert!(flags.contains(StatusFlags::COMPRESSED), "cluster {cluster}: {flags:?}");
    }
    assert!(!flags(&fixture, &disk, 2 * CLUSTER).contains(StatusFlags::DATA));
    let report = fixture.sim.block_on(async {
        disk.flush().await.unwrap();
        let below = fixture.graph.find("disk").unwrap();
        let options = bds_core::request::BackendOptions::default();
        Backend::new(&below, options).unwrap().check(&|_, _| {}).await.unwrap()
    });
    assert!(report.is_clean() && report.compressed_clusters >= 6, "{report:?}");
}

#[test]
fn zero_writes_and_discards_pass_through() {
    let fixture = Fixture::new(2);
    let image = image(&fixture, json!({}));
    let disk = fixture.backend(image).unwrap();
    fixture.write(&disk, 0, &vec![7; usize::try_from(LEN).unwrap()]).unwrap();
    fixture.sim.block_on(async {
        for (at, len) in [(CLUSTER, CLUSTER), (CLUSTER * 3 + 1, CLUSTER), (LEN - 1000, 1000)] {
            let done = disk.write_zeroes(at, len, ZeroFlags::empty()).await.unwrap();
            assert_eq!(done, Attempt::Done);
        }
        disk.discard(CLUSTER * 6, CLUSTER).await.unwrap();
    });
    assert!(flags(&fixture, &disk, CLUSTER).contains(StatusFlags::ZERO));
    let bytes = fixture.read(&disk, 0, usize::try_from(LEN).unwrap()).unwrap();
    let zeros = |range: std::ops::Range<u64>| {
        range.clone().all(|at| bytes[usize::try_from(at).unwrap()] == 0)
    };
    assert!(zeros(CLUSTER..2 * CLUSTER) && zeros(CLUSTER * 3 + 1..CLUSTER * 4 + 1));
    assert!(zeros(LEN - 1000..LEN) && bytes[usize::try_from(LEN - 1001).unwrap()] == 7);
    assert_eq!(bytes[usize::try_from(CLUSTER * 3).unwrap()], 7);
}

#[test]
fn a_child_that_cannot_compress_is_refused_by_name() {
    let fixture = Fixture::new(3);
    let mem = json!({"driver": "mem", "node-name": "plain", "size": 65536});
    let error = fixture.node(json!({"driver": "compress", "file": mem})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    let text = error.to_string();
    assert!(text.contains("'plain' (mem)") && text.contains("qcow2"), "{text}");
    let with_data = image(&fixture, json!({"data_file": "/disks/data"}));
    let mut with_data = with_data;
    let data = json!({"driver": "file", "filename": "/disks/data"});
    with_data["file"]["data-file"] = data;
    let error = fixture.node(with_data).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
}

/// A write is dropped, and another one starts in the same cluster at once: the detached cluster
/// write must not undo it.
#[test]
fn a_dropped_write_does_not_overwrite_later_neighbours() {
    for seed in 0..200 {
        let fixture = Fixture::with(Sim::new(seed, SimConfig::default()));
        let image = image(&fixture, json!({}));
        let disk = fixture.backend(image).unwrap();
        fixture.write(&disk, 0, &[1; 4096]).unwrap();
        fixture.sim.block_on(async {
            let mut writing = Box::pin(disk.write(0, vec![2; 512].into(), WriteFlags::empty()));
            for _ in 0..seed % 50 {
                if futures_util::poll!(writing.as_mut()).is_ready() {
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(writing);
            disk.write(512, vec![3; 512].into(), WriteFlags::empty()).await.unwrap();
        });
        fixture.sim.run_until_idle();
        let bytes = fixture.read(&disk, 0, 4096).unwrap();
        assert!(bytes[512..1024] == [3; 512], "seed {seed}");
        assert!(bytes[..512] == [1; 512] || bytes[..512] == [2; 512], "seed {seed}: torn");
        assert!(bytes[1024..] == [1; 3072], "seed {seed}");
    }
}
