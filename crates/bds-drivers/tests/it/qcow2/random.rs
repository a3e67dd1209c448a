//! Random operations against a byte model; the image must check clean afterwards.

use bds_core::driver::{Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::Chance;
use futures_util::future::join_all;

use super::harness::{
    BASE, Shape, base_bytes, close, graph, make, open, options, qemu_check, read, write,
};
use crate::sweep::seeds;

/// A random number generator for this seed.
pub(crate) fn seeded(seed: u64) -> Chance {
    Chance::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995)
}

/// The expected content of the disk.
pub(crate) fn model_of(sim: &Sim, shape: &Shape) -> Vec<u8> {
    let mut model = vec![0; shape.size as usize];
    if shape.backing {
        let base = sim.snapshot_file(BASE);
        let base = if base.is_empty() { base_bytes(0) } else { base };
        let len = base.len().min(model.len());
        model[..len].copy_from_slice(&base[..len]);
    }
    model
}

fn some_range(chance: &mut Chance, len: u64, cluster: u64) -> (u64, u64) {
    let offset = chance.below(len);
    let most = match chance.below(4) {
        0 => 512,
        1 => cluster,
        _ => cluster * 5,
    };
    let n = 1 + chance.below(most.min(len - offset));
    match chance.below(3) {
        0 => (offset, n),
        1 => {
            let start = offset / 512 * 512;
            (start, n.div_ceil(512).min((len - start) / 512) * 512)
        }
        _ => {
            let start = offset / cluster * cluster;
            (start, (n.div_ceil(cluster) * cluster).min(len - start))
        }
    }
}

async fn discard(backend: &Backend, model: &mut [u8], at: u64, n: u64) {
    backend.discard(at, n).await.unwrap();
    let now = read(backend, at, n as usize).await.unwrap();
    let range = at as usize..(at + n) as usize;
    for (i, (now, old)) in now.iter().zip(&model[range.clone()]).enumerate() {
        assert!(*now == 0 || now == old, "byte {} after a discard", at as usize + i);
    }
    model[range].copy_from_slice(&now);
}

async fn one_op(chance: &mut Chance, backend: &Backend, model: &mut Vec<u8>, shape: &Shape) {
    let len = model.len() as u64;
    let (at, n) = some_range(chance, len, shape.cluster);
    let range = at as usize..(at + n) as usize;
    match chance.below(20) {
        0..8 => {
            let bytes = vec![chance.draw() as u8 | 1; n as usize];
            write(backend, at, &bytes).await.unwrap();
            model[range].copy_from_slice(&bytes);
        }
        8..11 => {
            let now = read(backend, at, n as usize).await.unwrap();
            assert_eq!(now, &model[range], "read {n} bytes at {at}");
        }
        11..13 => {
            let flags =
                if chance.below(2) == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            let _ = backend.write_zeroes(at, n, flags).await.unwrap();
            model[range].fill(0);
        }
        13..15 => discard(backend, model, at, n).await,
        15 => backend.flush().await.unwrap(),
        16 => {
            let new = (len + chance.below(4) * 512 * (1 + chance.below(40))).min(shape.size * 2);
            let prealloc = match chance.below(4) {
                0 if !shape.backing => Prealloc::Metadata,
                1 if !shape.backing => Prealloc::Falloc,
                _ => Prealloc::Off,
            };
            let change = Truncate { len: new, exact: true, prealloc, zero_new: false };
            backend.truncate(change).await.unwrap();
            model.resize(new as usize, 0);
        }
        17 if !shape.data_file => {
            let at = at / shape.cluster * shape.cluster;
            let n = shape.cluster.min(len - at);
            let stamp = chance.clone().draw() as u8;
            let bytes: Vec<u8> = (0..n).map(|i| (i / 300) as u8 ^ stamp).collect();
            backend.write_compressed(at, Buf::from_slice(&bytes).iov()).await.unwrap();
            model[at as usize..(at + n) as usize].copy_from_slice(&bytes);
        }
        _ => at_once(chance, backend, model, at).await,
    }
}

/// Several concurrent writes, side by side in the same clusters.
async fn at_once(chance: &mut Chance, backend: &Backend, model: &mut [u8], at: u64) {
    let count = 2 + chance.below(8);
    let step = 1 + chance.below(1500);
    let mut writes = Vec::new();
    for i in 0..count {
        let start = at + i * step;
        let end = (start + step).min(model.len() as u64);
        if start >= end {
            break;
        }
        let bytes = vec![chance.draw() as u8 | 1; (end - start) as usize];
        model[start as usize..end as usize].copy_from_slice(&bytes);
        let iov = Buf::from_slice(&bytes).iov();
        writes.push(backend.write(start, iov, WriteFlags::empty()));
    }
    for result in join_all(writes).await {
        result.unwrap();
    }
}

fn run(seed: u64, shape: &Shape, ops: usize) {
    let sim = Sim::new(seed, SimConfig::default());
    make(&sim, shape);
    let mut model = model_of(&sim, shape);
    let mut chance = seeded(seed);
    for round in 0..3 {
        let graph = graph(&sim);
        sim.block_on(async {
            let mut how = options();
            if chance.below(2) == 0 {
                how.set("l2-cache-size", 1024);
                how.set("l2-cache-entry-size", 512);
                how.set("refcount-cache-size", 512);
            }
            let (node, backend) = open(&graph, how).await;
            for _ in 0..ops {
                one_op(&mut chance, &backend, &mut model, shape).await;
            }
            let now = read(&backend, 0, model.len()).await.unwrap();
            let wrong = now.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "seed {seed} round {round} {shape:?}");
            close(&graph, node, backend).await;
        });
        sim.run_until_idle();
    }
    if let Some((code, out)) = qemu_check(&sim) {
        assert_eq!(code, 0, "seed {seed} {shape:?}: {out}");
    }
}

/// Extreme parameters of the format, few operations each.
#[test]
fn random_operations_match_a_byte_model() {
    let shapes = [
        Shape::default(),
        Shape { cluster: 512, size: 300 << 10, ..Shape::default() },
        Shape { cluster: 512, size: 200 << 10, refcount_bits: 64, ..Shape::default() },
        Shape { cluster: 512, size: 200 << 10, refcount_bits: 1, ..Shape::default() },
        Shape { cluster: 65536, backing: true, ..Shape::default() },
        Shape { cluster: 4096, backing: true, zstd: true, ..Shape::default() },
        Shape { compat: "v2", ..Shape::default() },
        Shape { compat: "v2", backing: true, ..Shape::default() },
        Shape { cluster: 16384, extended_l2: true, ..Shape::default() },
        Shape { cluster: 65536, extended_l2: true, backing: true, ..Shape::default() },
        Shape { data_file: true, ..Shape::default() },
        Shape { cluster: 16384, data_file: true, extended_l2: true, ..Shape::default() },
        Shape { lazy: true, cluster: 512, size: 300 << 10, ..Shape::default() },
        Shape { cluster: 2 << 20, size: 8 << 20, ..Shape::default() },
    ];
    for seed in seeds(1) {
        for shape in &shapes {
            run(seed, shape, 60);
        }
    }
}
