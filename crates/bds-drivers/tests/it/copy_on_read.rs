//! Tests of copy-on-read over qcow2 chains: what is copied to which layer, and what `bottom`
//! excludes. The sweeps (`sweep/`) inject faults into it.

use bds_core::driver::{Access, Perm, Precision, StatusFlags, WriteFlags};
use bds_core::graph::walk;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Result};
use serde_json::{Value, json};

use crate::kit::{Fixture, ImageKind, TestEnv};

const CLUSTER: u64 = 4096;

/// A disk with `base` (80 KiB), and the overlay `disk` on it.
fn env() -> (TestEnv, Fixture) {
    let sim = bds_io::Sim::new(1, bds_io::SimConfig::default());
    let env = TestEnv::Sim(sim.clone());
    env.make(&ImageKind::qcow2("disk", CLUSTER).sized(CLUSTER * 32, CLUSTER * 32).backed(80 << 10));
    let graph = env.graph();
    (env, Fixture { sim, graph })
}

fn image() -> Value {
    json!({
        "driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "/disks/disk"},
    })
}

/// Is all of the range allocated in the layer `node` itself?
fn is_allocated(fixture: &Fixture, node: &str, offset: u64, len: u64) -> bool {
    let node = fixture.graph.find(node).unwrap();
    let options =
        BackendOptions { name: "look".into(), writable: false, ..BackendOptions::default() };
    let layer = Backend::new(&node, options).unwrap();
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let run = fixture.sim.block_on(layer.layer_status(at, end - at, Precision::Cheap)).unwrap();
        if !run.flags.contains(StatusFlags::ALLOCATED) {
            return false;
        }
        at += run.len;
    }
    true
}

#[test]
fn reads_copy_whole_clusters() {
    let (_env, fixture) = env();
    let plain = fixture.backend(image()).unwrap();
    let expected = fixture.read(&plain, 0, 32 * 4096).unwrap();
    drop(plain);
    fixture.sim.block_on(fixture.graph.reap());
    let disk = fixture.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
    assert_eq!(fixture.read(&disk, 5000, 100).unwrap(), expected[5000..5100]);
    assert!(is_allocated(&fixture, "disk", CLUSTER, CLUSTER));
    assert!(
        !is_allocated(&fixture, "disk", 0, 1) && !is_allocated(&fixture, "disk", 2 * CLUSTER, 1)
    );
    fixture.sim.block_on(disk.copy_up(0, 32 * CLUSTER)).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, 80 << 10));
    assert_eq!(fixture.read(&disk, 0, 32 * 4096).unwrap(), expected);
    fixture.write(&disk, 100, &[7; 50]).unwrap();
    assert_eq!(fixture.read(&disk, 100, 50).unwrap(), [7; 50]);
}

#[test]
fn enable_copy_on_read_copies_without_a_filter() {
    let (_env, fixture) = env();
    let disk = fixture.backend(image()).unwrap();
    fixture.read(&disk, 0, 4096).unwrap();
    assert!(!is_allocated(&fixture, "disk", 0, CLUSTER));
    let guard = disk.node().unwrap().enable_copy_on_read().unwrap();
    fixture.read(&disk, 0, 4096).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, CLUSTER));
    drop(guard);
    fixture.read(&disk, CLUSTER, 4096).unwrap();
    assert!(!is_allocated(&fixture, "disk", CLUSTER, CLUSTER));
}

#[test]
fn data_below_bottom_is_not_copied() {
    let (env, fixture) = env();
    // disk becomes the middle of three.
    let top = bds_core::graph::NewImage {
        format: "qcow2".into(),
        path: "/disks/top".into(),
        options: bds_core::Options::from_json(
            json!({"cluster_size": CLUSTER, "backing_file": "disk", "backing_fmt": "qcow2"}),
        )
        .unwrap(),
        skip_backing: false,
    };
    env.block_on(fixture.graph.create_image(top)).unwrap();
    let middle = fixture.backend(image()).unwrap();
    fixture.write(&middle, 3 * CLUSTER, &[9; 8192]).unwrap();
    let expected = fixture.read(&middle, 0, 32 * 4096).unwrap();
    drop(middle);
    fixture.sim.block_on(fixture.graph.reap());
    let open = |bottom: &str| -> Result<Backend> {
        let mut backing = image();
        backing["read-only"] = json!(true);
        let file = json!({"driver": "file", "filename": "/disks/top"});
        fixture.backend(json!({
            "driver": "copy-on-read", "bottom": bottom,
            "file": {"driver": "qcow2", "node-name": "top", "file": file, "backing": backing},
        }))
    };
    let disk = open("disk").unwrap();
    assert_eq!(fixture.read(&disk, 0, 32 * 4096).unwrap(), expected);
    assert!(is_allocated(&fixture, "top", 3 * CLUSTER, 2 * CLUSTER));
    assert!(
        !is_allocated(&fixture, "top", 2 * CLUSTER, 1)
            && !is_allocated(&fixture, "top", 5 * CLUSTER, 1)
    );
    drop(disk);
    fixture.sim.block_on(fixture.graph.reap());
    let error = open("elsewhere").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let text = error.to_string();
    assert!(text.contains("'bottom'") && text.contains("'elsewhere'"), "{text}");
    assert_eq!(fixture.graph.nodes().len(), 0);
}

#[test]
fn the_file_must_be_writable_but_the_filter_may_be_read_only() {
    let (_env, fixture) = env();
    let options = json!({"driver": "copy-on-read", "read-only": true, "file": image()});
    let error = fixture.node(options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("read-only=off"), "{error}");
    let mut file = image();
    file["read-only"] = json!(false);
    let options = json!({"driver": "copy-on-read", "read-only": true, "file": file});
    let disk = fixture.backend(options).unwrap();
    assert!(!disk.node().unwrap().is_writable());
    fixture.read(&disk, 0, 100).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, CLUSTER));
}

/// The option takes its own permission, so no parent has to write.
#[test]
fn a_reader_may_enable_copy_on_read_unless_writes_are_unshared() {
    let (_env, fixture) = env();
    let node = fixture.node(image()).unwrap();
    let options =
        BackendOptions { name: "reader".into(), writable: false, ..BackendOptions::default() };
    let disk = Backend::new(&node, options).unwrap();
    let guard = node.enable_copy_on_read().unwrap();
    fixture.read(&disk, 0, 100).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, CLUSTER));
    drop(guard);
    let alone = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
    let _job = fixture.graph.attach_job(&node, "snapshot", alone).unwrap();
    let error = node.enable_copy_on_read().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("snapshot") && !node.copies_on_read(), "{error}");
}

#[test]
fn nothing_is_copied_into_an_inactive_image() {
    let (_env, fixture) = env();
    let disk = fixture.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
    let node = disk.node().unwrap();
    drop(disk);
    let reader =
        BackendOptions { name: "reader".into(), writable: false, ..BackendOptions::default() };
    let disk = Backend::new(&node, reader).unwrap();
    fixture.sim.block_on(fixture.graph.inactivate(&node)).unwrap();
    fixture.read(&disk, 0, 100).unwrap();
    assert!(!is_allocated(&fixture, "disk", 0, 1));
    fixture.sim.block_on(fixture.graph.activate(&node)).unwrap();
    fixture.read(&disk, 0, 100).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, CLUSTER));
}

/// A filter on a filter: the status finds the image through both.
#[test]
fn copy_on_read_works_through_other_filters() {
    let (_env, fixture) = env();
    let debug = json!({"driver": "blkdebug", "image": image()});
    let disk = fixture.backend(json!({"driver": "copy-on-read", "file": debug})).unwrap();
    fixture.read(&disk, 0, 4096).unwrap();
    assert!(is_allocated(&fixture, "disk", 0, CLUSTER));
    assert!(!is_allocated(&fixture, "disk", CLUSTER, 1));
    let below = walk::skip_filters(&disk.node().unwrap());
    assert_eq!(below.name(), "disk");
}

/// A read is dropped while its copy runs, and a write to the same place starts at once: the old
/// bytes must not overwrite it.
#[test]
fn a_dropped_copy_does_not_overwrite_a_later_write() {
    for seed in 0..300 {
        let (env, _) = env();
        let TestEnv::Sim(base) = &env else { unreachable!("made above") };
        let sim = base.fork(seed);
        let graph = TestEnv::Sim(sim.clone()).graph();
        let fixture = Fixture { sim, graph };
        let disk = fixture.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
        fixture.sim.block_on(async {
            let mut reading = Box::pin(disk.read(CLUSTER, bds_io::Buf::zeroed(12288, 1).iov()));
            for _ in 0..seed % 60 {
                if futures_util::poll!(reading.as_mut()).is_ready() {
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(reading);
            let bytes = vec![0xaa; 12288];
            disk.write(CLUSTER, bytes.into(), WriteFlags::empty()).await.unwrap();
        });
        fixture.sim.run_until_idle();
        assert!(fixture.read(&disk, CLUSTER, 12288).unwrap() == [0xaa; 12288], "seed {seed}");
    }
}
