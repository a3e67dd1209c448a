//! Changes the graph under load: two threads read and write while overlays and filters are added
//! and removed.
//!
//! ```text
//! reader ──► [overlay] ──► still disk       each block holds its number, for ever
//! writer ──► [filter]  ──► busy disk        each block holds what was written to it last
//! ```

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::options::Options;
use bds_core::request::{Backend, BackendOptions};
use bds_io::{Buf, IoVec};
use serde_json::{Value, json};

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Counts and times of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) requests: usize,
    pub(crate) changes: usize,
    /// How long a change held requests: maximum and median.
    pub(crate) longest: Duration,
    pub(crate) middle: Duration,
    seconds: f64,
}

impl Report {
    #[allow(dead_code, reason = "the test reads the fields")]
    #[expect(clippy::cast_precision_loss, reason = "requests of a bench fit a double")]
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "requests": self.requests, "changes": self.changes,
            "longest_us": self.longest.as_secs_f64() * 1e6,
            "middle_us": self.middle.as_secs_f64() * 1e6,
            "requests_per_s": self.requests as f64 / self.seconds,
        })
    }
}

fn number_of(block: usize, round: u64) -> u64 {
    block as u64 | round << 32
}

/// Fills a block with one number.
fn fill(iov: &IoVec, number: u64) {
    let bytes: Vec<u8> = number.to_le_bytes().repeat(BLOCK / 8);
    iov.copy_from(0, &bytes);
}

fn check(iov: &IoVec, number: u64) -> Result<(), Failure> {
    let bytes = iov.to_vec(0..BLOCK);
    match bytes.chunks_exact(8).all(|word| word == number.to_le_bytes()) {
        true => Ok(()),
        false => Err(format!("block {number:#x} holds something else").into()),
    }
}

fn offset(block: usize) -> u64 {
    (block * BLOCK) as u64
}

/// Reads every block repeatedly; each must hold its number.
fn read_all(disk: &Backend, until: &AtomicBool, count: &AtomicUsize) -> Result<(), Failure> {
    let buf = Buf::zeroed(BLOCK, BLOCK);
    bds_io::block_on(async {
        for block in (0..BLOCKS).cycle() {
            if until.load(Ordering::Relaxed) {
                return Ok(());
            }
            disk.read(offset(block), buf.iov()).await?;
            check(&buf.iov(), number_of(block, 0))?;
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })
}

/// Reads every block, which must hold what was written last, and writes the next number.
fn write_all(disk: &Backend, until: &AtomicBool, count: &AtomicUsize) -> Result<(), Failure> {
    let buf = Buf::zeroed(BLOCK, BLOCK);
    bds_io::block_on(async {
        for round in 0.. {
            for block in 0..BLOCKS {
                if until.load(Ordering::Relaxed) {
                    return Ok(());
                }
                disk.read(offset(block), buf.iov()).await?;
                check(&buf.iov(), number_of(block, round))?;
                fill(&buf.iov(), number_of(block, round + 1));
                disk.write(offset(block), buf.iov(), WriteFlags::empty()).await?;
                count.fetch_add(2, Ordering::Relaxed);
            }
        }
        Ok(())
    })
}

async fn disk(graph: &Graph, name: &str) -> Result<(NodeRef, Backend), Failure> {
    let size = BLOCK * BLOCKS;
    let options = json!({"driver": "mem", "node-name": name, "size": size});
    let node = graph.open(Options::from_json(options)?).await?;
    let backend = Backend::new(
        &node,
        BackendOptions { name: name.into(), writable: true, ..BackendOptions::default() },
    )?;
    let buf = Buf::zeroed(BLOCK, BLOCK);
    for block in 0..BLOCKS {
        fill(&buf.iov(), number_of(block, 0));
        backend.write(offset(block), buf.iov(), WriteFlags::empty()).await?;
    }
    Ok((node, backend))
}

/// Adds an overlay or a filter, waits for some requests, and removes it. Returns how long requests
/// were held.
async fn add_and_remove(
    graph: &Graph,
    node: &NodeRef,
    new: Value,
    stay: impl Future<Output = ()>,
) -> Result<[Duration; 2], Failure> {
    let new = graph.open(Options::from_json(new)?).await?;
    let came = graph.change().replace(node, &new).commit().await?;
    stay.await;
    let gone = graph.change().replace(&new, node).remove(new).commit().await?;
    for report in gone.closed {
        report.into_result()?;
    }
    Ok([came.held, gone.held])
}

/// Sends at least `requests` requests and changes the graph meanwhile. `dir` holds an empty
/// `layer1.qcow2` of 1 MiB.
pub(crate) fn run(dir: &Path, requests: usize) -> Result<Report, Failure> {
    let graph = Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())));
    let (still, reader) = bds_io::block_on(disk(&graph, "still"))?;
    let (busy, writer) = bds_io::block_on(disk(&graph, "busy"))?;
    let (until, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let start = bds_io::now();
    let changes = std::thread::scope(|scope| {
        let readers = scope.spawn(|| read_all(&reader, &until, &count));
        let writers = scope.spawn(|| write_all(&writer, &until, &count));
        let is_over = || readers.is_finished() || writers.is_finished();
        let changes = bds_io::block_on(change_until(&graph, [&still, &busy], dir, || {
            count.load(Ordering::Relaxed) >= requests || is_over()
        }));
        until.store(true, Ordering::Relaxed);
        readers.join().map_err(|_| "the reader panicked")??;
        writers.join().map_err(|_| "the writer panicked")??;
        changes
    })?;
    let seconds = (bds_io::now() - start).as_secs_f64();
    drop((reader, writer));
    bds_io::block_on(async {
        still.close().await?.into_result()?;
        busy.close().await?.into_result()?;
        Ok::<(), Failure>(())
    })?;
    let mut held = changes;
    held.sort();
    let longest = held.last().copied().unwrap_or_default();
    let middle = held.get(held.len() / 2).copied().unwrap_or_default();
    let requests = count.load(Ordering::Relaxed);
    Ok(Report { requests, changes: held.len(), longest, middle, seconds })
}

async fn change_until(
    graph: &Graph,
    [still, busy]: [&NodeRef; 2],
    dir: &Path,
    is_over: impl Fn() -> bool,
) -> Result<Vec<Duration>, Failure> {
    let mut held = Vec::new();
    let some = || async {
        for _ in 0..20 {
            bds_io::yield_now().await;
        }
    };
    while !is_over() || held.is_empty() {
        let file = json!({"driver": "file", "filename": dir.join("layer1.qcow2")});
        let overlay =
            json!({"driver": "qcow2", "node-name": "over", "backing": "still", "file": file});
        held.extend(add_and_remove(graph, still, overlay, some()).await?);
        let filter = json!({"driver": "raw", "node-name": "filter", "file": "busy"});
        held.extend(add_and_remove(graph, busy, filter, some()).await?);
    }
    Ok(held)
}
