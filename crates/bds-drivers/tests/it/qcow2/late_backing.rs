//! An image that is opened without the backing file it records, and gets the node later: what read
//! as zeros by a zero write or discard reads as zeros then too.

use bds_core::driver::{Truncate, ZeroFlags};
use bds_core::options::Options;
use bds_core::request::{Backend, BackendOptions};
use bds_io::{Sim, SimConfig};

use super::harness::{BASE, Shape, base_bytes, close, graph, make, open, options, read, write};

#[test]
fn zeros_stay_zeros_when_the_backing_node_comes() {
    for compat in ["v2", "v3"] {
        for extended_l2 in [false, true] {
            if compat == "v2" && extended_l2 {
                continue;
            }
            let sim = Sim::new(3, SimConfig::calm());
            let cluster = if extended_l2 { 16384 } else { 4096 };
            let size = 32 * cluster;
            make(
                &sim,
                &Shape { size, compat, cluster, extended_l2, backing: true, ..Shape::default() },
            );
            let graph = graph(&sim);
            sim.block_on(async {
                let alone = options().with("backing", serde_json::Value::Null);
                let (node, disk) = open(&graph, alone).await;
                let at = |n: u64| n * cluster;
                write(&disk, at(1), &vec![5; usize::try_from(2 * cluster).unwrap()]).await.unwrap();
                // Written before, and never written.
                for n in [1, 4] {
                    let _done =
                        disk.write_zeroes(at(n), cluster, ZeroFlags::MAY_UNMAP).await.unwrap();
                }
                disk.discard(at(2), cluster).await.unwrap();
                let len = usize::try_from(cluster).unwrap();
                let discarded = read(&disk, at(2), len).await.unwrap();
                let text = format!("driver=file,node-name=base,filename={BASE},read-only=on");
                let base = graph.open(Options::parse(&text).unwrap()).await.unwrap();
                graph.set_backing(&node, Some(&base)).await.unwrap();
                let what = format!("{compat}, extended {extended_l2}");
                for n in [1, 4] {
                    let found = read(&disk, at(n), len).await.unwrap();
                    assert!(found.iter().all(|byte| *byte == 0), "{what}: cluster {n}");
                }
                assert!(read(&disk, at(2), len).await.unwrap() == discarded, "{what}");
                let below = &base_bytes(size)[len * 5..len * 6];
                assert!(read(&disk, at(5), len).await.unwrap() == below, "{what}: it shows below");
                drop(base);
                close(&graph, node, disk).await;
            });
        }
    }
}

/// What an image has grown by reads as zeros, also above a backing node that is longer than the
/// image was.
#[test]
fn a_grown_image_shows_nothing_of_a_backing_node_that_comes_later() {
    for compat in ["v2", "v3"] {
        let sim = Sim::new(4, SimConfig::calm());
        let (cluster, size) = (4096, 8 * 4096 + 512);
        make(&sim, &Shape { size, compat, cluster, backing: true, ..Shape::default() });
        let graph = graph(&sim);
        sim.block_on(async {
            let alone = options().with("backing", serde_json::Value::Null);
            let (node, disk) = open(&graph, alone).await;
            disk.truncate(Truncate::to(3 * size)).await.unwrap();
            let text = format!("driver=mem,node-name=long,size={}", 2 * size);
            let long = graph.open(Options::parse(&text).unwrap()).await.unwrap();
            let below = BackendOptions { writable: true, ..BackendOptions::default() };
            let below = Backend::new(&long, below).unwrap();
            write(&below, 0, &vec![7; usize::try_from(2 * size).unwrap()]).await.unwrap();
            drop(below);
            graph.set_backing(&node, Some(&long)).await.unwrap();
            let found = read(&disk, 0, usize::try_from(3 * size).unwrap()).await.unwrap();
            // The cluster that the old length ended in is the image's own now, as it read then.
            let (old, new) = found.split_at(8 * 4096);
            assert!(old.iter().all(|byte| *byte == 7), "{compat}: it shows below");
            assert_eq!(new.iter().position(|byte| *byte != 0), None, "{compat}");
            drop(long);
            close(&graph, node, disk).await;
        });
    }
}
