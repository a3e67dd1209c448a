//! Power cuts after writes to clusters and subclusters that have a place in the file already, but
//! show something else: each sector is old or new, never what lay in that place before.

use std::sync::Arc;

use bds_core::Options;
use bds_core::driver::{Attempt, WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, GraphConfig, NewImage};
use bds_core::request::{Backend, BackendOptions};
use bds_io::sim::CutMode;
use bds_io::{Buf, Sim, SimConfig};

use crate::kit::filled;

/// Bytes that lie in the place, those that were written last, and zeros, which were shown between.
const BEFORE: u8 = 1;
const LAST: u8 = 2;

const LEN: u64 = 256 << 10;

fn graph_on(sim: &Sim) -> Graph {
    let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    Graph::new(GraphConfig { fs: sim.fs(), ..config })
}

async fn open(graph: &Graph, writable: bool) -> Backend {
    let text = format!(
        "driver=qcow2,node-name=disk,read-only={},file.driver=file,file.filename=/disk",
        if writable { "off" } else { "on" }
    );
    let node = graph.open(Options::parse(&text).unwrap()).await.unwrap();
    Backend::new(&node, BackendOptions { writable, ..Default::default() }).unwrap()
}

/// Cuts the power in the `n`-th write to the disk after a write of the guest, and while that is
/// flushed. False if there were fewer.
fn cut_at(extra: &[(&str, &str)], (offset, len): (u64, u64), n: u64) -> bool {
    let sim = Sim::new(17, SimConfig::default());
    let graph = graph_on(&sim);
    let disk = sim.block_on(async {
        let mut options = Options::new().with("size", LEN);
        for (key, value) in extra {
            options = options.with(key, *value);
        }
        let path = "/disk".into();
        let image = NewImage { format: "qcow2".into(), path, options, skip_backing: true };
        graph.create_image(image).await.unwrap();
        let disk = open(&graph, true).await;
        disk.write(0, filled(BEFORE, LEN), WriteFlags::empty()).await.unwrap();
        disk.flush().await.unwrap();
        // Without MAY_UNMAP: the clusters keep their places.
        let zeroed = disk.write_zeroes(0, LEN, ZeroFlags::empty()).await.unwrap();
        assert_eq!(zeroed, Attempt::Done);
        disk.flush().await.unwrap();
        disk
    });
    sim.cut_after_writes(Some(sim.writes() + n));
    let ended = sim.run_until_cut(async {
        disk.write(offset, filled(LAST, len), WriteFlags::empty()).await.unwrap();
        disk.flush().await.unwrap();
    });
    sim.power_cut();
    std::mem::forget((disk, graph));
    for seed in 0..20 {
        for mode in [CutMode::Random, CutMode::Reorder, CutMode::Tear] {
            let after = sim.after_cut_by(seed, mode);
            let stale = after.block_on(first_stale(&after));
            assert_eq!(stale, None, "{extra:?} {offset}+{len}, write {n}, {seed}, {mode:?}");
        }
    }
    ended.is_none()
}

/// Where the disk shows what lay in a place before.
async fn first_stale(sim: &Sim) -> Option<usize> {
    let graph = graph_on(sim);
    let disk = open(&graph, false).await;
    let len = usize::try_from(LEN).unwrap();
    let buf = Buf::zeroed(len, 4096);
    disk.read(0, buf.iov()).await.unwrap();
    drop(disk);
    graph.shutdown().await.check_leaks().unwrap();
    buf.iov().to_vec(0..len).iter().position(|byte| *byte == BEFORE)
}

#[test]
fn a_cut_shows_nothing_that_lay_in_a_place_before() {
    for extra in [&[][..], &[("cluster_size", "4096")], &[("extended_l2", "on")]] {
        for (offset, len) in [(0, 64 << 10), (0, 4096), (70 << 10, 20 << 10)] {
            let mut n = 0;
            while cut_at(extra, (offset, len), n) {
                n += 1;
            }
            assert!(n > 2, "data and entries are written");
        }
    }
}
