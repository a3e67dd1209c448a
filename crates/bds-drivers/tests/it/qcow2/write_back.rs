//! Counts flushes of scattered allocating writes on small images, on the simulated disk.

use bds_core::driver::WriteFlags;
use bds_io::sim::OpMask;
use bds_io::{Buf, Sim, SimConfig};
use futures_util::future::join_all;

use super::harness::{Shape, close, graph, make, open, options, read};

/// Writes `count` sectors, each in a different cluster, eight at once; then flushes. Returns the
/// syncs meanwhile.
fn syncs_of(shape: &Shape, count: u64) -> u64 {
    let sim = Sim::new(1, SimConfig::calm());
    make(&sim, shape);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        let clusters = shape.size / shape.cluster;
        // Coprime to any power of two: no cluster twice, and neighbours in time are far apart.
        let place = |i: u64| i * ((clusters / 5 * 2) | 1) % clusters * shape.cluster;
        let before = sim.ops_of(OpMask::SYNC);
        let writers = (0..8).map(|side| {
            let backend = &backend;
            async move {
                for i in (side..count).step_by(8) {
                    let iov = Buf::from_slice(&[9; 512]).iov();
                    backend.write(place(i), iov, WriteFlags::empty()).await.unwrap();
                }
            }
        });
        join_all(writers).await;
        backend.flush().await.unwrap();
        let syncs = sim.ops_of(OpMask::SYNC) - before;
        for i in (0..count).step_by(97) {
            assert_eq!(read(&backend, place(i), 512).await.unwrap(), [9; 512]);
        }
        close(&graph, node, backend).await;
        syncs
    })
}

/// The final flush takes two or three syncs: before the directory, before the links, and of
/// everything.
const OF_ONE_FLUSH: u64 = 4;

#[test]
fn scattered_fresh_writes_on_a_small_image_are_not_flushed_one_by_one() {
    let shape = Shape { size: 2 << 30, cluster: 65536, ..Shape::default() };
    let syncs = syncs_of(&shape, 1000);
    assert!(syncs <= OF_ONE_FLUSH, "{syncs} syncs for 1000 writes");
}

#[test]
fn scattered_copies_on_a_small_overlay_are_not_flushed_one_by_one() {
    let shape = Shape { size: 32 << 20, cluster: 4096, backing: true, ..Shape::default() };
    let syncs = syncs_of(&shape, 1000);
    assert!(syncs <= OF_ONE_FLUSH, "{syncs} syncs for 1000 writes");
}

/// 512-byte clusters: four refcount blocks, the smallest cache there is, count 512 KiB of file
/// only.
#[test]
fn refcount_blocks_of_small_clusters_are_not_flushed_one_by_one() {
    let shape = Shape { size: 8 << 20, cluster: 512, ..Shape::default() };
    let syncs = syncs_of(&shape, 1000);
    assert!(syncs <= OF_ONE_FLUSH, "{syncs} syncs for 1000 writes");
}
