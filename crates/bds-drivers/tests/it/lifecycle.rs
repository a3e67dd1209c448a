//! Tests of the graph with real drivers: reopen, inactivate and activate, changes under load, and
//! close without a leak.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::driver::WriteFlags;
use bds_core::graph::{NewImage, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_io::{Buf, Sim, SimConfig};
use serde_json::{Value, json};

use crate::kit::Fixture;

const CLUSTER: u64 = 4096;
const LEN: u64 = 64 * CLUSTER;

/// A simulated disk with empty images of these names.
fn fixture(names: &[&str]) -> Fixture {
    let fixture = Fixture::with(Sim::new(3, SimConfig::default()));
    for name in names {
        let image = NewImage {
            format: "qcow2".into(),
            path: format!("/disks/{name}").into(),
            options: options(json!({"size": LEN, "cluster_size": CLUSTER})),
            skip_backing: true,
        };
        fixture.sim.block_on(fixture.graph.create_image(image)).unwrap();
    }
    fixture
}

fn image(name: &str) -> Value {
    json!({
        "driver": "qcow2", "node-name": name, "backing": null,
        "file": {"driver": "file", "node-name": format!("{name}-file"), "filename": format!("/disks/{name}")},
    })
}

fn options(value: Value) -> Options {
    Options::from_json(value).unwrap()
}

fn backend_of(node: &NodeRef, writable: bool) -> Result<Backend> {
    Backend::new(
        node,
        BackendOptions { name: "guest".into(), writable, ..BackendOptions::default() },
    )
}

#[test]
fn a_tree_is_reopened_read_only_and_writable_again() {
    let fixture = fixture(&["disk"]);
    let disk = fixture.node(image("disk")).unwrap();
    let backend = backend_of(&disk, true).unwrap();
    fixture.write(&backend, 0, &[7; 100]).unwrap();
    let reopen = |on: bool| {
        fixture.sim.block_on(fixture.graph.reopen(&disk, options(json!({"read-only": on}))))
    };
    let before = fixture.graph.dump();
    let error = reopen(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "the guest still writes: {error}");
    assert!(error.to_string().contains("guest"), "{error}");
    assert_eq!(fixture.graph.dump(), before, "a refused reopen changes nothing");
    fixture.write(&backend, 100, &[8; 100]).unwrap();
    drop(backend);

    reopen(true).unwrap();
    let file = fixture.graph.find("disk-file").unwrap();
    assert!(!disk.is_writable() && !file.is_writable(), "inline children inherit the mode");
    let kind = backend_of(&disk, true).unwrap_err().kind();
    assert_eq!(kind, ErrorKind::ReadOnly);

    reopen(false).unwrap();
    assert!(disk.is_writable() && file.is_writable());
    let backend = backend_of(&disk, true).unwrap();
    fixture.write(&backend, 200, &[9; 100]).unwrap();
    let read = fixture.read(&backend, 0, 300).unwrap();
    assert_eq!(read, [vec![7; 100], vec![8; 100], vec![9; 100]].concat());
}

#[test]
fn reopen_read_only_makes_written_data_durable() {
    for through_raw in [false, true] {
        let sim = fixture(&["disk"]).sim.fork(5);
        let fixture = Fixture::with(sim);
        let disk = fixture.node(image("disk")).unwrap();
        let top = match through_raw {
            true => fixture.node(json!({"driver": "raw", "file": "disk"})).unwrap(),
            false => disk.clone(),
        };
        let backend = backend_of(&top, true).unwrap();
        fixture.write(&backend, 0, &[7; 4096]).unwrap();
        drop((backend, top));
        let read_only = options(json!({"read-only": true}));
        fixture.sim.block_on(fixture.graph.reap());
        fixture.sim.block_on(fixture.graph.reopen(&disk, read_only)).unwrap();
        // Nothing flushes it later.
        let sim = fixture.sim.after_cut_by(1, bds_io::sim::CutMode::LoseAll);
        let after = Fixture::with(sim);
        let disk = after.backend(image("disk")).unwrap();
        assert_eq!(after.read(&disk, 0, 4).unwrap(), [7; 4], "through raw: {through_raw}");
    }
}

#[test]
fn reopen_keeps_the_permissions_that_parents_need() {
    let fixture = fixture(&["disk"]);
    let disk = fixture.node(image("disk")).unwrap();
    let file = fixture.graph.find("disk-file").unwrap();
    // The format needs write permission on its file, whatever its parents do.
    let alone =
        fixture.sim.block_on(fixture.graph.reopen(&file, options(json!({"read-only": true}))));
    assert_eq!(alone.unwrap_err().kind(), ErrorKind::ReadOnly);
    for wrong in [
        json!({"driver": "raw"}),
        json!({"node-name": "other"}),
        json!({"cluster-size": 1}),
        json!({"read-only": "perhaps"}),
    ] {
        let refused = fixture.sim.block_on(fixture.graph.reopen(&disk, options(wrong.clone())));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput, "{wrong}");
    }
    let detect = options(json!({"detect-zeroes": "on", "discard": "unmap"}));
    fixture.sim.block_on(fixture.graph.reopen(&disk, detect)).unwrap();
    assert!(disk.flags().discard);
}

#[test]
fn reopen_sets_and_removes_the_backing_node_by_name() {
    let fixture = fixture(&["disk", "base"]);
    let base = fixture.node(image("base")).unwrap();
    let writer = backend_of(&base, true).unwrap();
    fixture.write(&writer, 0, &[5; 4096]).unwrap();
    drop(writer);
    let disk = fixture.node(image("disk")).unwrap();
    let backend = backend_of(&disk, false).unwrap();
    let reopen = |value: Value| fixture.sim.block_on(fixture.graph.reopen(&disk, options(value)));
    assert_eq!(fixture.read(&backend, 0, 4).unwrap(), [0; 4]);
    reopen(json!({"backing": "base"})).unwrap();
    assert_eq!(walk::next_below(&disk).unwrap().id(), base.id());
    assert_eq!(fixture.read(&backend, 0, 4).unwrap(), [5; 4]);
    reopen(json!({"backing": null})).unwrap();
    assert_eq!(fixture.read(&backend, 0, 4).unwrap(), [0; 4]);
    assert_eq!(reopen(json!({"backing": "missing"})).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn an_image_is_inactivated_for_another_process_and_activated_again() {
    let fixture = fixture(&["disk"]);
    let disk = fixture.node(image("disk")).unwrap();
    let backend = backend_of(&disk, true).unwrap();
    fixture.write(&backend, 0, &[1; 4096]).unwrap();
    let other = Fixture::with(fixture.sim.clone());
    assert_eq!(other.node(image("disk")).unwrap_err().kind(), ErrorKind::InUse, "locked");
    let refused = fixture.sim.block_on(fixture.graph.inactivate(&disk)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Inactive, "{refused}");
    assert!(refused.to_string().contains("guest"), "{refused}");
    drop(backend);
    let reader = backend_of(&disk, false).unwrap();
    fixture.sim.block_on(fixture.graph.inactivate(&disk)).unwrap();
    assert!(!disk.is_active() && disk.could_write() && !disk.is_writable());
    assert!(!fixture.graph.find("disk-file").unwrap().is_active(), "and all below");
    assert_eq!(backend_of(&disk, true).unwrap_err().kind(), ErrorKind::Inactive);

    let theirs = other.node(image("disk")).unwrap();
    let writer = backend_of(&theirs, true).unwrap();
    other.write(&writer, 0, &[2; 4096]).unwrap();
    other.write(&writer, 10 * CLUSTER, &[3; 4096]).unwrap();
    let locked = fixture.sim.block_on(fixture.graph.activate(&disk)).unwrap_err();
    assert_eq!(locked.kind(), ErrorKind::InUse, "{locked}");
    assert!(!disk.is_active());
    drop(writer);
    assert!(other.sim.block_on(theirs.close()).unwrap().is_clean());

    fixture.sim.block_on(fixture.graph.activate(&disk)).unwrap();
    assert_eq!(fixture.read(&reader, 0, 1).unwrap(), [2]);
    assert_eq!(fixture.read(&reader, 10 * CLUSTER, 1).unwrap(), [3]);
    let backend = backend_of(&disk, true).unwrap();
    fixture.write(&backend, 20 * CLUSTER, &[4; 4096]).unwrap();
    let check = fixture.sim.block_on(backend.check(&|_, _| {})).unwrap();
    assert!(check.is_clean(), "{check:?}");
}

#[test]
fn all_nodes_are_inactivated_and_activated_together() {
    let fixture = fixture(&["disk", "base"]);
    let base = fixture.node(image("base")).unwrap();
    let disk = fixture.node(image("disk")).unwrap();
    fixture.sim.block_on(fixture.graph.set_backing(&disk, Some(&base))).unwrap();
    let before = fixture.graph.dump();
    let graph = &fixture.graph;
    // An active parent keeps its children active.
    assert_eq!(fixture.sim.block_on(graph.inactivate(&base)).unwrap_err().kind(), ErrorKind::InUse);
    fixture.sim.block_on(graph.inactivate_all()).unwrap();
    assert!(graph.nodes().iter().all(|node| !node.is_active()));
    fixture.sim.block_on(graph.activate_all()).unwrap();
    assert_eq!(graph.dump(), before, "permissions are as before");
}

/// Writes a counter repeatedly, each time to the next block, and reads it back.
async fn keep_writing(backend: Arc<Backend>, first: u64, stop: Arc<AtomicBool>) -> Vec<u8> {
    let mut last = vec![0; 16];
    for round in (1..=u8::MAX).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let at = usize::from(round) % 16;
        let offset = (first + at as u64) * CLUSTER;
        backend
            .write(offset, Buf::from_slice(&[round; 512]).iov(), WriteFlags::empty())
            .await
            .unwrap();
        last[at] = round;
        let back = Buf::zeroed(512, 512);
        backend.read(offset, back.iov()).await.unwrap();
        let mut byte = [0];
        back.iov().copy_to(0, &mut byte);
        assert_eq!(byte[0], round, "what was written is read");
    }
    last
}

#[test]
fn overlays_come_and_go_under_load_and_no_byte_is_lost() {
    const OVERLAYS: [&str; 5] = ["o1", "o2", "o3", "o4", "o5"];
    let fixture = fixture(&["disk", "o1", "o2", "o3", "o4", "o5"]);
    let disk = fixture.node(image("disk")).unwrap();
    let backend = Arc::new(backend_of(&disk, true).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let graph = fixture.graph.clone();
    let (written, held) = fixture.sim.block_on(async {
        let writers: Vec<_> = (0..3)
            .map(|n| {
                let (backend, stop) = (Arc::clone(&backend), Arc::clone(&stop));
                bds_io::spawn(keep_writing(backend, n * 16, stop))
            })
            .collect();
        let mut top = disk.clone();
        let mut held = std::time::Duration::ZERO;
        for name in OVERLAYS {
            let overlay = graph.open(options(image(name))).await.unwrap();
            let throttle = json!({"driver": "throttle", "file": name, "node-name": "t", "limits": {"bps-total": 1u64 << 40}});
            let throttle = graph.open(options(throttle)).await.unwrap();
            let change = graph.change().append(&top, &overlay).insert_filter(&overlay, &throttle);
            held = held.max(change.commit().await.unwrap().held);
            bds_io::sleep(std::time::Duration::from_millis(20)).await;
            let change = graph.change().drop_filter(&throttle).remove(throttle);
            let report = change.commit().await.unwrap();
            assert_eq!(report.closed.len(), 1);
            assert!(report.closed[0].is_clean(), "{report:?}");
            top = overlay;
        }
        stop.store(true, Ordering::Relaxed);
        let mut written = Vec::new();
        for writer in writers {
            written.push(writer.await);
        }
        (written, held)
    });
    assert!(held > std::time::Duration::ZERO, "requests were in flight");
    assert_eq!(walk::backing_chain(&backend.node().unwrap()).len(), 6);
    for (n, blocks) in written.iter().enumerate() {
        for (at, byte) in blocks.iter().enumerate() {
            let offset = (n * 16 + at) as u64 * CLUSTER;
            assert_eq!(fixture.read(&backend, offset, 1).unwrap(), [*byte], "block {at} of {n}");
        }
    }
    let check = fixture.sim.block_on(backend.check(&|_, _| {})).unwrap();
    assert!(check.is_clean());
    drop((backend, disk));
    let report = fixture.sim.block_on(fixture.graph.shutdown());
    assert!(report.leaked.is_empty(), "{report:?}");
    assert!(report.closed.iter().all(|report| report.is_clean()), "{report:?}");
}

#[test]
fn two_disks_get_their_overlays_in_one_transaction() {
    let fixture = fixture(&["a", "b", "oa", "ob"]);
    let [a, b, oa, ob] = ["a", "b", "oa", "ob"].map(|name| fixture.node(image(name)).unwrap());
    let (guest_a, guest_b) = (backend_of(&a, true).unwrap(), backend_of(&b, true).unwrap());
    let graph = &fixture.graph;
    fixture.sim.block_on(graph.reopen(&ob, options(json!({"read-only": true})))).unwrap();
    let before = graph.dump();
    let both = || graph.change().append(&a, &oa).append(&b, &ob).commit();
    assert_eq!(fixture.sim.block_on(both()).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(graph.dump(), before, "the first change was not applied either");
    assert_eq!(guest_a.node().unwrap().id(), a.id());
    fixture.sim.block_on(graph.reopen(&ob, options(json!({"read-only": false})))).unwrap();
    fixture.sim.block_on(both()).unwrap();
    assert_eq!((guest_a.node().unwrap().id(), guest_b.node().unwrap().id()), (oa.id(), ob.id()));
}

#[test]
fn reading_is_enough_to_copy_on_read() {
    let fixture = fixture(&["disk", "base"]);
    let base = fixture.node(image("base")).unwrap();
    let writer = backend_of(&base, true).unwrap();
    fixture.write(&writer, 0, &[5; 4096]).unwrap();
    drop(writer);
    let disk = fixture.node(image("disk")).unwrap();
    fixture.sim.block_on(fixture.graph.set_backing(&disk, Some(&base))).unwrap();
    let filter = fixture.node(json!({"driver": "copy-on-read", "file": "disk"})).unwrap();
    let backend = backend_of(&filter, false).unwrap();
    assert_eq!(fixture.read(&backend, 0, 4).unwrap(), [5; 4]);
    fixture.sim.block_on(fixture.graph.set_backing(&disk, None)).unwrap();
    assert_eq!(fixture.read(&backend, 0, 4).unwrap(), [5; 4], "kept");
    let switch = disk.enable_copy_on_read().unwrap();
    let read_only = options(json!({"read-only": true}));
    drop((backend, filter));
    fixture.sim.block_on(fixture.graph.reap());
    let refused = fixture.sim.block_on(fixture.graph.reopen(&disk, read_only.clone())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse, "{refused}");
    drop(switch);
    fixture.sim.block_on(fixture.graph.reopen(&disk, read_only)).unwrap();
}

#[test]
fn reopen_inside_the_callers_drained_section_does_not_wait() {
    let fixture = fixture(&["disk"]);
    let disk = fixture.node(image("disk")).unwrap();
    let backend = backend_of(&disk, true).unwrap();
    fixture.write(&backend, 0, &[7; 4096]).unwrap();
    drop(backend);
    let graph = fixture.graph.clone();
    let set = |on: bool| options(json!({"read-only": on}));
    fixture.sim.block_on(async {
        let drained = graph.drain_subtree(&disk).await;
        graph.change().reopen(&disk, set(true)).within(&drained).commit().await.unwrap();
        assert_eq!(disk.in_flight(), 0);
        assert!(disk.quiesce_count() > 0, "the section still holds");
        drop(drained);
        let everything = graph.drain_all().await;
        graph.change().reopen(&disk, set(false)).within(&everything).commit().await.unwrap();
        // A section of another caller is waited for, and others may change the graph meanwhile.
        let mut waiting = Box::pin(graph.change().reopen(&disk, set(true)).commit());
        for _ in 0..50 {
            assert!(futures_util::poll!(&mut waiting).is_pending());
            bds_io::yield_now().await;
        }
        graph.change().rename(&disk, "other").commit().await.unwrap();
        drop(everything);
        waiting.await.unwrap();
    });
    assert!(!disk.is_writable());
    let left: Vec<u32> = fixture.graph.nodes().iter().map(|node| node.quiesce_count()).collect();
    assert_eq!(left, [0, 0]);
}
