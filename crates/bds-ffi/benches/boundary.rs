//! What do the boundary and a handle look-up cost, and what is left of the Rust API's speed behind
//! a queue?
//!
//! Expected: a call with look-up below 30 ns; 4-KiB cached reads through a queue at depth 32 at
//! least 0.95 of the Rust API's. Contestants take turns, in slices of 10 ms; `cargo xtask bench
//! --only ffi` puts the table into its report.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench prints figures, and one that cannot go on fails"
)]

use std::ffi::CString;
use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

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
use futures_util::future::join_all;

const ROUNDS: usize = 41;
const WARM_UP: usize = 3;
/// How long a contestant runs before the next one's turn.
const SLICE: Duration = Duration::from_millis(10);
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

/// A contestant: does its work once and says how many operations that was.
type Contestant<'a> = (&'static str, Box<dyn FnMut() -> usize + 'a>);

/// Runs all contestants in turn, round after round, another one first each time, and prints the
/// median, minimum and maximum of each, and its speed beside the first.
fn compare(title: &str, contestants: &mut [Contestant<'_>]) {
    let mut costs = vec![Vec::with_capacity(ROUNDS); contestants.len()];
    for round in 0..ROUNDS + WARM_UP {
        for turn in 0..contestants.len() {
            let index = (round + turn) % contestants.len();
            let began = Instant::now();
            let mut operations = 0;
            while began.elapsed() < SLICE {
                operations += (contestants[index].1)();
            }
            let nanoseconds = began.elapsed().as_nanos() as f64;
            if round >= WARM_UP {
                costs[index].push(nanoseconds / operations as f64);
            }
        }
    }
    let mut first = None;
    for ((name, _), costs) in contestants.iter().zip(&mut costs) {
        costs.sort_by(f64::total_cmp);
        let (min, median, max) = (costs[0], costs[costs.len() / 2], costs[costs.len() - 1]);
        let first = *first.get_or_insert(median);
        println!(
            "| {title} | {name} | {median:.1} ({min:.1} to {max:.1}) | {:.2} |",
            first / median
        );
    }
}

/// Calls of one slice between two looks at the clock.
const CALLS: usize = 1000;

fn calls() {
    let Objects { node, backend, .. } = objects("driver=mem,size=1M");
    let (mut id, mut len) = (0, 0);
    let repeat = |call: &mut dyn FnMut() -> i32| {
        (0..CALLS).for_each(|_| {
            black_box(call());
        });
        CALLS
    };
    let mut boundary = || repeat(&mut || bds_error_status());
    compare("call", &mut [("boundary", Box::new(&mut boundary))]);
    let mut look_up = || repeat(&mut || bds_node_id(black_box(node), out(&mut id)));
    compare("call", &mut [("boundary and look-up", Box::new(&mut look_up))]);
    let mut length = || repeat(&mut || bds_backend_length(black_box(backend), out(&mut len)));
    compare("call", &mut [("length of a backend", Box::new(&mut length))]);
}

/// The Rust API and a queue, on one kind of disk.
fn reads(title: &str, options: &str) {
    let graph = Graph::new(GraphConfig::new(bds_drivers::registry().into()));
    let backend = bds_io::block_on(async {
        let node = graph.open(Options::parse(options).unwrap()).await.unwrap();
        Backend::new(&node, BackendOptions::default()).unwrap()
    });
    let buffers: Vec<Buf> = (0..DEPTH).map(|_| Buf::zeroed(LEN, LEN)).collect();
    let mut at = 0;
    let rust = || {
        let requests = buffers.iter().map(|buffer| {
            at = (at + LEN as u64) % DISK_LEN;
            backend.read(at, buffer.iov())
        });
        for result in bds_io::block_on(join_all(requests)) {
            result.unwrap();
        }
        DEPTH
    };
    let mut direct_at = 0;
    let direct = || {
        for buffer in &buffers {
            direct_at = (direct_at + LEN as u64) % DISK_LEN;
            match backend.try_read(direct_at, &buffer.iov()) {
                Some(result) => result.unwrap(),
                None => bds_io::block_on(backend.read_waiting(direct_at, buffer.iov())).unwrap(),
            }
        }
        DEPTH
    };

    let objects = objects(options);
    let mut queue = bds_queue::default();
    assert_eq!(bds_queue_create(objects.context, none(), out(&mut queue)), 0);
    let mut memory: Vec<Buffer> = (0..DEPTH).map(|_| Buffer([0; LEN])).collect();
    let mut requests: Vec<bds_request> =
        memory.iter_mut().map(|buffer| request(objects.backend, &mut buffer.0)).collect();
    let mut done = [NO_COMPLETION; DEPTH];
    let mut queue_at = 0;
    let queued = || {
        for request in &mut requests {
            queue_at = (queue_at + LEN as u64) % DISK_LEN;
            request.offset = queue_at;
        }
        // SAFETY: ours; the buffers outlive the completions, which are taken below.
        let (submitted, completed) =
            unsafe { (Array::new(requests.as_mut_ptr()), Array::new(done.as_mut_ptr())) };
        assert_eq!(bds_queue_submit(queue, submitted, DEPTH), 32);
        let mut left = 32 - bds_queue_poll(queue, completed, DEPTH);
        while left > 0 {
            left -= bds_queue_wait(queue, completed, DEPTH, 1, -1);
        }
        DEPTH
    };
    compare(
        title,
        &mut [
            ("Rust API, 32 futures", Box::new(rust)),
            ("bds_queue, depth 32", Box::new(queued)),
            ("Rust API, try_read one by one", Box::new(direct)),
        ],
    );
}

/// A buffer aligned as the Rust API's are.
#[repr(align(4096))]
struct Buffer([u8; LEN]);

const NO_COMPLETION: bds_completion =
    bds_completion { user_data: 0, request_id: 0, status: 0, flags: 0, value: 0, reserved: [0; 4] };

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
        base: bds_node::default(),
        reserved: [0; 3],
    }
}

fn main() {
    println!("| what | by | ns each: median (min to max) | speed |");
    println!("|---|---|---:|---:|");
    calls();
    reads("4-KiB read, memory", &format!("driver=mem,size={DISK_LEN}"));
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    std::fs::write(&path, vec![1; usize::try_from(DISK_LEN).unwrap()]).unwrap();
    // Read-only: both contestants have it open.
    let options = format!("driver=file,read-only=on,filename={}", path.display());
    reads("4-KiB read, cached file", &options);
}
