//! Tests of copy-on-read over qcow2 chains: what is copied to which layer, and what `bottom` excludes. The sweeps
//! (`sweep/`) inject faults into it.

use bds_core::driver::{Access, Perm, StatusFlags, WriteFlags};
use bds_core::graph::walk;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Result};
use serde_json::{Value, json};

use crate::house::House;
use crate::sweep::rig::{Kind, World};

const CLUSTER: u64 = 4096;

/// A disk with `base` (80 KiB), and the overlay `disk` on it.
fn world() -> (World, House) {
    let sim = bds_io::Sim::new(1, bds_io::SimConfig::default());
    let world = World::Sim(sim.clone());
    world.make(&Kind::qcow2("disk", CLUSTER).sized(CLUSTER * 32, CLUSTER * 32).backed(80 << 10));
    let graph = world.graph();
    (world, House { sim, graph })
}

fn image() -> Value {
    json!({
        "driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "/disks/disk"},
    })
}

/// Is all of the range allocated in the layer `node` itself?
fn is_held(house: &House, node: &str, offset: u64, len: u64) -> bool {
    let node = house.graph.find(node).unwrap();
    let options =
        BackendOptions { name: "look".into(), writable: false, ..BackendOptions::default() };
    let layer = Backend::new(&node, options).unwrap();
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let run = house.sim.block_on(layer.layer_status(at, end - at, false)).unwrap();
        if !run.flags.contains(StatusFlags::ALLOCATED) {
            return false;
        }
        at += run.len;
    }
    true
}

#[test]
fn what_is_read_is_kept_in_whole_clusters() {
    let (_world, house) = world();
    let plain = house.backend(image()).unwrap();
    let expected = house.read(&plain, 0, 32 * 4096).unwrap();
    drop(plain);
    house.sim.block_on(house.graph.reap());
    let disk = house.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
    assert_eq!(house.read(&disk, 5000, 100).unwrap(), expected[5000..5100]);
    assert!(is_held(&house, "disk", CLUSTER, CLUSTER));
    assert!(!is_held(&house, "disk", 0, 1) && !is_held(&house, "disk", 2 * CLUSTER, 1));
    house.sim.block_on(disk.copy_up(0, 32 * CLUSTER)).unwrap();
    assert!(is_held(&house, "disk", 0, 80 << 10));
    assert_eq!(house.read(&disk, 0, 32 * 4096).unwrap(), expected);
    house.write(&disk, 100, &[7; 50]).unwrap();
    assert_eq!(house.read(&disk, 100, 50).unwrap(), [7; 50]);
}

#[test]
fn the_switch_of_a_node_does_the_same_without_a_filter() {
    let (_world, house) = world();
    let disk = house.backend(image()).unwrap();
    house.read(&disk, 0, 4096).unwrap();
    assert!(!is_held(&house, "disk", 0, CLUSTER));
    let guard = disk.node().unwrap().enable_copy_on_read().unwrap();
    house.read(&disk, 0, 4096).unwrap();
    assert!(is_held(&house, "disk", 0, CLUSTER));
    drop(guard);
    house.read(&disk, CLUSTER, 4096).unwrap();
    assert!(!is_held(&house, "disk", CLUSTER, CLUSTER));
}

#[test]
fn below_bottom_nothing_is_taken() {
    let (world, house) = world();
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
    world.block_on(house.graph.create_image(top)).unwrap();
    let middle = house.backend(image()).unwrap();
    house.write(&middle, 3 * CLUSTER, &[9; 8192]).unwrap();
    let expected = house.read(&middle, 0, 32 * 4096).unwrap();
    drop(middle);
    house.sim.block_on(house.graph.reap());
    let open = |bottom: &str| -> Result<Backend> {
        let mut backing = image();
        backing["read-only"] = json!(true);
        let file = json!({"driver": "file", "filename": "/disks/top"});
        house.backend(json!({
            "driver": "copy-on-read", "bottom": bottom,
            "file": {"driver": "qcow2", "node-name": "top", "file": file, "backing": backing},
        }))
    };
    let disk = open("disk").unwrap();
    assert_eq!(house.read(&disk, 0, 32 * 4096).unwrap(), expected);
    assert!(is_held(&house, "top", 3 * CLUSTER, 2 * CLUSTER));
    assert!(!is_held(&house, "top", 2 * CLUSTER, 1) && !is_held(&house, "top", 5 * CLUSTER, 1));
    drop(disk);
    house.sim.block_on(house.graph.reap());
    let error = open("elsewhere").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let text = error.to_string();
    assert!(text.contains("'bottom'") && text.contains("'elsewhere'"), "{text}");
    assert_eq!(house.graph.nodes().len(), 0);
}

#[test]
fn the_file_must_be_writable_and_the_filter_need_not_be() {
    let (_world, house) = world();
    let options = json!({"driver": "copy-on-read", "read-only": true, "file": image()});
    let error = house.node(options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("read-only=off"), "{error}");
    let mut file = image();
    file["read-only"] = json!(false);
    let options = json!({"driver": "copy-on-read", "read-only": true, "file": file});
    let disk = house.backend(options).unwrap();
    assert!(!disk.node().unwrap().is_writable());
    house.read(&disk, 0, 100).unwrap();
    assert!(is_held(&house, "disk", 0, CLUSTER));
}

/// The option takes its own permission, so no parent has to write.
#[test]
fn a_reader_may_switch_it_on_unless_somebody_minds() {
    let (_world, house) = world();
    let node = house.node(image()).unwrap();
    let options =
        BackendOptions { name: "reader".into(), writable: false, ..BackendOptions::default() };
    let disk = Backend::new(&node, options).unwrap();
    let guard = node.enable_copy_on_read().unwrap();
    house.read(&disk, 0, 100).unwrap();
    assert!(is_held(&house, "disk", 0, CLUSTER));
    drop(guard);
    let alone = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
    let _job = house.graph.attach_job(&node, "snapshot", alone).unwrap();
    let error = node.enable_copy_on_read().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("snapshot") && !node.copies_on_read(), "{error}");
}

#[test]
fn an_inactive_image_is_only_read() {
    let (_world, house) = world();
    let disk = house.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
    let node = disk.node().unwrap();
    drop(disk);
    let reader =
        BackendOptions { name: "reader".into(), writable: false, ..BackendOptions::default() };
    let disk = Backend::new(&node, reader).unwrap();
    house.sim.block_on(house.graph.inactivate(&node)).unwrap();
    house.read(&disk, 0, 100).unwrap();
    assert!(!is_held(&house, "disk", 0, 1));
    house.sim.block_on(house.graph.activate(&node)).unwrap();
    house.read(&disk, 0, 100).unwrap();
    assert!(is_held(&house, "disk", 0, CLUSTER));
}

/// A filter on a filter: the status finds the image through both.
#[test]
fn filters_may_lie_in_between() {
    let (_world, house) = world();
    let debug = json!({"driver": "blkdebug", "image": image()});
    let disk = house.backend(json!({"driver": "copy-on-read", "file": debug})).unwrap();
    house.read(&disk, 0, 4096).unwrap();
    assert!(is_held(&house, "disk", 0, CLUSTER));
    assert!(!is_held(&house, "disk", CLUSTER, 1));
    let below = walk::skip_filters(&disk.node().unwrap());
    assert_eq!(below.name(), "disk");
}

/// A read is dropped while its copy runs, and a write to the same place starts at once: the old bytes must not
/// overwrite it.
#[test]
fn a_copy_that_nobody_waits_for_does_not_overwrite_the_guest() {
    for seed in 0..300 {
        let (world, _) = world();
        let World::Sim(base) = &world else { unreachable!("made above") };
        let sim = base.fork(seed);
        let graph = World::Sim(sim.clone()).graph();
        let house = House { sim, graph };
        let disk = house.backend(json!({"driver": "copy-on-read", "file": image()})).unwrap();
        house.sim.block_on(async {
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
        house.sim.run_until_idle();
        assert!(house.read(&disk, CLUSTER, 12288).unwrap() == [0xaa; 12288], "seed {seed}");
    }
}
