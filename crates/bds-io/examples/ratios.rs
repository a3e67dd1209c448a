//! Measures the cost of bds-io on top of the bare system calls: interleaved medians, ns and CPU ns
//! an operation.
//!
//! `cargo run --release -p bds-io --example ratios [directory] [rounds]`
//!
//! Expected on a virtual machine of 2025 with ext4: bare pread 0.8–1 µs, `try_read` within 5 %, a
//! read through the ring at depth 32 within 1.5 × of the bare pread; small buffered writes inline 3
//! to 10 × cheaper than through the ring, which hands them to a kernel thread on file systems
//! without non-blocking writes.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a measurement for people")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bds_io::{
    Buf, BufPool, Context, ContextOptions, EngineKind, File, Fs, OpenOptions, block_on, spawn,
};

const FILE_LEN: u64 = 256 << 20;
const BLOCK_LEN: usize = 4096;

/// CPU time of the whole process, kernel threads that work for it included.
fn cpu() -> Duration {
    let usage = nix_usage();
    Duration::from_micros(usage)
}

fn nix_usage() -> u64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let own = text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    // Only the main thread is in /proc/self/schedstat; add the others.
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let all: u64 = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()))
        .sum();
    all.max(own) / 1000
}

/// A block somewhere in the file, the same ones each round.
fn offsets(count: usize) -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..count).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (FILE_LEN / BLOCK_LEN as u64) * BLOCK_LEN as u64
    })
}

struct Subject {
    name: &'static str,
    count: usize,
    run: Box<dyn Fn(usize)>,
    samples: Vec<(f64, f64)>,
}

impl Subject {
    fn new(name: &'static str, count: usize, run: impl Fn(usize) + 'static) -> Subject {
        Subject { name, count, run: Box::new(run), samples: Vec::new() }
    }

    fn round(&mut self) {
        let (start, cpu_before) = (Instant::now(), cpu());
        (self.run)(self.count);
        let per = |time: Duration| time.as_nanos() as f64 / self.count as f64;
        self.samples.push((per(start.elapsed()), per(cpu() - cpu_before)));
    }

    fn median(&mut self) -> (f64, f64) {
        let middle = self.samples.len() / 2;
        self.samples.sort_by(|a, b| a.0.total_cmp(&b.0));
        let elapsed = self.samples[middle].0;
        self.samples.sort_by(|a, b| a.1.total_cmp(&b.1));
        (elapsed, self.samples[middle].1)
    }
}

fn reads_at_depth(context: &Context, file: &File, depth: usize, count: usize, inline: bool) {
    let all: Vec<u64> = offsets(count).collect();
    context.block_on(async {
        let pool = BufPool::new(1 << 20);
        let tasks: Vec<_> = all
            .chunks(count.div_ceil(depth))
            .map(|part| {
                let (file, part, pool) = (file.clone(), part.to_vec(), pool.clone());
                spawn(async move {
                    let iov = pool.take_iov(BLOCK_LEN);
                    for offset in part {
                        let read = match inline.then(|| file.try_read(offset, &iov)).flatten() {
                            Some(read) => read,
                            None => file.read(offset, iov.clone()).await,
                        };
                        assert_eq!(read.unwrap(), BLOCK_LEN);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
}

fn writes(context: &Context, file: &File, count: usize, len: usize) {
    context.block_on(async {
        let iov = Buf::zeroed(len, 4096).iov();
        for offset in offsets(count) {
            let offset = offset.min(FILE_LEN - len as u64);
            assert_eq!(file.write(offset, iov.clone(), false).await.unwrap(), len);
        }
    });
}

fn open(path: &Path, direct: bool, inline_write_max_bytes: Option<u32>) -> File {
    let options = OpenOptions { write: true, direct, inline_write_max_bytes, ..Default::default() };
    Fs::Host.open(path, &options).unwrap()
}

fn bare_reads(path: &Path, direct: bool) -> impl Fn(usize) + 'static {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap();
    move |count| {
        let mut buf = Buf::zeroed(BLOCK_LEN, 4096);
        let bytes = buf.get_mut().unwrap();
        for offset in offsets(count) {
            assert_eq!(file.read_at(bytes, offset).unwrap(), BLOCK_LEN);
        }
    }
}

fn context(engine: EngineKind) -> &'static Context {
    Box::leak(Box::new(
        Context::new(ContextOptions { engine, ..ContextOptions::default() }).unwrap(),
    ))
}

fn subjects(path: &Path) -> Vec<Subject> {
    let (ring, pool) = (context(EngineKind::Uring), context(EngineKind::Pool));
    let file = open(path, false, None);
    let direct = open(path, true, None);
    let mut list = vec![Subject::new("cached: bare pread", 40_000, bare_reads(path, false))];
    let mut read = |name, count, context: &'static Context, file: &File, depth, inline| {
        let file = file.clone();
        list.push(Subject::new(name, count, move |count| {
            reads_at_depth(context, &file, depth, count, inline);
        }));
    };
    read("cached: try_read", 40_000, ring, &file, 1, true);
    read("cached: ring, depth 1", 40_000, ring, &file, 1, false);
    read("cached: ring, depth 32", 40_000, ring, &file, 32, false);
    read("cached: pool, depth 1", 4000, pool, &file, 1, false);
    read("cached: pool, depth 32", 8000, pool, &file, 32, false);
    read("direct: ring, depth 1", 2000, ring, &direct, 1, false);
    read("direct: ring, depth 32", 16_000, ring, &direct, 32, false);
    list.push(Subject::new("direct: bare pread", 2000, bare_reads(path, true)));
    let plain = file.clone();
    list.push(Subject::new("cached: block_on a read", 20_000, move |count| {
        let iov = Buf::zeroed(BLOCK_LEN, 4096).iov();
        for offset in offsets(count) {
            assert_eq!(block_on(plain.read(offset, iov.clone())).unwrap(), BLOCK_LEN);
        }
    }));
    let sizes = [
        ("write 4K inline", "write 4K by the ring", 4 << 10),
        ("write 64K inline", "write 64K by the ring", 64 << 10),
        ("write 256K inline", "write 256K by the ring", 256 << 10),
        ("write 2M inline", "write 2M by the ring", 2 << 20),
    ];
    for (inline, by_ring, len) in sizes {
        for (name, max) in [(inline, u32::MAX), (by_ring, 0)] {
            let file = open(path, false, Some(max));
            let count = (8 << 20) / len + 40;
            list.push(Subject::new(name, count, move |count| writes(ring, &file, count, len)));
        }
    }
    list
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let rounds: usize = arguments.next().map_or(9, |rounds| rounds.parse().unwrap());
    let path = directory.join(format!("bds-ratios-{}", std::process::id()));
    let block = vec![0x5a; 1 << 20];
    let fill = std::fs::File::create(&path).unwrap();
    for offset in (0..FILE_LEN).step_by(1 << 20) {
        fill.write_all_at(&block, offset).unwrap();
    }
    fill.sync_all().unwrap();
    let mut subjects = subjects(&path);
    for _ in 0..rounds {
        subjects.iter_mut().for_each(Subject::round);
    }
    println!("{:<26}{:>12}{:>12}{:>10}", "", "ns/op", "CPU ns/op", "x bare");
    let mut bare = 0.0;
    for subject in &mut subjects {
        let (elapsed, cpu) = subject.median();
        if subject.name == "cached: bare pread" {
            bare = elapsed;
        }
        println!("{:<26}{elapsed:>12.0}{cpu:>12.0}{:>10.2}", subject.name, elapsed / bare);
    }
    let _ = std::fs::remove_file(&path);
}
