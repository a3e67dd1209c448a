//! Power cuts, faults and dropped futures at every point of a workload.
//!
//! Promise under test: the image checks clean, leaks at most, and holds every flushed byte. A byte
//! written since the last flush may be old or new, and nothing else.

use std::cell::RefCell;
use std::collections::HashMap;

use bds_core::driver::{CheckReport, WriteFlags, ZeroFlags};
use bds_core::request::Backend;
use bds_io::sim::Fault;
use bds_io::{Buf, Sim, SimConfig};
use futures_util::future::join_all;

use super::harness::{Shape, close, graph, make, open, options, read, write};
use super::random::{model_of, seeded};
use crate::sweep::{is_full, seeds};

/// Possible values of each byte: the flushed value, and the values written since.
#[derive(Clone)]
pub(crate) struct Model {
    flushed: Vec<u8>,
    /// Values of requests that failed or were dropped: they may or may not be there, from now on.
    maybe: HashMap<usize, Vec<u8>>,
    /// Requests since the last flush, newest last.
    since: Vec<Request>,
}

#[derive(Clone)]
struct Request {
    at: usize,
    bytes: Vec<u8>,
    succeeded: bool,
}

impl Model {
    fn new(bytes: Vec<u8>) -> Self {
        Self { flushed: bytes, maybe: HashMap::new(), since: Vec::new() }
    }

    /// Starts a request; returns its number for `ended`.
    fn begin(&mut self, at: u64, bytes: Vec<u8>) -> usize {
        self.since.push(Request { at: at as usize, bytes, succeeded: false });
        self.since.len() - 1
    }

    fn ended(&mut self, request: usize, succeeded: bool) {
        self.since[request].succeeded = succeeded;
    }

    fn flush(&mut self, upto: usize) {
        for Request { at, bytes, succeeded } in self.since.drain(..upto) {
            for (i, byte) in bytes.iter().enumerate() {
                if succeeded {
                    self.flushed[at + i] = *byte;
                    self.maybe.remove(&(at + i));
                } else {
                    self.maybe.entry(at + i).or_default().push(*byte);
                }
            }
        }
    }

    /// Is every byte of `now` a possible value?
    fn check(&self, now: &[u8], what: &str) {
        let mut may: Vec<bool> = now.iter().zip(&self.flushed).map(|(a, b)| a == b).collect();
        for Request { at, bytes, .. } in &self.since {
            for (i, byte) in bytes.iter().enumerate() {
                may[at + i] |= now[at + i] == *byte;
            }
        }
        for (i, may) in may.iter().enumerate() {
            let (now, flushed) = (now[i], self.flushed[i]);
            let may = *may || self.maybe.get(&i).is_some_and(|m| m.contains(&now));
            assert!(may, "{what}: byte {i:#x} is {now:#x}, was flushed as {flushed:#x}");
        }
    }
}

/// Runs a workload until something fails. Values are never zero, so that lost data cannot look like
/// old data.
async fn work(backend: &Backend, model: &RefCell<Model>, seed: u64, ops: usize, cluster: u64) {
    let mut chance = seeded(seed);
    let len = model.borrow().flushed.len() as u64;
    for _ in 0..ops {
        let at = chance.below(len / 512) * 512;
        let n = (1 + chance.below(4 * cluster / 512).max(1)) * 512;
        let n = n.min(len - at);
        let begin = |at, bytes: &[u8]| model.borrow_mut().begin(at, bytes.to_vec());
        let ended = |request, ok| model.borrow_mut().ended(request, ok);
        match chance.below(12) {
            0..6 => {
                let bytes = vec![chance.draw() as u8 | 1; n as usize];
                let request = begin(at, &bytes);
                ended(request, write(backend, at, &bytes).await.is_ok());
            }
            6 => {
                let mut writes = Vec::new();
                for i in 0..4 {
                    let at = at.min(len - 2048) + i * 512;
                    let bytes = vec![chance.draw() as u8 | 1; 512];
                    let request = begin(at, &bytes);
                    let iov = Buf::from_slice(&bytes).iov();
                    writes.push(async move {
                        let done = backend.write(at, iov, WriteFlags::empty()).await;
                        ended(request, done.is_ok());
                    });
                }
                join_all(writes).await;
            }
            7 => {
                let request = begin(at, &vec![0; n as usize]);
                let done = backend.write_zeroes(at, n, ZeroFlags::MAY_UNMAP).await;
                ended(request, done.is_ok());
            }
            8 => {
                let at = at / cluster * cluster;
                let n = n.next_multiple_of(cluster).min(len - at);
                // Advisory: it may have done nothing.
                begin(at, &vec![0; n as usize]);
                let _ = backend.discard(at, n).await;
            }
            9 => {
                let at = at / cluster * cluster;
                let n = cluster.min(len - at);
                let bytes = vec![chance.draw() as u8 | 1; n as usize];
                let request = begin(at, &bytes);
                let iov = Buf::from_slice(&bytes).iov();
                ended(request, backend.write_compressed(at, iov).await.is_ok());
            }
            _ => {
                let upto = model.borrow().since.len();
                if backend.flush().await.is_ok() {
                    model.borrow_mut().flush(upto);
                }
            }
        }
    }
}

/// Opens the image read-only, compares, and runs our own check.
fn verify(sim: &Sim, model: &Model, shape: &Shape, what: &str) -> CheckReport {
    let graph = graph(sim);
    sim.block_on(async {
        let node = graph.open(options().with("read-only", true)).await.unwrap();
        let backend = Backend::new(&node, Default::default()).unwrap();
        let now = read(&backend, 0, model.flushed.len()).await.unwrap();
        model.check(&now, what);
        let report = backend.check(&|_, _| {}).await.unwrap();
        // With lazy refcounts the dirty bit says that they are wrong.
        if !shape.lazy {
            assert_eq!(
                (report.corruptions, report.check_errors),
                (0, 0),
                "{what}: {:?}",
                report.messages
            );
        }
        drop(backend);
        drop(node);
        graph.reap().await;
        report
    })
}

fn start(sim: &Sim, shape: &Shape, seed: u64, ops: usize) -> (Model, bool) {
    let model = RefCell::new(Model::new(model_of(sim, shape)));
    let graph = graph(sim);
    let ended = sim.run_until_cut(async {
        let mut how = options();
        if seed.is_multiple_of(2) {
            // Small caches: metadata is written back and loaded again often.
            how.set("l2-cache-size", 1024);
            how.set("l2-cache-entry-size", 512);
            how.set("refcount-cache-size", 512);
        }
        let (node, backend) = open(&graph, how).await;
        work(&backend, &model, seed, ops, shape.cluster).await;
        drop(backend);
        drop(node);
        graph.reap().await;
    });
    (model.into_inner(), ended.is_some())
}

fn shapes() -> Vec<Shape> {
    vec![
        Shape { cluster: 512, size: 96 << 10, ..Shape::default() },
        Shape {
            cluster: 512,
            size: 96 << 10,
            refcount_bits: 64,
            backing: true,
            ..Shape::default()
        },
        Shape { cluster: 4096, size: 256 << 10, backing: true, ..Shape::default() },
        Shape { cluster: 4096, size: 256 << 10, ..Shape::default() },
        Shape {
            cluster: 16384,
            size: 256 << 10,
            extended_l2: true,
            backing: true,
            ..Shape::default()
        },
        Shape { cluster: 4096, size: 128 << 10, lazy: true, ..Shape::default() },
        Shape {
            cluster: 4096,
            size: 128 << 10,
            backing: true,
            data_file: true,
            ..Shape::default()
        },
    ]
}

/// The default run visits every shape at some points; `BDS_TEST_BUDGET=full` visits every point,
/// with ten seeds.
fn step(usual: usize) -> usize {
    if is_full() { 1 } else { usual }
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    for (i, shape) in shapes().iter().enumerate() {
        for seed in seeds(1) {
            let seed = seed * 100 + i as u64;
            let base = Sim::new(seed, SimConfig::default());
            make(&base, shape);
            let whole = base.fork(seed);
            let (_, ended) = start(&whole, shape, seed, 40);
            assert!(ended);
            let writes = whole.writes();
            assert!(writes > 41, "{writes} writes in shape {i}");
            for cut in (0..writes).step_by(step(41)) {
                let sim = base.fork(seed);
                sim.cut_after_writes(Some(cut));
                let (model, _) = start(&sim, shape, seed, 40);
                for life in 0..2 {
                    let after = sim.after_cut(seed ^ life);
                    let what = format!("seed {seed} shape {i} cut {cut} life {life}");
                    verify(&after, &model, shape, &what);
                }
            }
        }
    }
}

#[test]
fn a_fault_anywhere_leaves_the_image_whole() {
    for (i, shape) in shapes().iter().enumerate() {
        for seed in seeds(1) {
            let seed = seed * 100 + i as u64;
            let base = Sim::new(seed, SimConfig::calm());
            make(&base, shape);
            let whole = base.fork(seed);
            start(&whole, shape, seed, 30);
            let ops = whole.ops();
            assert!(ops > 41, "{ops} operations in shape {i}");
            for n in (seed % 5..ops).step_by(step(41)) {
                for errno in [libc_eio(), libc_enospc()] {
                    let sim = base.fork(seed);
                    let model = RefCell::new(Model::new(model_of(&sim, shape)));
                    let graph = graph(&sim);
                    let what = format!("seed {seed} shape {i} fault {errno} at {n}");
                    sim.block_on(async {
                        let (node, backend) = open(&graph, options()).await;
                        sim.fail_nth(n, Fault::once(errno));
                        work(&backend, &model, seed, 30, shape.cluster).await;
                        sim.clear_faults();
                        // A failed flush is sticky in the file node: it matters that nothing is
                        // lost or torn.
                        if let Err(error) = backend.flush().await {
                            assert_eq!(error.errno(), errno, "{what}: {error}");
                        }
                        drop(backend);
                        drop(node);
                        graph.reap().await;
                    });
                    sim.run_until_idle();
                    verify(&sim, &model.into_inner(), shape, &what);
                }
            }
        }
    }
}

#[test]
fn a_dropped_future_leaves_the_image_whole() {
    for (i, shape) in shapes().iter().enumerate() {
        let seed = i as u64;
        let base = Sim::new(seed, SimConfig::calm());
        make(&base, shape);
        for forget in [false, true] {
            for n in (0..).step_by(step(17)) {
                let sim = base.fork(seed);
                let model = RefCell::new(Model::new(model_of(&sim, shape)));
                let graph = graph(&sim);
                let (node, backend) = sim.block_on(open(&graph, options()));
                let job = work(&backend, &model, seed, 20, shape.cluster);
                let go_on = if forget { sim.forget_at(job, n) } else { sim.drop_at(job, n) };
                let what = format!("shape {i} forget {forget} at {n}");
                if !forget {
                    sim.block_on(async {
                        // Everything else goes on.
                        write(&backend, 0, &[77; 5000]).await.unwrap();
                        assert_eq!(read(&backend, 0, 5000).await.unwrap(), vec![77; 5000]);
                        let request = model.borrow_mut().begin(0, vec![77; 5000]);
                        model.borrow_mut().ended(request, true);
                        let upto = model.borrow().since.len();
                        backend.flush().await.unwrap();
                        model.borrow_mut().flush(upto);
                        close(&graph, node, backend).await;
                    });
                    sim.run_until_idle();
                    let report = verify(&sim, &model.into_inner(), shape, &what);
                    assert_eq!(report.leaks, 0, "{what}: {:?}", report.messages);
                }
                if !go_on {
                    break;
                }
            }
        }
    }
}

fn libc_eio() -> i32 {
    5
}

fn libc_enospc() -> i32 {
    28
}
