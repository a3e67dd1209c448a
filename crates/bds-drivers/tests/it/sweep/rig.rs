//! Kinds of image, the environments they are stored in, and how a workload runs on them.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;

use bds_core::driver::{Attempt, CacheMode, OpenFlags, Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::graph::gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::{Buf, Context, ContextOptions, EngineKind, Fs, Sim};
use bds_testkit::{
    Cache, DiskModel, Ended, Op, Output, Scratch, Shape, Step, Tool, Workload, pattern,
};
use futures_util::future::join_all;
use serde_json::{Value, json};

/// The seed of the bytes in backing files.
const BASE_STAMP: u64 = 0xba5e;

/// A kind of image.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    /// Options of create beside size and names.
    pub(crate) create: Value,
    /// Options of open beside the file.
    pub(crate) open: Value,
    /// A filter above the image when it is open for writing: its options beside `file`.
    pub(crate) above: Option<Value>,
    /// A filter between the image and its file, likewise.
    pub(crate) beneath: Option<Value>,
    pub(crate) cluster: u64,
    /// Zero writes of whole units are metadata.
    pub(crate) zero_unit: Option<u64>,
    pub(crate) len: u64,
    pub(crate) max_len: u64,
    pub(crate) backing_len: Option<u64>,
    pub(crate) has_data_file: bool,
    pub(crate) has_compression: bool,
    /// Bytes of unflushed writes to new places may be stale after a cut: links into a data file do not wait for their
    /// bytes.
    pub(crate) may_be_stale: bool,
    /// After a cut the dirty bit may say that refcounts are wrong.
    pub(crate) is_lazy: bool,
    /// Bytes at the end of the disk that are written before the workload, so that the image's tables are nearly full.
    pub(crate) fill: u64,
    /// They are written cluster by cluster, so that neighbours on the disk are not neighbours in the file.
    pub(crate) is_in_pieces: bool,
    /// The workload grows the disk by so many bytes at its end, and writes there.
    pub(crate) grows_by: Option<u64>,
}

impl Kind {
    /// A qcow2 image with clusters of `cluster` bytes.
    pub(crate) fn qcow2(name: &'static str, cluster: u64) -> Kind {
        Kind {
            name,
            format: "qcow2",
            create: json!({"cluster_size": cluster}),
            open: json!({}),
            above: None,
            beneath: None,
            cluster,
            zero_unit: Some(cluster),
            len: cluster * 96,
            max_len: cluster * 128,
            backing_len: None,
            has_data_file: false,
            has_compression: true,
            may_be_stale: false,
            is_lazy: false,
            fill: 0,
            is_in_pieces: false,
            grows_by: None,
        }
    }

    pub(crate) fn raw(name: &'static str) -> Kind {
        Kind {
            format: "raw",
            create: json!({}),
            has_compression: false,
            zero_unit: None,
            ..Kind::qcow2(name, 4096)
        }
    }

    /// Adds an option of create.
    pub(crate) fn create(mut self, key: &str, value: impl Into<Value>) -> Kind {
        self.create[key] = value.into();
        self
    }

    /// Adds an option of open.
    pub(crate) fn open(mut self, key: &str, value: impl Into<Value>) -> Kind {
        self.open[key] = value.into();
        self
    }

    /// Writes and reads through a filter; the workload reads too.
    pub(crate) fn through(self, filter: Value) -> Kind {
        Kind { above: Some(filter), ..self }
    }

    /// Writes the image's file through a filter.
    pub(crate) fn upon(self, filter: Value) -> Kind {
        Kind { beneath: Some(filter), ..self }
    }

    /// New clusters become visible only with their data: no stale bytes are ever seen.
    pub(crate) fn strict(self) -> Kind {
        Kind { may_be_stale: false, ..self.open("data-before-metadata", true) }
    }

    pub(crate) fn version_2(self) -> Kind {
        Kind { zero_unit: None, ..self.create("compat", "0.10") }
    }

    pub(crate) fn extended(self) -> Kind {
        let zero_unit = Some(self.cluster / 32);
        Kind { zero_unit, ..self.create("extended_l2", true) }
    }

    pub(crate) fn lazy(self) -> Kind {
        Kind { is_lazy: true, ..self.create("lazy_refcounts", true) }
    }

    /// Adds a backing file of this length.
    pub(crate) fn backed(self, len: u64) -> Kind {
        Kind { backing_len: Some(len), ..self }
    }

    pub(crate) fn with_data_file(self) -> Kind {
        Kind { has_data_file: true, has_compression: false, may_be_stale: true, ..self }
    }

    pub(crate) fn sized(self, len: u64, max_len: u64) -> Kind {
        Kind { len, max_len, ..self }
    }

    /// Writes so many bytes at the end of the disk before the workload.
    pub(crate) fn filled(self, fill: u64) -> Kind {
        Kind { fill, ..self }
    }

    /// The same in an order that leaves every cluster in a run of its own.
    pub(crate) fn filled_in_pieces(self, fill: u64) -> Kind {
        Kind { fill, is_in_pieces: true, ..self }
    }

    /// Workloads end with growth by so many bytes, a write there and a flush.
    pub(crate) fn growing(self, by: u64) -> Kind {
        Kind { grows_by: Some(by), ..self }
    }

    /// The workload of this seed: `steps` random ones, and those that this kind requires.
    pub(crate) fn workload(&self, seed: u64, steps: usize) -> Workload {
        let mut workload = Workload::new(seed, &self.shape(steps));
        let Some(by) = self.grows_by else { return workload };
        let grown = workload.steps.iter().fold(self.len, |len, step| match step {
            Step::Requests(ops) => ops.iter().fold(len, |len, op| match op {
                Op::Grow { len } => *len,
                _ => len,
            }),
            Step::Reopen => len,
        });
        let len = grown + by;
        assert!(len <= self.max_len, "{}: it grows too far", self.name);
        let count = usize::try_from(self.cluster * 5).expect("small");
        let end = Op::Write { at: grown, bytes: pattern(!seed, grown, count).into(), fua: false };
        workload
            .steps
            .extend([vec![Op::Grow { len }], vec![end], vec![Op::Flush]].map(Step::Requests));
        workload
    }

    /// Parameters of workloads.
    pub(crate) fn shape(&self, steps: usize) -> Shape {
        Shape {
            len: self.len,
            max_len: self.max_len,
            cluster: self.cluster,
            steps,
            hot_len: self.cluster * 6,
            max_write: (self.cluster * 12).min(256 << 10),
            has_compression: self.has_compression,
            reopens: false,
            batches: true,
            reads: self.above.is_some(),
        }
    }

    /// The model of the image before a workload.
    pub(crate) fn model(&self) -> DiskModel {
        let mut base = match self.backing_len {
            Some(len) => pattern(BASE_STAMP, 0, usize::try_from(len).expect("small")),
            None => Vec::new(),
        };
        if self.fill > 0 {
            base.resize(usize::try_from(self.len).expect("small"), 0);
            let start = self.len - self.fill;
            let fill = usize::try_from(self.fill).expect("small");
            let at = base.len() - fill;
            base[at..].copy_from_slice(&pattern(BASE_STAMP + 1, start, fill));
        }
        let mut model = DiskModel::new(self.len, self.max_len, &base);
        if let Some(unit) = self.zero_unit {
            model.zeroes_by(unit);
        }
        if self.may_be_stale {
            model.expect_stale();
        }
        model
    }
}

/// Where images are stored, and the Context that runs their I/O.
pub(crate) enum World {
    Sim(Sim),
    Host(Context, Scratch),
}

impl World {
    pub(crate) fn host(engine: EngineKind) -> std::io::Result<World> {
        Ok(World::Host(
            Context::new(ContextOptions { engine, ..ContextOptions::default() })?,
            Scratch::new(),
        ))
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            World::Sim(sim) => sim.block_on(future),
            World::Host(context, _) => context.block_on(future),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            World::Sim(_) => PathBuf::from("/disks").join(name),
            World::Host(_, scratch) => scratch.path(name),
        }
    }

    /// The path of a file for other tools; exported from a simulated disk.
    pub(crate) fn on_host(&self, name: &str, scratch: &Scratch) -> PathBuf {
        match self {
            World::Sim(sim) => {
                let path = scratch.path(name);
                sim.export(self.path(name), &path).expect("scratch is writable");
                path
            }
            World::Host(_, own) => own.path(name),
        }
    }

    /// Runs `qemu-img check`. QEMU looks for a stored data file in the working directory, so it is named.
    pub(crate) fn qemu_check(&self, img: &Tool, kind: &Kind, scratch: &Scratch) -> Output {
        let mut options = format!(
            "driver=qcow2,file.driver=file,file.filename={}",
            self.on_host("disk", scratch).display()
        );
        if kind.has_data_file {
            let data = self.on_host("data", scratch);
            options += &format!(",data-file.driver=file,data-file.filename={}", data.display());
        }
        if kind.backing_len.is_some() {
            self.on_host("base", scratch);
        }
        img.run(["check", "--image-opts", &options])
    }

    pub(crate) fn graph(&self) -> Graph {
        let fs = match self {
            World::Sim(sim) => sim.fs(),
            World::Host(..) => Fs::Host,
        };
        let registry = Arc::new(bds_drivers::registry());
        let gate = Arc::new(TrustAll { may_probe: false });
        Graph::new(GraphConfig { fs, gate, ..GraphConfig::new(registry) })
    }

    /// Makes the image and the files that it refers to.
    pub(crate) fn make(&self, kind: &Kind) {
        let graph = self.graph();
        self.block_on(async {
            let mut options = kind.create.clone();
            options["size"] = json!(kind.len);
            if let Some(len) = kind.backing_len {
                let path = self.path("base");
                let base = NewImage {
                    format: "raw".into(),
                    path: path.clone(),
                    options: Options::new().with("size", len),
                    skip_backing: true,
                };
                graph.create_image(base).await.expect("a raw base can be made");
                let disk = Disk::open_file(&graph, "raw", path).await;
                let bytes = pattern(BASE_STAMP, 0, usize::try_from(len).expect("small"));
                disk.write(0, &bytes).await.expect("the base can be filled");
                disk.close().await.expect("the base can be closed");
                options["backing_file"] = json!("base");
                options["backing_fmt"] = json!("raw");
            }
            if kind.has_data_file {
                options["data_file"] = json!(self.path("data"));
            }
            let image = NewImage {
                format: kind.format.into(),
                path: self.path("disk"),
                options: Options::from_json(options).expect("an object"),
                skip_backing: false,
            };
            graph.create_image(image).await.expect("the image can be made");
            if kind.fill > 0 {
                let disk = Disk::open(self, kind, &graph).await.expect("the image opens");
                let start = kind.len - kind.fill;
                let bytes =
                    pattern(BASE_STAMP + 1, start, usize::try_from(kind.fill).expect("small"));
                let fill = disk.fill(start, &bytes, kind);
                fill.await.expect("the image can be filled");
                disk.close().await.expect("the image can be closed");
            }
        });
    }

    pub(crate) fn trace(&self) -> String {
        match self {
            World::Sim(sim) => sim.trace().join("\n"),
            World::Host(..) => String::new(),
        }
    }
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) backend: Backend,
}

impl Disk {
    /// Opens the image for writing.
    pub(crate) async fn open(world: &World, kind: &Kind, graph: &Graph) -> Result<Disk> {
        Self::open_as(world, kind, graph, OpenFlags { discard: true, ..OpenFlags::default() }).await
    }

    /// Opens it in a cache mode.
    pub(crate) async fn open_cached(
        world: &World,
        kind: &Kind,
        graph: &Graph,
        cache: Cache,
    ) -> Result<Disk> {
        let word = match cache {
            Cache::Writeback => "writeback",
            Cache::None => "none",
            Cache::Writethrough => "writethrough",
            Cache::Unsafe => "unsafe",
        };
        let cache = CacheMode::parse(word).expect("a known word");
        Self::open_as(
            world,
            kind,
            graph,
            OpenFlags { discard: true, cache, ..OpenFlags::default() },
        )
        .await
    }

    /// Opens it for reading and checking.
    pub(crate) async fn look(world: &World, kind: &Kind, graph: &Graph) -> Result<Disk> {
        Self::open_as(world, kind, graph, OpenFlags { read_only: true, ..OpenFlags::default() })
            .await
    }

    async fn open_as(world: &World, kind: &Kind, graph: &Graph, flags: OpenFlags) -> Result<Disk> {
        let mut options = kind.open.clone();
        options["driver"] = json!(kind.format);
        options["file"] = json!({"driver": "file", "filename": world.path("disk")});
        let writable = !flags.read_only;
        if let Some(filter) = kind.beneath.as_ref().filter(|_| writable) {
            let file = std::mem::replace(&mut options["file"], filter.clone());
            options["file"]["file"] = file;
        }
        if let Some(filter) = kind.above.as_ref().filter(|_| writable) {
            let file = std::mem::replace(&mut options, filter.clone());
            options["file"] = file;
        }
        let node = graph.open_with(Options::from_json(options)?, flags).await?;
        Ok(Disk {
            backend: Backend::new(
                &node,
                BackendOptions { name: "test".into(), writable, ..Default::default() },
            )?,
        })
    }

    async fn open_file(graph: &Graph, format: &str, path: PathBuf) -> Disk {
        let options = json!({"driver": format, "file": {"driver": "file", "filename": path}});
        let options = Options::from_json(options).expect("an object");
        let node = graph.open(options).await.expect("it was just made");
        let options = BackendOptions { name: "test".into(), writable: true, ..Default::default() };
        Disk { backend: Backend::new(&node, options).expect("it is writable") }
    }

    pub(crate) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.backend.write(at, Buf::from_slice(bytes).iov(), WriteFlags::empty()).await
    }

    /// Writes the bytes that precede the workload: in one go, or every other cluster first.
    async fn fill(&self, start: u64, bytes: &[u8], kind: &Kind) -> Result<()> {
        if !kind.is_in_pieces {
            return self.write(start, bytes).await;
        }
        let cluster = usize::try_from(kind.cluster).expect("small");
        for first in [0, 1] {
            for (number, bytes) in bytes.chunks(cluster).enumerate().skip(first).step_by(2) {
                self.write(start + number as u64 * kind.cluster, bytes).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(len).expect("small");
        let iov = Buf::zeroed(len, 4096).iov();
        iov.fill(0..len, 0xee);
        self.backend.read(at, iov.clone()).await?;
        Ok(iov.to_vec(0..len))
    }

    /// Sends one request; returns the bytes of a read.
    pub(crate) async fn request(&self, op: &Op) -> Result<Option<Vec<u8>>> {
        let backend = &self.backend;
        match op {
            Op::Write { at, bytes, fua } => {
                let flags = if *fua { WriteFlags::FUA } else { WriteFlags::empty() };
                backend.write(*at, Buf::from_slice(bytes).iov(), flags).await?;
            }
            Op::Compressed { at, bytes } => {
                backend.write_compressed(*at, Buf::from_slice(bytes).iov()).await?;
            }
            Op::Zero { at, len, may_unmap, fua } => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, *may_unmap);
                flags.set(ZeroFlags::FUA, *fua);
                let done = backend.write_zeroes(*at, *len, flags).await?;
                assert_eq!(done, Attempt::Done, "only NO_FALLBACK may be declined");
            }
            Op::Discard { at, len } => backend.discard(*at, *len).await?,
            Op::Read { at, len } => return self.read(*at, *len).await.map(Some),
            Op::Flush => backend.flush().await?,
            Op::Grow { len } => {
                let change =
                    Truncate { len: *len, exact: true, prealloc: Prealloc::Off, zero_new: false };
                backend.truncate(change).await?;
            }
        }
        Ok(None)
    }

    /// Sends requests concurrently, updates the model, and returns those that failed.
    pub(crate) async fn requests(
        &self,
        ops: &[Op],
        model: &RefCell<DiskModel>,
    ) -> Result<Vec<Error>, String> {
        // A flush among them covers what completed before they all began.
        let mut before =
            ops.iter().any(|op| matches!(op, Op::Flush)).then(|| model.borrow().clone());
        model.borrow_mut().begin(ops);
        let results = join_all(ops.iter().map(|op| self.request(op))).await;
        let mut model = model.borrow_mut();
        let is_flushed =
            |(op, result): (&Op, &Result<_>)| matches!(op, Op::Flush) && result.is_ok();
        if ops.iter().zip(&results).any(is_flushed)
            && let Some(mut before) = before.take()
        {
            before.flushed();
            before.begin(ops);
            *model = before;
        }
        let ended: Vec<Ended> =
            results.iter().map(|r| if r.is_ok() { Ended::Done } else { Ended::Partly }).collect();
        model.end(ops, &ended);
        if ops.iter().any(|op| matches!(op, Op::Grow { .. })) {
            model.set_len(self.backend.len());
        }
        let mut errors = Vec::new();
        for (op, result) in ops.iter().zip(results) {
            match (op, result) {
                (Op::Read { at, .. }, Ok(Some(bytes))) => {
                    model.check_read(*at, &bytes).map_err(|e| format!("{op:?}: {e}"))?;
                }
                (_, Ok(_)) => {}
                (_, Err(error)) => errors.push(error.context(format!("{op:?}"))),
            }
        }
        Ok(errors)
    }

    /// Reads the whole disk and compares.
    pub(crate) async fn compare(&self, model: &RefCell<DiskModel>) -> Result<(), String> {
        let len = self.backend.len();
        let expected = model.borrow().len();
        if len != expected {
            return Err(format!("the disk is {len} bytes long instead of {expected}"));
        }
        let bytes = self.read(0, len).await.map_err(|e| format!("reading all of it: {e}"))?;
        model.borrow_mut().check_read(0, &bytes)
    }

    /// Content by sectors; `None` for sectors that cannot be read.
    pub(crate) async fn survivors(&self, cluster: u64) -> Vec<Option<[u8; 512]>> {
        let len = self.backend.len();
        let sectors = |bytes: &[u8]| -> Vec<Option<[u8; 512]>> {
            bytes.chunks(512).map(|chunk| chunk.try_into().ok()).collect()
        };
        if let Ok(bytes) = self.read(0, len).await {
            return sectors(&bytes);
        }
        let mut all = Vec::new();
        let mut at = 0;
        while at < len {
            let part = cluster.min(len - at);
            match self.read(at, part).await {
                Ok(bytes) => all.extend(sectors(&bytes)),
                Err(_) => all.extend((0..part / 512).map(|_| None)),
            }
            at += part;
        }
        all
    }

    /// Checks the image: (corruptions, leaks), or a description of the errors.
    pub(crate) async fn check(&self) -> Result<(u64, u64), String> {
        let report = match self.backend.check(&|_, _| {}).await {
            Ok(report) => report,
            // Formats without metadata have nothing to check.
            Err(error) if error.kind() == ErrorKind::NotSupported => return Ok((0, 0)),
            Err(error) => return Err(format!("check failed: {error}")),
        };
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("check: {report:#?}"));
        }
        Ok((report.corruptions, report.leaks))
    }

    /// Flushes and closes; an error if something could not be made durable.
    pub(crate) async fn close(self) -> Result<(), Error> {
        let node = self.backend.node().expect("it has a medium");
        drop(self.backend);
        match node.close().await {
            Ok(report) => {
                let mut reports = vec![report];
                while let Some(report) = reports.pop() {
                    if let Some(error) = report.flush_error.or(report.close_error) {
                        return Err(error);
                    }
                    reports.extend(report.below);
                }
                Ok(())
            }
            Err(error) => Err(Error::new(ErrorKind::InUse, error.to_string())),
        }
    }
}

/// Runs a whole workload: every request must succeed and every read must be right.
pub(crate) async fn play(
    world: &World,
    kind: &Kind,
    cache: Cache,
    workload: &Workload,
    model: &RefCell<DiskModel>,
) -> Result<(), String> {
    let graph = world.graph();
    let open = || async {
        Disk::open_cached(world, kind, &graph, cache).await.map_err(|e| format!("open: {e}"))
    };
    let mut disk = open().await?;
    for (number, step) in workload.steps.iter().enumerate() {
        let at = |e: String| format!("step {number}: {e}");
        match step {
            Step::Requests(ops) => {
                let errors = disk.requests(ops, model).await.map_err(at)?;
                if let Some(error) = errors.first() {
                    return Err(at(error.to_string()));
                }
            }
            Step::Reopen => {
                disk.close().await.map_err(|e| at(format!("close: {e}")))?;
                disk = open().await.map_err(at)?;
                model.borrow_mut().flushed();
            }
        }
    }
    disk.compare(model).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))?;
    let disk = Disk::look(world, kind, &graph).await.map_err(|e| format!("open to look: {e}"))?;
    let (_, leaks) = disk.check().await?;
    if leaks > 0 {
        return Err(format!("check: {leaks} leaks after a clean close"));
    }
    disk.compare(model).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))
}
