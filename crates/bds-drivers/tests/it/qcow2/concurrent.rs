//! Concurrent requests: reads of freed clusters, and writes to one cluster.

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use futures_util::future::join_all;

use super::harness::{Shape, close, graph, make, open, options, read, write};
use super::random::seeded;

/// Every cluster is only ever written with its own number. A read of a cluster that is freed,
/// reallocated and rewritten meanwhile returns its number or zeros, never those of another.
async fn write_and_free(backend: &Backend, shape: &Shape, seed: u64, ops: usize) {
    let mut chance = seeded(seed);
    let clusters = shape.size / shape.cluster;
    for _ in 0..ops {
        let number = chance.below(clusters);
        let at = number * shape.cluster;
        let bytes = vec![number as u8 + 1; shape.cluster as usize];
        match chance.below(8) {
            0..3 => write(backend, at, &bytes).await.unwrap(),
            3 => write(backend, at, &bytes[..512]).await.unwrap(),
            4 => {
                let iov = Buf::from_slice(&bytes).iov();
                backend.write_compressed(at, iov).await.unwrap();
            }
            5 => {
                let flags = ZeroFlags::MAY_UNMAP;
                let _ = backend.write_zeroes(at, shape.cluster, flags).await.unwrap();
            }
            6 => backend.discard(at, shape.cluster).await.unwrap(),
            // Clusters are reused only after their removal is durable.
            _ => backend.flush().await.unwrap(),
        }
    }
}

async fn watch(backend: &Backend, shape: &Shape, seed: u64, ops: usize) {
    let mut chance = seeded(seed);
    let clusters = shape.size / shape.cluster;
    for _ in 0..ops {
        let first = chance.below(clusters);
        let count = 1 + chance.below(3.min(clusters - first));
        let len = (count * shape.cluster) as usize;
        let bytes = read(backend, first * shape.cluster, len).await.unwrap();
        for (i, byte) in bytes.iter().enumerate() {
            let number = first + i as u64 / shape.cluster;
            assert!(
                *byte == 0 || *byte == number as u8 + 1,
                "cluster {number} shows {byte}, which is another's (seed {seed})"
            );
        }
    }
}

#[test]
fn readers_never_see_a_reallocated_cluster() {
    let shape = Shape { cluster: 4096, size: 64 << 10, ..Shape::default() };
    for seed in 0..12 {
        let sim = Sim::new(seed, SimConfig { inline_rate: 0.3, ..SimConfig::default() });
        make(&sim, &shape);
        let graph = graph(&sim);
        sim.block_on(async {
            let (node, backend) = open(&graph, options()).await;
            let writers = (0..4).map(|i| write_and_free(&backend, &shape, seed * 10 + i, 60));
            let readers = (0..4).map(|i| watch(&backend, &shape, seed * 10 + i + 5, 80));
            futures_util::future::join(join_all(writers), join_all(readers)).await;
            let report = backend.check(&|_, _| {}).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
            close(&graph, node, backend).await;
        });
    }
}

/// Many small writes into one fresh cluster at once: each byte is that of its only writer.
#[test]
fn writers_of_one_fresh_cluster_do_not_lose_each_others_bytes() {
    for (seed, backing) in [(1, false), (2, true), (3, false), (4, true)] {
        let shape = Shape { cluster: 65536, backing, ..Shape::default() };
        let sim = Sim::new(seed, SimConfig::default());
        make(&sim, &shape);
        let graph = graph(&sim);
        sim.block_on(async {
            let (node, backend) = open(&graph, options()).await;
            let writes = (0..128u64).map(|i| {
                let iov = Buf::from_slice(&[i as u8 + 1; 1000]).iov();
                backend.write(i * 1000, iov, WriteFlags::empty())
            });
            for result in join_all(writes).await {
                result.unwrap();
            }
            let now = read(&backend, 0, 128_000).await.unwrap();
            for (i, byte) in now.iter().enumerate() {
                assert_eq!(usize::from(*byte), i / 1000 + 1, "byte {i}");
            }
            close(&graph, node, backend).await;
        });
    }
}

/// A future that is kept but not polled holds nothing that other requests need.
#[test]
fn an_unpolled_write_blocks_no_other() {
    use std::task::{Context, Poll, Waker};
    let shape = Shape { cluster: 65536, ..Shape::default() };
    let sim = Sim::new(9, SimConfig::calm());
    make(&sim, &shape);
    let graph = graph(&sim);
    sim.block_on(async {
        let (node, backend) = open(&graph, options()).await;
        let iov = Buf::from_slice(&[1; 512]).iov();
        let mut idle = Box::pin(backend.write(0, iov, WriteFlags::empty()));
        let polled = idle.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(polled, Poll::Pending));
        write(&backend, 1024, &[2; 512]).await.unwrap();
        assert_eq!(read(&backend, 0, 512).await.unwrap(), [1; 512]);
        drop(idle);
        close(&graph, node, backend).await;
    });
}
