//! What do the boundary and a handle look-up cost, and what is left of the Rust API's speed behind
//! a queue?
//!
//! Expected: a call with look-up below 30 ns; 4-KiB cached reads through a queue at depth 32 at
//! least 0.95 of the Rust API's.
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on fails")]

use std::ffi::CString;
use std::hint::black_box;
use std::ptr;

use bds_core::Options;
use bds_core::graph::{Graph, GraphConfig};
use bds_core::request::{Backend, BackendOptions};
use bds_ffi::backend::{bds_backend_create_on, bds_backend_length};
use bds_ffi::context::bds_context_create;
use bds_ffi::error::bds_error_status;
use bds_ffi::node::{bds_node_id, bds_node_open};
use bds_ffi::ptr::{Array, In, Out, Text};
use bds_ffi::queue::{bds_queue_create, bds_queue_poll, bds_queue_submit, bds_queue_wait};
use bds_ffi::{
    bds_backend, bds_completion, bds_context, bds_memory, bds_node, bds_opcode, bds_queue,
    bds_request,
};
use bds_io::Buf;
use bds_testkit::Scratch;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::future::join_all;

const DEPTH: usize = 32;
const LEN: usize = 4096;
const DISK_LEN: u64 = 16 << 20;

fn out<T>(place: &mut T) -> Out<T> {
    // SAFETY: a place of ours.
    unsafe { Out::new(place) }
}

fn none<T>() -> In<T> {
    // SAFETY: NULL is allowed where this is used.
    unsafe { In::new(ptr::null()) }
}

struct Objects {
    context: bds_context,
    node: bds_node,
    backend: bds_backend,
}

fn objects(options: &str) -> Objects {
    let words = CString::new(options).unwrap();
    let (mut context, mut node, mut backend) = Default::default();
    assert_eq!(bds_context_create(none(), out(&mut context)), 0);
    // SAFETY: a string that outlives the call.
    let text = unsafe { Text::new(words.as_ptr()) };
    assert_eq!(bds_node_open(context, text, out(&mut node)), 0);
    assert_eq!(bds_backend_create_on(node, none(), out(&mut backend)), 0);
    Objects { context, node, backend }
}

fn calls(criterion: &mut Criterion) {
    let Objects { node, backend, .. } = objects("driver=mem,size=1M");
    let mut group = criterion.benchmark_group("call");
    group.bench_function("boundary", |b| b.iter(|| black_box(bds_error_status())));
    let mut id = 0;
    group.bench_function("boundary-and-lookup", |b| {
        b.iter(|| black_box(bds_node_id(black_box(node), out(&mut id))));
    });
    let mut len = 0;
    group.bench_function("backend-length", |b| {
        b.iter(|| black_box(bds_backend_length(black_box(backend), out(&mut len))));
    });
    group.finish();
}

fn reads(criterion: &mut Criterion) {
    let scratch = Scratch::in_memory();
    let path = scratch.path("disk.raw");
    std::fs::write(&path, vec![1; usize::try_from(DISK_LEN).unwrap()]).unwrap();
    let options = format!("driver=file,filename={}", path.display());
    let mut group = criterion.benchmark_group("read-4k-depth-32");
    group.throughput(Throughput::Elements(DEPTH as u64));

    let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    let backend = bds_io::block_on(async {
        let node = graph.open(Options::parse(&options).unwrap()).await.unwrap();
        Backend::new(&node, BackendOptions::default()).unwrap()
    });
    let buffers: Vec<Buf> = (0..DEPTH).map(|_| Buf::zeroed(LEN, LEN)).collect();
    group.bench_function("rust", |b| {
        let mut at = 0;
        b.iter(|| {
            let requests = buffers.iter().map(|buffer| {
                at = (at + LEN as u64) % DISK_LEN;
                backend.read(at, buffer.iov())
            });
            for result in bds_io::block_on(join_all(requests)) {
                result.unwrap();
            }
        });
    });

    let objects = objects(&options);
    let mut queue = bds_queue::default();
    assert_eq!(bds_queue_create(objects.context, none(), out(&mut queue)), 0);
    let mut memory = vec![[0u8; LEN]; DEPTH];
    let mut requests: Vec<bds_request> =
        memory.iter_mut().map(|buffer| request(objects.backend, buffer)).collect();
    let mut done = [bds_completion {
        user_data: 0,
        request_id: 0,
        status: 0,
        flags: 0,
        value: 0,
        reserved: [0; 4],
    }; DEPTH];
    group.bench_function("queue", |b| {
        let mut at = 0;
        b.iter(|| {
            for request in &mut requests {
                at = (at + LEN as u64) % DISK_LEN;
                request.offset = at;
            }
            // SAFETY: ours; the buffers outlive the completions, which are taken below.
            let (submitted, completed) =
                unsafe { (Array::new(requests.as_mut_ptr()), Array::new(done.as_mut_ptr())) };
            assert_eq!(bds_queue_submit(queue, submitted, DEPTH), 32);
            let mut left = 32 - bds_queue_poll(queue, completed, DEPTH);
            while left > 0 {
                left -= bds_queue_wait(queue, completed, DEPTH, 1, -1);
            }
        });
    });
    group.finish();
}

fn request(backend: bds_backend, buffer: &mut [u8; LEN]) -> bds_request {
    bds_request {
        opcode: bds_opcode::BDS_OP_READ as u32,
        flags: 0,
        backend,
        offset: 0,
        bytes: LEN as u64,
        user_data: 0,
        buffer: buffer.as_mut_ptr().cast(),
        iov: ptr::null(),
        iovcnt: 0,
        target: bds_backend::default(),
        target_offset: 0,
        memory: bds_memory::default(),
        request_id: 0,
        reserved: [0; 4],
    }
}

criterion_group!(benches, calls, reads);
criterion_main!(benches);
