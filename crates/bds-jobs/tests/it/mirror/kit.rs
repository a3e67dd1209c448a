//! The world of the mirror tests: a simulated disk, a graph with its jobs, images, and clients that
//! write stamps and remember what was acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef, Perm};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Sim, SimConfig, Task};
use bds_jobs::JobManager;
use bds_testkit::Chance;

/// Length of the disks in bytes.
pub(crate) const LEN: u64 = 256 << 10;

/// A simulated disk with a graph and its jobs.
pub(crate) struct World {
    pub(crate) sim: Sim,
    pub(crate) graph: Graph,
    pub(crate) manager: JobManager,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::on(Sim::new(seed, SimConfig::calm()))
    }

    pub(crate) fn on(sim: Sim) -> Self {
        let mut config = GraphConfig::new(bds_drivers::registry().into());
        config.fs = sim.fs();
        let graph = Graph::new(config);
        let manager = JobManager::new(&graph);
        Self { sim, graph, manager }
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.sim.block_on(future)
    }

    /// Puts a raw file there.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        self.sim.put_file(format!("/{name}"), bytes);
    }

    /// Opens a raw image that was [put](World::put) there.
    pub(crate) async fn raw(&self, name: &str) -> NodeRef {
        self.open(&format!(
            "driver=raw,node-name={name},discard=unmap,file.driver=file,file.filename=/{name}"
        ))
        .await
    }

    /// Makes a qcow2 image.
    pub(crate) async fn make_qcow2(&self, name: &str, create: &str) {
        let options = Options::parse(create).expect("well-formed");
        let path = format!("/{name}").into();
        let image = NewImage { format: "qcow2".into(), path, options, skip_backing: true };
        self.graph.create_image(image).await.expect("it can be made");
    }

    /// Opens a qcow2 image that was made.
    pub(crate) async fn qcow2(&self, name: &str, more: &str) -> NodeRef {
        self.open(&format!(
            "driver=qcow2,node-name={name},discard=unmap,file.driver=file,file.filename=/{name}{more}"
        ))
        .await
    }

    pub(crate) async fn open(&self, options: &str) -> NodeRef {
        let options = Options::parse(options).expect("well-formed");
        self.graph.open(options).await.expect("it can be opened")
    }

    /// Ends everything, and checks that nothing is left.
    pub(crate) fn end(self) {
        self.block_on(self.graph.shutdown()).check_leaks().expect("no leaks");
    }
}

/// The graph without the lengths of nodes, since files grow, and without the test's references.
pub(crate) fn shape(graph: &Graph) -> String {
    let is_kept = |word: &&str| !word.starts_with("len=") && !word.starts_with("refs=");
    let of_line = |line: &str| line.split(' ').filter(is_kept).collect::<Vec<_>>().join(" ");
    let dump = graph.dump();
    let lines = dump.lines().filter(|line| !line.contains("held by owner 'open'"));
    lines.map(of_line).collect::<Vec<_>>().join("\n")
}

/// A writer of a node.
pub(crate) fn writer(node: &NodeRef, name: &str) -> Backend {
    try_writer(node, name).expect("it can be written")
}

pub(crate) fn try_writer(node: &NodeRef, name: &str) -> Result<Backend> {
    let options = BackendOptions { name: name.into(), writable: true, ..Default::default() };
    Backend::new(node, options)
}

/// All bytes of a node, without a promise that they are consistent.
pub(crate) async fn bytes_of(node: &NodeRef) -> Vec<u8> {
    let options = BackendOptions { perm: Some(Perm::empty()), ..Default::default() };
    let reader = Backend::new(node, options).expect("it can be read");
    read(&reader, 0, reader.len()).await
}

pub(crate) async fn read(backend: &Backend, offset: u64, len: u64) -> Vec<u8> {
    let iov = Buf::zeroed(usize::try_from(len).expect("small"), 4096).iov();
    iov.fill(0..iov.len(), 0xee);
    backend.read(offset, iov.clone()).await.expect("it can be read");
    iov.to_vec(0..iov.len())
}

pub(crate) async fn write(backend: &Backend, offset: u64, bytes: &[u8]) -> Result<()> {
    backend.write(offset, Buf::from_slice(bytes).iov(), WriteFlags::empty()).await
}

/// The first bytes that differ, for messages.
pub(crate) fn first_difference(a: &[u8], b: &[u8]) -> Option<String> {
    let at = a.iter().zip(b).position(|(a, b)| a != b)?;
    let count = a.iter().zip(b).filter(|(a, b)| a != b).count();
    Some(format!("{count} bytes differ, the first at {at:#x}: {:#x} and {:#x}", a[at], b[at]))
}

/// Pseudo-random bytes with holes of zeros.
pub(crate) fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    for piece in bytes.chunks_mut(4096) {
        if !chance.one_in(3) {
            let byte = u8::try_from(chance.between(1, 255)).expect("a byte");
            piece.fill(byte);
        }
    }
    bytes
}

/// What a client does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) seed: u64,
    /// Its number, and how many share the disk.
    pub(crate) slot: u64,
    pub(crate) of: u64,
    /// Bytes of a cell; cells go round among the clients.
    pub(crate) cell: u64,
    /// Zero writes and discards too.
    pub(crate) unmaps: bool,
    /// Longest pause between two requests.
    pub(crate) pause_us: u64,
}

/// A client that writes to its own cells, one request at a time, until it is stopped.
pub(crate) struct Client {
    pub(crate) backend: Backend,
    habits: Habits,
    /// What was acknowledged, of the whole disk; only own cells count.
    expected: Vec<u8>,
    pub(crate) acknowledged: u64,
    stop: Arc<AtomicBool>,
}

/// A client that runs.
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    task: Task<Client>,
}

impl Running {
    /// Stops it after its request under way.
    pub(crate) async fn stop(self) -> Client {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await
    }
}

impl Client {
    /// A client of a disk that holds these bytes.
    pub(crate) fn new(backend: Backend, expected: Vec<u8>, habits: Habits) -> Self {
        Self { backend, habits, expected, acknowledged: 0, stop: Arc::default() }
    }

    pub(crate) fn start(self) -> Running {
        let stop = Arc::clone(&self.stop);
        Running { stop, task: bds_io::spawn(self.run()) }
    }

    async fn run(mut self) -> Self {
        let mut chance = Chance::new(self.habits.seed);
        while !self.stop.load(Ordering::SeqCst) {
            self.step(&mut chance).await;
            bds_io::sleep(Duration::from_micros(chance.below(self.habits.pause_us + 1))).await;
        }
        self
    }

    async fn step(&mut self, chance: &mut Chance) {
        let Habits { slot, of, cell, unmaps, .. } = self.habits;
        let cells = (LEN / cell).max(1);
        let own = chance.below(cells.div_ceil(of)) * of + slot;
        let start = (own * cell).min(LEN - 1);
        let end = (start + cell).min(LEN);
        if own >= cells {
            return;
        }
        let mut offset = chance.between(start, end - 1);
        let mut len = chance.between(1, (end - offset).min(12 << 10));
        if !chance.one_in(3) {
            // Sectors, as guests do.
            offset -= (offset - start) % 512;
            len = len.next_multiple_of(512).min(end - offset);
        }
        let index = |at: u64| usize::try_from(at).expect("small");
        let range = index(offset)..index(offset + len);
        match chance.below(if unmaps { 10 } else { 7 }) {
            0 => self.backend.flush().await.expect("it can be flushed"),
            7 | 8 => {
                let flags =
                    if chance.one_in(2) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                let _done = self.backend.write_zeroes(offset, len, flags).await.expect("zeroed");
                self.expected[range].fill(0);
            }
            9 => {
                self.backend.discard(offset, len).await.expect("discarded");
                // What it reads as now is the disk's choice, but it stays so.
                let bytes = read(&self.backend, offset, len).await;
                self.expected[range].copy_from_slice(&bytes);
            }
            _ => {
                let stamp = u8::try_from(chance.between(1, 255)).expect("a byte");
                let bytes = vec![stamp; range.len()];
                write(&self.backend, offset, &bytes).await.expect("written");
                self.expected[range].copy_from_slice(&bytes);
            }
        }
        self.acknowledged += 1;
    }

    /// Checks that everything that was acknowledged is there.
    pub(crate) async fn check(&self) -> std::result::Result<(), String> {
        self.check_bytes(&read(&self.backend, 0, LEN).await)
    }

    /// As [`Client::check`], for the bytes of a disk.
    pub(crate) fn check_bytes(&self, found: &[u8]) -> std::result::Result<(), String> {
        let Habits { slot, of, cell, .. } = self.habits;
        for (number, (found, expected)) in found
            .chunks(usize::try_from(cell).expect("small"))
            .zip(self.expected.chunks(usize::try_from(cell).expect("small")))
            .enumerate()
        {
            if number as u64 % of == slot
                && (number as u64) < LEN / cell
                && let Some(difference) = first_difference(found, expected)
            {
                let at = number as u64 * cell;
                return Err(format!("client {slot}: cell at {at:#x}: {difference}"));
            }
        }
        Ok(())
    }
}
