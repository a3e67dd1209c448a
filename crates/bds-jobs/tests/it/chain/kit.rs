//! A chain of images on a simulated disk, with the bytes that each image shows, and a guest.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Fs, Sim, SimConfig};
use bds_jobs::{JobDriver, JobManager, JobOptions};
use bds_testkit::{Chance, DiskModel, Ended, Op, Shape, Step, Workload, pattern};
use futures_util::future::join_all;
use serde_json::json;

pub(crate) use crate::budget::is_full;

/// One image of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    pub(crate) name: &'static str,
    pub(crate) len: u64,
    /// 0: a raw image.
    pub(crate) cluster: u64,
    pub(crate) version: u32,
    pub(crate) extended: bool,
}

impl Layer {
    pub(crate) fn raw(name: &'static str, len: u64) -> Self {
        Self { name, len, cluster: 0, version: 3, extended: false }
    }

    pub(crate) fn qcow2(name: &'static str, len: u64, cluster: u64) -> Self {
        Self { cluster, ..Self::raw(name, len) }
    }

    fn is_raw(self) -> bool {
        self.cluster == 0
    }
}

/// A chain, the base first, and what each image shows.
#[derive(Clone)]
pub(crate) struct Chain {
    pub(crate) layers: Vec<Layer>,
    pub(crate) views: Vec<Vec<u8>>,
    dir: PathBuf,
}

pub(crate) fn usize_of(n: u64) -> usize {
    usize::try_from(n).expect("small")
}

/// A simulated disk that tears nothing inside a sector.
pub(crate) fn world(seed: u64) -> Sim {
    Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() })
}

pub(crate) fn graph_on(fs: Fs) -> Graph {
    let gate = Arc::new(TrustAll { may_probe: false });
    let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    Graph::new(GraphConfig { fs, gate, max_depth: 200, max_nodes_per_image: 400, ..config })
}

pub(crate) fn writer(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { name: name.into(), writable: true, ..Default::default() };
    Backend::new(node, options).unwrap()
}

pub(crate) fn reader(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { name: name.into(), ..Default::default() };
    Backend::new(node, options).unwrap()
}

pub(crate) async fn read_all(backend: &Backend) -> Vec<u8> {
    let len = usize_of(backend.len());
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, 0xee);
    backend.read(0, iov.clone()).await.unwrap();
    iov.to_vec(0..len)
}

impl Chain {
    pub(crate) fn new(layers: &[Layer]) -> Self {
        Self { layers: layers.to_vec(), views: Vec::new(), dir: "/disks".into() }
    }

    pub(crate) fn in_dir(layers: &[Layer], dir: &Path) -> Self {
        Self { dir: dir.to_owned(), ..Self::new(layers) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the images with random contents: data, zeros, compressed clusters.
    pub(crate) async fn make(mut self, fs: Fs, seed: u64) -> Self {
        let graph = graph_on(fs);
        let mut chance = Chance::new(seed);
        let mut below: Option<&'static str> = None;
        let mut view = Vec::new();
        for layer in self.layers.clone() {
            let mut options = json!({"size": layer.len});
            if !layer.is_raw() {
                options["cluster_size"] = json!(layer.cluster);
                options["extended_l2"] = json!(layer.extended);
                options["compat"] = json!(if layer.version == 2 { "0.10" } else { "1.1" });
            }
            if let Some(below) = below {
                let is_raw = self.layers.iter().any(|l| l.name == below && l.is_raw());
                options["backing_file"] = json!(below);
                options["backing_fmt"] = json!(if is_raw { "raw" } else { "qcow2" });
            }
            let format = if layer.is_raw() { "raw" } else { "qcow2" };
            let options = Options::from_json(options).unwrap();
            let (path, format) = (self.path(layer.name), format.into());
            let image = NewImage { format, path, options, skip_backing: false };
            graph.create_image(image).await.unwrap();
            view.resize(usize_of(layer.len), 0);
            self.fill(&graph, layer, &mut view, &mut chance).await;
            self.views.push(view.clone());
            below = Some(layer.name);
        }
        graph.shutdown().await.check_leaks().unwrap();
        self
    }

    async fn fill(&self, graph: &Graph, layer: Layer, view: &mut [u8], chance: &mut Chance) {
        let disk = writer(&graph.open(self.by_path(layer.name, "fill")).await.unwrap(), "fill");
        let unit = if layer.is_raw() { 4096 } else { layer.cluster };
        for n in 0..8 + chance.below(8) {
            let cluster = chance.below(layer.len.div_ceil(unit)) * unit;
            let len = unit.min(layer.len - cluster);
            match chance.below(8) {
                0 if !layer.is_raw() && !layer.extended => {
                    let mut bytes = pattern(chance.draw(), cluster, usize_of(len));
                    bytes[usize_of(len / 2)..].fill(7);
                    let iov = Buf::from_slice(&bytes).iov();
                    disk.write_compressed(cluster, iov).await.unwrap();
                    view[usize_of(cluster)..][..bytes.len()].copy_from_slice(&bytes);
                }
                1 | 2 => {
                    let len = (unit * chance.between(1, 4)).min(layer.len - cluster);
                    let flags = ZeroFlags::MAY_UNMAP;
                    let _done = disk.write_zeroes(cluster, len, flags).await.unwrap();
                    view[usize_of(cluster)..][..usize_of(len)].fill(0);
                }
                _ => {
                    let at = cluster + chance.below(len / 512) * 512;
                    let len = (512 * chance.between(1, 3 * unit / 512)).min(layer.len - at);
                    let bytes = pattern(chance.draw() ^ n, at, usize_of(len));
                    disk.write(at, Buf::from_slice(&bytes).iov(), WriteFlags::empty())
                        .await
                        .unwrap();
                    view[usize_of(at)..][..bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        disk.flush().await.unwrap();
        assert!(read_all(&disk).await == *view, "the chain does not show what was written");
        drop(disk);
        graph.reap().await;
    }

    /// Options that open an image and what it names.
    pub(crate) fn by_path(&self, name: &str, node_name: &str) -> Options {
        let is_raw = self.layers.iter().any(|l| l.name == name && l.is_raw());
        let options = json!({
            "driver": if is_raw { "raw" } else { "qcow2" }, "node-name": node_name, "discard": "unmap",
            "file": {"driver": "file", "filename": self.path(name)},
        });
        Options::from_json(options).unwrap()
    }

    /// Opens all images as nodes of their names, the top for writing.
    pub(crate) async fn open(&self, graph: &Graph) -> Vec<NodeRef> {
        let mut nodes: Vec<NodeRef> = Vec::new();
        for layer in &self.layers {
            let is_top = nodes.len() + 1 == self.layers.len();
            let mut options = self.by_path(layer.name, layer.name);
            options.set("read-only", !is_top);
            if let Some(below) = nodes.last() {
                options.set("backing", below.name());
            }
            nodes.push(graph.open(options).await.unwrap());
        }
        nodes
    }

    pub(crate) fn top(&self) -> Layer {
        *self.layers.last().unwrap()
    }

    /// A model of the top image.
    pub(crate) fn model(&self) -> RefCell<DiskModel> {
        let top = self.top();
        let mut model = DiskModel::new(top.len, top.len, self.views.last().unwrap());
        if top.version > 2 {
            model.zeroes_by(if top.extended { top.cluster / 32 } else { top.cluster });
        }
        RefCell::new(model)
    }

    /// Requests of a guest of the top image.
    pub(crate) fn workload(&self, seed: u64, steps: usize) -> Workload {
        let top = self.top();
        let shape = Shape {
            len: top.len,
            max_len: top.len,
            cluster: top.cluster,
            steps,
            hot_len: top.cluster * 6,
            max_write: top.cluster * 5,
            has_compression: false,
            reopens: false,
            batches: true,
            reads: true,
        };
        Workload::new(seed, &shape)
    }

    /// What a reader finds who opens the image by its path, and the name that it records.
    pub(crate) async fn found(&self, fs: Fs, name: &str) -> (Vec<u8>, Option<String>) {
        let graph = graph_on(fs);
        let mut options = self.by_path(name, name);
        options.set("read-only", true);
        let disk = reader(&graph.open(options).await.unwrap(), "look");
        let bytes = read_all(&disk).await;
        let info = disk.info().await.unwrap();
        if info.cluster_size.is_some() {
            let report = disk.check(&|_, _| {}).await.unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{name}: {report:?}");
        }
        drop(disk);
        graph.shutdown().await.check_leaks().unwrap();
        (bytes, info.backing_file.map(|file| file.into_string().unwrap()))
    }
}

/// A user of the disk: a backend and a model of its disk.
pub(crate) struct User<'a> {
    pub(crate) disk: &'a Backend,
    pub(crate) model: &'a RefCell<DiskModel>,
}

impl User<'_> {
    /// Runs a workload; every request must succeed and every read must be right.
    pub(crate) async fn play(&self, workload: &Workload) -> Result<(), String> {
        for step in &workload.steps {
            let Step::Requests(ops) = step else { continue };
            self.requests(ops).await?;
        }
        Ok(())
    }

    async fn request(&self, op: &Op) -> Result<Option<Vec<u8>>> {
        match op {
            Op::Write { at, bytes, fua } => {
                let flags = if *fua { WriteFlags::FUA } else { WriteFlags::empty() };
                self.disk.write(*at, Buf::from_slice(bytes).iov(), flags).await?;
            }
            Op::Zero { at, len, may_unmap, fua } => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, *may_unmap);
                flags.set(ZeroFlags::FUA, *fua);
                let _done = self.disk.write_zeroes(*at, *len, flags).await?;
            }
            Op::Discard { at, len } => self.disk.discard(*at, *len).await?,
            Op::Read { at, len } => {
                let iov = Buf::zeroed(usize_of(*len), 4096).iov();
                self.disk.read(*at, iov.clone()).await?;
                return Ok(Some(iov.to_vec(0..usize_of(*len))));
            }
            Op::Flush => self.disk.flush().await?,
            Op::Compressed { .. } | Op::Grow { .. } => {}
        }
        Ok(None)
    }

    async fn requests(&self, ops: &[Op]) -> Result<(), String> {
        // A flush among them covers what completed before they all began.
        let before = ops.iter().any(|op| matches!(op, Op::Flush));
        let before = before.then(|| self.model.borrow().clone());
        self.model.borrow_mut().begin(ops);
        let results = join_all(ops.iter().map(|op| self.request(op))).await;
        let mut model = self.model.borrow_mut();
        if let Some(mut before) = before {
            before.flushed();
            before.begin(ops);
            *model = before;
        }
        model.end(ops, &vec![Ended::Done; ops.len()]);
        for (op, result) in ops.iter().zip(results) {
            let result = result.map_err(|error| format!("{op:?}: {error}"))?;
            if let (Op::Read { at, .. }, Some(bytes)) = (op, result) {
                model.check_read(*at, &bytes).map_err(|error| format!("{op:?}: {error}"))?;
            }
        }
        Ok(())
    }

    /// Reads the whole disk and compares.
    pub(crate) async fn compare(&self) -> Result<(), String> {
        let bytes = read_all(self.disk).await;
        self.model.borrow_mut().check_read(0, &bytes)
    }
}

/// Starts a job under this id and waits for its end.
pub(crate) async fn run_job(jobs: &JobManager, id: &str, job: Box<dyn JobDriver>) -> Result<()> {
    let options = JobOptions { auto_dismiss: true, ..JobOptions::new(id) };
    jobs.start(options, job).await?.wait().await
}

/// The bytes as the sectors of a crash check.
pub(crate) fn sectors(bytes: &[u8]) -> Vec<Option<[u8; 512]>> {
    bytes.chunks(512).map(|sector| sector.try_into().ok()).collect()
}

/// Seeds to run: `usual` of them, or ten times as many.
pub(crate) fn seeds(usual: u64) -> std::ops::Range<u64> {
    0..if is_full() { usual * 10 } else { usual }
}

/// Names of the images of the chain, from the guest's down.
pub(crate) fn names(top: &Backend) -> Vec<String> {
    let mut names = Vec::new();
    let mut at = top.node();
    while let Some(node) = at {
        names.push(node.name().to_owned());
        let below = node.edges_below().into_iter().find(|edge| edge.name == "backing");
        at = below.map(|edge| node.graph().acquire(edge.child).unwrap());
    }
    names
}

/// The graph as text, without lengths (files grow) and counts (a query may look just now).
pub(crate) fn shape(graph: &Graph) -> String {
    let words = |line: &str| -> String {
        let varies = |word: &&str| word.starts_with("len=") || word.starts_with("refs=");
        line.split(' ').filter(|word| !varies(word)).collect::<Vec<_>>().join(" ")
    };
    graph.dump().lines().map(words).collect::<Vec<_>>().join("\n")
}
