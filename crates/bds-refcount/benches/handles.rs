//! Measures clone and drop of a reference, acquire by handle and check of a handle, beside `Arc`,
//! `Weak`, `slotmap` and `sharded-slab`. Expected: a pair (clone and drop, acquire and release)
//! takes two atomic operations: 5 to 12 ns alone and on separate objects, 20 to 40 contended; a
//! check below 2 ns.
//!
//! For ratios on a noisy machine use `examples/ratios.rs`, which interleaves.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; the group macro documents nothing"
)]

use std::{
    hint::{black_box, spin_loop},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bds_refcount::{Arena, Handle, Kind, Strong};
use criterion::{Criterion, criterion_group, criterion_main};
use slotmap::SlotMap;

type Value = [u64; 32];

#[derive(Clone, Copy)]
struct Setting {
    name: &'static str,
    threads: usize,
    /// Each thread has an object of its own.
    spread: bool,
}

const SETTINGS: [Setting; 3] = [
    Setting { name: "alone", threads: 1, spread: false },
    Setting { name: "contended", threads: 2, spread: false },
    Setting { name: "two_objects", threads: 2, spread: true },
];

/// Time for `rounds` operations on each thread: the slowest thread's. `op` gets 0 or 1, the object
/// to use.
fn timed(setting: Setting, rounds: u64, op: impl Fn(usize) + Sync) -> Duration {
    let ready = AtomicUsize::new(0);
    let run = |thread: usize| {
        let object = if setting.spread { thread } else { 0 };
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < setting.threads {
            spin_loop();
        }
        let start = Instant::now();
        for _ in 0..rounds {
            op(object);
        }
        start.elapsed()
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..setting.threads).map(|n| scope.spawn(move || run(n))).collect();
        let own = run(0);
        others.into_iter().map(|t| t.join().unwrap()).fold(own, Duration::max)
    })
}

fn arena() -> (Arena<Value>, Vec<Strong<Value>>, [Handle<Value>; 2]) {
    let arena = Arena::new(Kind::new(1));
    let all: Vec<_> = (0..1000).map(|_| arena.insert([0; 32]).unwrap()).collect();
    let handles = [all[500].handle(), all[700].handle()];
    (arena, all, handles)
}

fn counting(c: &mut Criterion) {
    let (_arena, all, _) = arena();
    let strongs = [&all[500], &all[700]];
    let arcs: [Arc<Value>; 2] = [Arc::new([0; 32]), Arc::new([0; 32])];
    for setting in SETTINGS {
        let mut group = c.benchmark_group(format!("clone_drop/{}", setting.name));
        group.bench_function("strong", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| drop(black_box(Strong::clone(black_box(strongs[o])))))
            });
        });
        group.bench_function("arc", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| drop(black_box(Arc::clone(black_box(&arcs[o])))))
            });
        });
        group.finish();
    }
}

fn acquiring(c: &mut Criterion) {
    let (arena, _all, handles) = arena();
    let arcs: [Arc<Value>; 2] = [Arc::new([0; 32]), Arc::new([0; 32])];
    let weaks: Vec<Weak<Value>> = arcs.iter().map(Arc::downgrade).collect();
    let sharded = sharded_slab::Slab::new();
    let keys: Vec<usize> = (0..1000).map(|_| sharded.insert([0_u64; 32]).unwrap()).collect();
    for setting in SETTINGS {
        let mut group = c.benchmark_group(format!("acquire_release/{}", setting.name));
        group.bench_function("arena", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| drop(arena.acquire(black_box(handles[o])).map(black_box)))
            });
        });
        group.bench_function("weak", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| drop(Weak::upgrade(black_box(&weaks[o])).map(black_box)))
            });
        });
        group.bench_function("sharded_slab", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| {
                    drop(sharded.get(black_box(keys[500 + 200 * o])).map(black_box))
                })
            });
        });
        group.finish();
    }
}

fn checking(c: &mut Criterion) {
    let (arena, _all, handles) = arena();
    let mut map = SlotMap::new();
    let keys: Vec<_> = (0..1000).map(|_| map.insert([0_u64; 32])).collect();
    for setting in SETTINGS {
        let mut group = c.benchmark_group(format!("check/{}", setting.name));
        group.bench_function("arena", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| {
                    let _ = black_box(arena.check(black_box(handles[o])));
                })
            });
        });
        group.bench_function("slotmap_get", |b| {
            b.iter_custom(|n| {
                timed(setting, n, |o| {
                    black_box(map.get(black_box(keys[500 + 200 * o])));
                })
            });
        });
        group.finish();
    }
}

fn whole_life(c: &mut Criterion) {
    let arena = Arena::new(Kind::new(1));
    let mut map = SlotMap::new();
    let mut group = c.benchmark_group("insert_release_reap");
    group.bench_function("arena", |b| {
        b.iter(|| {
            drop(arena.insert(black_box([0_u64; 32])));
            arena.reap_all()
        });
    });
    group.bench_function("arc", |b| b.iter(|| drop(black_box(Arc::new([0_u64; 32])))));
    group.bench_function("slotmap", |b| {
        b.iter(|| {
            let key = map.insert(black_box([0_u64; 32]));
            map.remove(key)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(30);
    targets = counting, acquiring, checking, whole_life
}
criterion_main!(benches);
