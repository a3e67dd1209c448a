//! A flush after a snapshot covers what was written before it, to what is a backing image now.

use std::sync::Arc;

use bds_core::driver::WriteFlags;
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::sim::{CutMode, Fault, OpMask};
use bds_io::{Buf, Sim, SimConfig};

use crate::kit::filled;

const LEN: u64 = 1 << 20;

fn graph_on(sim: &Sim) -> Graph {
    let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    Graph::new(GraphConfig { fs: sim.fs(), ..config })
}

async fn create(graph: &Graph, name: &str) {
    let format = if name == "raw" { "raw" } else { "qcow2" };
    let options = Options::new().with("size", LEN);
    let path = format!("/{name}").into();
    let image = NewImage { format: format.into(), path, options, skip_backing: true };
    graph.create_image(image).await.unwrap();
}

/// Opens an image; `below`: the rest of its options.
async fn open(graph: &Graph, name: &str, below: &str) -> NodeRef {
    let format = if name == "raw" { "raw" } else { "qcow2" };
    let text =
        format!("driver={format},node-name={name},file.driver=file,file.filename=/{name}{below}");
    graph.open(Options::parse(&text).unwrap()).await.unwrap()
}

async fn write(guest: &Backend, offset: u64, fill: u8) {
    guest.write(offset, filled(fill, 4096), WriteFlags::empty()).await.unwrap();
}

/// How the guest comes to the overlay.
#[derive(Clone, Copy, Debug)]
enum Way {
    Append,
    /// All nodes are drained by another section meanwhile, so that the change cannot flush.
    AppendDrained,
    /// Two overlays at once.
    Twice,
    /// The overlay is there already, and takes the place of its backing node.
    Replace,
    /// The image has a filter above it.
    Filtered,
}

async fn snapshot(graph: &Graph, base: &NodeRef, way: Way) -> Result<()> {
    let overlay = |name: &'static str| open(graph, name, "");
    match way {
        Way::Append => graph.append(base, &overlay("one").await).await,
        Way::AppendDrained => {
            let one = overlay("one").await;
            let _all = graph.drain_all().await;
            graph.append(base, &one).await
        }
        Way::Twice => {
            let (one, two) = (overlay("one").await, overlay("two").await);
            let _all = graph.drain_all().await;
            graph.append(base, &one).await?;
            graph.append(&one, &two).await
        }
        Way::Replace => {
            let one = open(graph, "one", &format!(",backing={}", base.name())).await;
            graph.replace(base, &one).await
        }
        Way::Filtered => {
            let text = format!("driver=throttle,limits.bps-total=1T,file={}", base.name());
            let filter = graph.open(Options::parse(&text)?).await?;
            graph.insert_filter(base, &filter).await?;
            let one = overlay("one").await;
            let _all = graph.drain_all().await;
            graph.append(&filter, &one).await
        }
    }
}

/// A guest writes, gets an overlay, and flushes; then the power is gone.
fn check(base: &str, way: Way, mode: CutMode) {
    let context = format!("{base}, {way:?}, {mode:?}");
    let sim = Sim::new(11, SimConfig::default());
    sim.block_on(async {
        let graph = graph_on(&sim);
        for name in [base, "one", "two"] {
            create(&graph, name).await;
        }
        let base = open(&graph, base, "").await;
        let options = BackendOptions { writable: true, ..Default::default() };
        let guest = Backend::new(&base, options).unwrap();
        guest.flush().await.unwrap();
        write(&guest, 0, 1).await;
        write(&guest, 256 << 10, 2).await;
        snapshot(&graph, &base, way).await.unwrap_or_else(|error| panic!("{context}: {error}"));
        write(&guest, 4096, 3).await;
        guest.flush().await.unwrap();
        sim.power_cut();
        std::mem::forget((guest, base, graph));
    });
    let after = sim.after_cut_by(5, mode);
    after.block_on(async {
        let graph = graph_on(&after);
        let base = open(&graph, base, ",read-only=on").await;
        let one = open(&graph, "one", &format!(",read-only=on,backing={}", base.name())).await;
        let top = match way {
            Way::Twice => {
                let two = open(&graph, "two", ",read-only=on,backing=one").await;
                drop(one);
                two
            }
            _ => one,
        };
        let reader = Backend::new(&top, BackendOptions::default()).unwrap();
        for (offset, fill) in [(0, 1), (256 << 10, 2), (4096, 3)] {
            let buf = Buf::zeroed(4096, 4096);
            reader.read(offset, buf.iov()).await.unwrap();
            let found = buf.iov().to_vec(0..4096);
            assert!(found.iter().all(|byte| *byte == fill), "{context}: {offset}: {}", found[0]);
        }
        drop((reader, top, base));
        graph.shutdown().await.check_leaks().unwrap();
    });
}

#[test]
fn a_flush_covers_what_was_written_before_a_snapshot() {
    for base in ["raw", "base"] {
        for way in [Way::Append, Way::AppendDrained, Way::Twice, Way::Replace, Way::Filtered] {
            for mode in [CutMode::LoseAll, CutMode::Random] {
                check(base, way, mode);
            }
        }
    }
}

/// An image with a guest that has written and not flushed, and an overlay that is not attached yet.
async fn written_disk(graph: &Graph) -> (NodeRef, Backend, NodeRef) {
    create(graph, "base").await;
    create(graph, "one").await;
    let base = open(graph, "base", "").await;
    let options = BackendOptions { writable: true, ..Default::default() };
    let guest = Backend::new(&base, options).unwrap();
    write(&guest, 0, 1).await;
    (base, guest, open(graph, "one", "").await)
}

/// Another program may copy the image once the change has returned.
#[test]
fn a_snapshot_leaves_nothing_with_the_driver() {
    let sim = Sim::new(12, SimConfig::default());
    sim.block_on(async {
        let graph = graph_on(&sim);
        let (base, guest, one) = written_disk(&graph).await;
        let report = graph.change().append(&base, &one).commit().await.unwrap();
        assert!(report.not_flushed.is_empty());
        let copy = graph_on(&sim);
        let text = "driver=qcow2,read-only=on,force-share=on,file.driver=file,file.filename=/base";
        let node = copy.open(Options::parse(text).unwrap()).await.unwrap();
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        let buf = Buf::zeroed(4096, 4096);
        reader.read(0, buf.iov()).await.unwrap();
        assert!(buf.iov().to_vec(0..4096).iter().all(|byte| *byte == 1), "with the driver still");
        drop((reader, node, guest, base, one));
        copy.shutdown().await.check_leaks().unwrap();
        graph.shutdown().await.check_leaks().unwrap();
    });
}

/// The medium of what became a backing image fails: the change says so, and so does each flush.
#[test]
fn a_failure_to_flush_a_backing_image_is_reported() {
    let sim = Sim::new(13, SimConfig::default());
    sim.block_on(async {
        let graph = graph_on(&sim);
        let (base, guest, one) = written_disk(&graph).await;
        sim.fail_nth(0, Fault::sticky(libc::EIO).on(OpMask::SYNC).in_path("/base"));
        let report = graph.change().append(&base, &one).commit().await.unwrap();
        assert_eq!(report.not_flushed.len(), 1);
        for _ in 0..2 {
            let error = guest.flush().await.unwrap_err();
            assert!(error.node_name().is_some(), "{error}");
        }
        sim.clear_faults();
        drop(guest);
        drop(one.close().await.unwrap());
        let report = base.close().await;
        assert!(report.unwrap().into_result().is_err(), "reported at the end as well");
        graph.shutdown().await.check_leaks().unwrap();
    });
}
