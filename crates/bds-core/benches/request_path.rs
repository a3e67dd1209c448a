//! What does the request path cost per layer, inline and waiting?
//!
//! Expected: below 40 ns a layer inline for short chains, below 100 ns for 200 layers; a few
//! hundred waiting (two boxed futures a layer). Subtract the row for 1 layer for the cost of the
//! ends. `cargo bench -p bds-core --bench request_path`

use std::any::Any;
use std::hint::black_box;
use std::sync::Arc;

use bds_core::Result;
use bds_core::bitmap::intent_log::{Facts, IntentLog, Shape};
use bds_core::driver::{
    BitmapSpec, BitmapStore, BitmapToStore, BoxFuture, Category, Child, Driver, DriverType,
    IntentStore, OpenContext, Precision, ReadFlags, Registry, Role, StatusFlags, StatusRun,
    StoredBitmap, WriteFlags,
};
use bds_core::graph::{BitmapOptions, Graph, GraphConfig, NodeRef};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::request::{Backend, BackendOptions};
use bds_io::{Buf, File, IoVec, OpenOptions as OpenFile, Sim, SimConfig};
use criterion::{Criterion, criterion_group, criterion_main};

const LEN: u64 = 1 << 20;

/// Forwards to its child, or does nothing.
struct Forward(Option<Child>);

impl Driver for Forward {
    fn name(&self) -> &'static str {
        "pass"
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn is_filter(&self) -> bool {
        self.0.is_some()
    }
    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        match &self.0 {
            Some(child) => child.try_read(offset, iov),
            None => Some(Ok(())),
        }
    }
    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        match &self.0 {
            Some(child) => child.try_write(offset, iov),
            None => Some(Ok(())),
        }
    }
    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match &self.0 {
                Some(child) => child.read(offset, iov, flags).await,
                None => Ok(()),
            }
        })
    }
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match &self.0 {
                Some(child) => child.write(offset, iov, flags).await,
                None => Ok(()),
            }
        })
    }
    fn block_status(&self, _: u64, len: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct ForwardType;

impl DriverType for ForwardType {
    fn name(&self) -> &'static str {
        "pass"
    }
    fn category(&self) -> Category {
        Category::Filter
    }
    fn open_options(&self) -> &'static [OptionSpec] {
        const FILE: OptionSpec =
            OptionSpec { name: "file", kind: OptionKind::Child, help: "below", default: None };
        &[FILE]
    }
    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let role = Role::FILTERED | Role::PRIMARY;
            let child = match context.options.contains("file") {
                true => Some(context.child("file", role).await?),
                false => None,
            };
            let driver: Box<dyn Driver> = Box::new(Forward(child));
            Ok(driver)
        })
    }
}

/// Does nothing, and keeps a write-intent log of its bitmaps in a simulated file.
struct Logged {
    log: IntentLog,
    file: File,
}

impl Driver for Logged {
    fn name(&self) -> &'static str {
        "logged"
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn try_write(&self, _: u64, _: &IoVec) -> Option<Result<()>> {
        Some(Ok(()))
    }
    fn read(&self, _: u64, _: IoVec, _: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn write(&self, _: u64, _: IoVec, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn block_status(&self, _: u64, len: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl BitmapStore for Logged {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredBitmap>>> {
        Box::pin(async { Ok(Vec::new()) })
    }
    fn can_store(&self, _: &BitmapSpec, _: &[BitmapSpec]) -> Result<()> {
        Ok(())
    }
    fn store<'a>(&'a self, _: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn remove<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn mark_in_use(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn intent(&self) -> Option<&dyn IntentStore> {
        Some(self)
    }
}

impl IntentStore for Logged {
    fn log(&self) -> &IntentLog {
        &self.log
    }
    fn start<'a>(&'a self, _: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.log.start(self.file.clone(), None, Facts::default(), &[]))
    }
    fn checkpoint<'a>(&'a self, _: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.log.checkpoint(0, &[]))
    }
    fn invalidate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

struct LoggedType;

impl DriverType for LoggedType {
    fn name(&self) -> &'static str {
        "logged"
    }
    fn category(&self) -> Category {
        Category::Format
    }
    fn open_options(&self) -> &'static [OptionSpec] {
        &[]
    }
    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let new = OpenFile { write: true, create: true, ..OpenFile::default() };
            let file = context.fs.open("log".as_ref(), &new).expect("a simulated disk has space");
            let driver: Box<dyn Driver> =
                Box::new(Logged { log: IntentLog::new(Shape::for_disk(LEN)), file });
            Ok(driver)
        })
    }
}

async fn stack(layers: usize) -> (Backend, Vec<NodeRef>) {
    let mut registry = Registry::new();
    registry.register(Arc::new(ForwardType)).expect("the first");
    let graph = Graph::new(GraphConfig::new(Arc::new(registry)));
    let mut nodes: Vec<NodeRef> = Vec::new();
    for i in 0..layers {
        let mut options = Options::new().with("driver", "pass").with("node-name", format!("n{i}"));
        if i > 0 {
            options.set("file", format!("n{}", i - 1));
        }
        nodes.push(graph.open(options).await.expect("opens"));
    }
    let top = nodes.last().expect("a layer");
    let backend = Backend::new(
        top,
        BackendOptions { name: "bench".into(), writable: true, ..Default::default() },
    );
    (backend.expect("writable"), nodes)
}

fn request_path(c: &mut Criterion) {
    for layers in [1, 2, 5, 10, 50, 200] {
        let sim = Sim::new(1, SimConfig::calm());
        sim.block_on(async {
            let (disk, _nodes) = stack(layers).await;
            let iov = Buf::zeroed(4096, 4096).iov();
            c.bench_function(&format!("try_read/{layers}"), |b| {
                b.iter(|| black_box(disk.try_read(4096, &iov)));
            });
            c.bench_function(&format!("try_write/{layers}"), |b| {
                b.iter(|| black_box(disk.try_write(4096, &iov)));
            });
            // A flag keeps the write from completing inline.
            c.bench_function(&format!("write_waiting/{layers}"), |b| {
                b.iter(|| {
                    let write = disk.write(4096, iov.clone(), WriteFlags::UNCHANGED);
                    futures_util::FutureExt::now_or_never(write)
                });
            });
        });
    }
}

/// What does a write cost more if its node has bitmaps that record?
fn with_bitmaps(c: &mut Criterion) {
    for bitmaps in [0, 1, 4, 16] {
        let sim = Sim::new(1, SimConfig::calm());
        sim.block_on(async {
            let (disk, nodes) = stack(1).await;
            for n in 0..bitmaps {
                let options = BitmapOptions::named(format!("b{n}"));
                nodes[0].add_bitmap(options).await.expect("a new name");
            }
            let iov = Buf::zeroed(4096, 4096).iov();
            c.bench_function(&format!("try_write with {bitmaps} bitmaps"), |b| {
                b.iter(|| black_box(disk.try_write(4096, &iov)));
            });
        });
    }
}

/// What does a write to a region that is in the write-intent log cost?
fn with_log(c: &mut Criterion) {
    let sim = Sim::new(1, SimConfig::calm());
    sim.block_on(async {
        let mut registry = Registry::new();
        registry.register(Arc::new(LoggedType)).expect("the first");
        let config = GraphConfig { fs: sim.fs(), ..GraphConfig::new(Arc::new(registry)) };
        let node = Graph::new(config).open(Options::new().with("driver", "logged")).await;
        let node = node.expect("opens");
        let persistent = BitmapOptions { persistent: true, ..BitmapOptions::named("b") };
        node.add_bitmap(persistent).await.expect("a new name");
        let options = BackendOptions { name: "b".into(), writable: true, ..Default::default() };
        let disk = Backend::new(&node, options).expect("writable");
        let iov = Buf::zeroed(4096, 4096).iov();
        assert!(disk.try_write(4096, &iov).is_none(), "the log comes first");
        disk.write(4096, iov.clone(), WriteFlags::empty()).await.expect("the log can be written");
        assert!(disk.try_write(4096, &iov).is_some());
        c.bench_function("try_write with 1 bitmap and its log", |b| {
            b.iter(|| black_box(disk.try_write(4096, &iov)));
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_millis(1000));
    targets = request_path, with_bitmaps, with_log
}
criterion_main!(benches);
