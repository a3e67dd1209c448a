//! Tests adding, removing and replacing the backing node of an open overlay.

use std::sync::Arc;

use bds_core::driver::{Driver, OpenContext, ReadFlags, WriteFlags};
use bds_core::graph::{Graph, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{DriverType, ErrorKind, Options};
use bds_drivers::format::qcow2::Qcow2Format;
use bds_drivers::protocol::mem::Mem;
use bds_io::{Buf, Sim};
use bds_testkit::pattern;
use serde_json::json;

use super::driver_stack::{
    CellPort, Image, NodeCell, ReadyChildren, made, node_cell, open_file, read_only, writer,
};
use crate::kit::{ImageKind, TestEnv};

const CLUSTER: u64 = 4096;

/// A raw file by name.
async fn base(sim: &Sim, name: &str, bytes: &[u8]) -> Arc<dyn Driver> {
    sim.put_file(name, bytes);
    open_file(&sim.fs(), name.into(), read_only(writer())).await.unwrap()
}

/// A node whose reads complete at once.
async fn memory(bytes: &[u8]) -> Arc<dyn Driver> {
    let mut none = ReadyChildren::default();
    let fs = bds_io::Fs::Host;
    let options = Options::new().with("size", bytes.len());
    let mut context = OpenContext::new("mem", options, writer(), &fs, &mut none);
    let node = Mem.open(&mut context).await.unwrap();
    node.write(0, Buf::from_slice(bytes).iov(), WriteFlags::empty()).await.unwrap();
    Arc::from(node)
}

async fn overlay(sim: &Sim, env: &TestEnv, backing: Option<&NodeCell>) -> Box<dyn Driver> {
    let fs = sim.fs();
    let file = open_file(&fs, env.path("disk"), writer()).await.unwrap();
    let mut children = ReadyChildren(vec![("file", node_cell(file))]);
    children.0.extend(backing.map(|node_cell| ("backing", Arc::clone(node_cell))));
    let mut context = OpenContext::new("image", Options::new(), writer(), &fs, &mut children);
    Qcow2Format.open(&mut context).await.unwrap()
}

async fn read(node: &dyn Driver, at: u64, len: usize) -> Vec<u8> {
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, 0xee);
    match node.try_read(at, &iov) {
        Some(result) => result.unwrap(),
        None => node.read(at, iov.clone(), ReadFlags::empty()).await.unwrap(),
    }
    iov.to_vec(0..len)
}

/// What an overlay shows: its own write at 5000, below it `base` and then zeros.
fn shown(base: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = base.to_vec();
    bytes.resize(len, 0);
    bytes[5000..5100].fill(9);
    bytes
}

async fn write_some(node: &dyn Driver) {
    let iov = Buf::from_slice(&[9; 100]).iov();
    node.write(5000, iov, WriteFlags::empty()).await.unwrap();
}

#[test]
fn the_first_backing_node_is_added_and_the_only_one_removed() {
    let kind = ImageKind::qcow2("overlay", CLUSTER);
    let len = usize::try_from(kind.len).unwrap();
    let (sim, env) = made(1, &kind);
    sim.block_on(async {
        let node = overlay(&sim, &env, None).await;
        assert_eq!(read(&*node, 0, len).await, vec![0; len]);
        assert!(node.set_backing(None).unwrap().is_none());
        for below in [pattern(1, 0, 50_001), pattern(2, 0, len + 10_000), Vec::new()] {
            let base = base(&sim, "/below", &below).await;
            let users = Arc::strong_count(&base);
            let node_cell = node_cell(Arc::clone(&base));
            let child = CellPort::child(&node_cell, "backing");
            drop(node_cell);
            assert!(node.set_backing(Some(child)).unwrap().is_none());
            let visible = &below[..below.len().min(len)];
            let mut expected = visible.to_vec();
            expected.resize(len, 0);
            assert_eq!(read(&*node, 0, len).await, expected);

            let second =
                CellPort::child(&super::driver_stack::node_cell(Arc::clone(&base)), "backing");
            let error = node.set_backing(Some(second)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            assert_eq!(read(&*node, 0, len).await, expected, "it stays");

            let given = node.set_backing(None).unwrap().expect("the old child is returned");
            assert_eq!(given.name(), "backing");
            drop(given);
            assert_eq!(Arc::strong_count(&base), users, "nothing holds it any more");
            assert_eq!(read(&*node, 0, len).await, vec![0; len]);
        }
        node.close().await.unwrap();
    });
}

/// Copied clusters stay, others come from the new backing node.
#[test]
fn writes_over_a_new_backing_node_keep_the_bytes_around_them() {
    let kind = ImageKind::qcow2("overlay", CLUSTER);
    let len = usize::try_from(kind.len).unwrap();
    let (sim, env) = made(2, &kind);
    sim.block_on(async {
        let node = overlay(&sim, &env, None).await;
        let below = pattern(3, 0, 90_000);
        let node_cell = node_cell(base(&sim, "/below", &below).await);
        node.set_backing(Some(CellPort::child(&node_cell, "backing"))).unwrap();
        write_some(&*node).await;
        assert_eq!(read(&*node, 0, len).await, shown(&below, len));
        node.set_backing(None).unwrap();
        let mut expected = vec![0; len];
        expected[4096..8192].copy_from_slice(&shown(&below, len)[4096..8192]);
        assert_eq!(read(&*node, 0, len).await, expected);
        let report = node.check(&|_, _| {}).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        node.close().await.unwrap();
    });
}

/// The child leads to a node of another length, without notice to the driver.
#[test]
fn a_backing_node_of_another_length_reads_right() {
    let kind = ImageKind::qcow2("overlay", CLUSTER);
    let len = usize::try_from(kind.len).unwrap();
    let (sim, env) = made(3, &kind);
    sim.block_on(async {
        let node_cell = node_cell(base(&sim, "/first", &pattern(4, 0, 60_000)).await);
        let node = overlay(&sim, &env, Some(&node_cell)).await;
        write_some(&*node).await;
        assert_eq!(read(&*node, 0, len).await[5000..5100], [9; 100]);
        for (i, below_len) in [20_000, 5_001, 300_000, 0, 70_003].into_iter().enumerate() {
            let below = pattern(10 + i as u64, 0, below_len);
            *node_cell.lock().unwrap() = memory(&below).await;
            let mut expected = below[..below.len().min(len)].to_vec();
            expected.resize(len, 0);
            // In pieces, so that some end before the end, some at it and some behind it.
            for at in (8192..len).step_by(1000) {
                let piece = 1000.min(len - at);
                let got = read(&*node, at as u64, piece).await;
                assert_eq!(got, expected[at..at + piece], "{below_len} bytes, at {at}");
            }
            // The length is known now: from here on the inline path serves reads up to the end and
            // past it.
            for at in (8192..len).step_by(1000) {
                let iov = Buf::zeroed(1000.min(len - at), 4096).iov();
                assert!(node.try_read(at as u64, &iov).is_some(), "{below_len} bytes, at {at}");
            }
        }
        node.close().await.unwrap();
    });
}

#[test]
fn a_raw_data_file_and_a_backing_node_exclude_each_other() {
    let kind = ImageKind::qcow2("raw", CLUSTER).with_data_file().create("data_file_raw", true);
    let (sim, env) = made(4, &kind);
    sim.block_on(async {
        let image = Image::open(&env, &kind, writer()).await.unwrap();
        let node_cell = node_cell(base(&sim, "/below", &[1; 512]).await);
        let error =
            image.node.set_backing(Some(CellPort::child(&node_cell, "backing"))).unwrap_err();
        assert!(error.to_string().contains("raw data file"), "{error}");
        image.close().await.unwrap();
    });
}

/// Activated with another backing file's name in its header: refused until the node has another
/// backing node.
#[test]
fn activation_notices_a_changed_backing_file_name() {
    let kind = ImageKind::qcow2("renamed", CLUSTER).backed(50_000);
    let (sim, env) = made(5, &kind);
    sim.block_on(async {
        let image = Image::open(&env, &kind, writer()).await.unwrap();
        image.inactivate().await.unwrap();
        let path = env.path("disk");
        let bytes = sim.snapshot_file(&path);
        let name = bytes.windows(4).position(|w| w == b"base").unwrap();
        let options = bds_io::OpenOptions { write: true, ..Default::default() };
        let file = sim.fs().open(&path, &options).unwrap();
        file.write(name as u64, Buf::from_slice(b"bass").iov(), true).await.unwrap();
        let error = image.activate().await.unwrap_err();
        assert!(error.to_string().contains("another backing file"), "{error}");
        let node_cell = node_cell(base(&sim, "/below", &pattern(6, 0, 3000)).await);
        drop(image.node.set_backing(None).unwrap());
        image.node.set_backing(Some(CellPort::child(&node_cell, "backing"))).unwrap();
        image.activate().await.unwrap();
        assert_eq!(image.read(0, 3000).await.unwrap(), pattern(6, 0, 3000));
        image.close().await.unwrap();
    });
}

async fn node(graph: &Graph, options: serde_json::Value) -> NodeRef {
    graph.open(Options::from_json(options).unwrap()).await.unwrap()
}

/// In a graph: an overlay opened without a backing node is put on top of a disk in use, and later
/// loses it again.
#[test]
fn an_overlay_opened_without_backing_is_appended() {
    let kind = ImageKind::qcow2("overlay", CLUSTER).sized(64 * CLUSTER, 64 * CLUSTER);
    let (sim, env) = made(6, &kind);
    let len = usize::try_from(kind.len).unwrap();
    sim.put_file("/base", &pattern(7, 0, len));
    sim.put_file("/short", &pattern(8, 0, 30_000));
    let graph = env.graph();
    sim.block_on(async {
        let raw = |name: &str| {
            json!({"driver": "file", "node-name": name, "filename": format!("/{name}")})
        };
        let bottom = node(&graph, raw("base")).await;
        let short = node(&graph, raw("short")).await;
        let user = BackendOptions { name: "guest".into(), writable: true, ..BackendOptions::default() };
        let guest = Backend::new(&bottom, user).unwrap();
        let file = json!({"driver": "file", "filename": env.path("disk")});
        let options = json!({"driver": "qcow2", "file": file, "backing": null});
        let top = node(&graph, options).await;

        graph.append(&bottom, &top).await.unwrap();
        let read = async || {
            let iov = Buf::zeroed(len, 4096).iov();
            guest.read(0, iov.clone()).await.unwrap();
            iov.to_vec(0..len)
        };
        assert_eq!(read().await, pattern(7, 0, len));
        let iov = Buf::from_slice(&[9; 100]).iov();
        guest.write(5000, iov, WriteFlags::empty()).await.unwrap();
        assert_eq!(sim.snapshot_file("/base"), pattern(7, 0, len));
        assert_eq!(read().await, shown(&pattern(7, 0, len), len));

        // A backing node of another length, without notice to the driver.
        let before = bottom.count();
        graph.set_backing(&top, Some(&short)).await.unwrap();
        assert_eq!(bottom.count(), before - 1);
        let mut expected = pattern(8, 0, 30_000);
        expected.resize(len, 0);
        expected[4096..8192].copy_from_slice(&shown(&pattern(7, 0, len), len)[4096..8192]);
        assert_eq!(read().await, expected);

        let before = short.count();
        graph.set_backing(&top, None).await.unwrap();
        assert_eq!(short.count(), before - 1, "nothing holds it any more");
        expected[..4096].fill(0);
        expected[8192..].fill(0);
        assert_eq!(read().await, expected);
        guest.flush().await.unwrap();
        assert!(guest.check(&|_, _| {}).await.unwrap().is_clean());
    });
}
