//! A small world for graph tests: three fake drivers that log what is done to them, on a simulated disk.
//!
//! `file` holds a file of the simulated disk, `cow` is an image format whose header lies in a table instead of in the file, and
//! `pass` is a filter. Each can be told to fail.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::holder_kind::HolderKind;
use bds_io::{File, Fs, IoVec, OpenOptions, Sim, SimConfig};

use crate::driver::{
    Attempt, BoxFuture, Category, Child, ChildPort, ClaimedFile, CreateContext, CreateFacts,
    Driver, DriverType, Limits, OpenContext, ReadFlags, Reference, ReferenceKind, Registry, Role,
    StatusFlags, StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::gate::TrustAll;
use crate::graph::{Access, Edge, Graph, GraphConfig, NodeRef, Root, Target, walk};
use crate::options::{OptionKind, OptionSpec, Options};

/// What an image of the fake format says.
#[derive(Clone, Default)]
pub(super) struct Header {
    pub(super) backing: Option<&'static str>,
    pub(super) backing_format: Option<&'static str>,
    pub(super) data_file: Option<&'static str>,
}

/// What the fake drivers share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) log: Mutex<Vec<String>>,
    pub(super) headers: Mutex<HashMap<PathBuf, Header>>,
}

impl Shared {
    fn note(&self, line: String) {
        self.log.lock().unwrap().push(line);
    }

    /// What happened since the last call.
    pub(super) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

pub(super) struct Fixture {
    pub(super) graph: Graph,
    pub(super) shared: Arc<Shared>,
    pub(super) sim: Sim,
}

/// Runs a test in a world of its own, with a graph that trusts what images name.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce(Fixture) -> F) {
    run_with(|_| {}, test);
}

/// As [`run`], with a graph made to order.
pub(super) fn run_with<F: Future<Output = ()>>(
    adjust: impl FnOnce(&mut GraphConfig),
    test: impl FnOnce(Fixture) -> F,
) {
    run_seeded(7, adjust, test);
}

/// As [`run_with`], under the schedule that this seed gives.
pub(super) fn run_seeded<F: Future<Output = ()>>(
    seed: u64,
    adjust: impl FnOnce(&mut GraphConfig),
    test: impl FnOnce(Fixture) -> F,
) {
    let sim = Sim::new(seed, SimConfig::calm());
    let shared = Arc::new(Shared::default());
    let mut registry = Registry::new();
    for (name, category) in
        [("file", Category::Protocol), ("cow", Category::Format), ("pass", Category::Filter)]
    {
        let shared = Arc::clone(&shared);
        registry.register(Arc::new(FakeType { name, category, shared })).unwrap();
    }
    let mut config = GraphConfig::new(Arc::new(registry));
    config.fs = sim.fs();
    config.gate = Arc::new(TrustAll { may_probe: false });
    adjust(&mut config);
    let graph = Graph::with_corridor(config, port);
    sim.block_on(test(Fixture { graph, shared, sim: sim.clone() }));
}

impl Fixture {
    /// Makes an image file.
    pub(super) fn image(&self, path: &'static str, header: Header) {
        self.sim.put_file(path, &[0; 512]);
        self.shared.headers.lock().unwrap().insert(path.into(), header);
    }

    /// An image without references.
    pub(super) fn plain(&self, path: &'static str) {
        self.image(path, Header::default());
    }

    pub(super) async fn open(&self, text: &str) -> NodeRef {
        self.graph.open(Options::parse(text).unwrap()).await.unwrap()
    }

    pub(super) async fn refusal(&self, text: &str) -> Error {
        self.graph.open(Options::parse(text).unwrap()).await.unwrap_err()
    }
}

struct FakeType {
    name: &'static str,
    category: Category,
    shared: Arc<Shared>,
}

const fn spec(name: &'static str, kind: OptionKind) -> OptionSpec {
    OptionSpec { name, kind, help: "", default: None }
}

impl DriverType for FakeType {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        const FAULTS: [OptionSpec; 4] = [
            spec("fail-open", OptionKind::Bool),
            spec("fail-flush", OptionKind::Bool),
            spec("fail-close", OptionKind::Bool),
            spec("ignored", OptionKind::Bool),
        ];
        const FILE: &[OptionSpec] = &[
            spec("filename", OptionKind::String),
            spec("max-transfer", OptionKind::Size),
            FAULTS[0],
            FAULTS[1],
            FAULTS[2],
            FAULTS[3],
        ];
        const OTHER: &[OptionSpec] = &[
            spec("file", OptionKind::Child),
            spec("backing", OptionKind::Child),
            spec("data-file", OptionKind::Child),
            FAULTS[0],
            FAULTS[1],
            FAULTS[2],
            FAULTS[3],
        ];
        if self.category == Category::Protocol { FILE } else { OTHER }
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        const FILE: &[OptionSpec] = &[spec("nocow", OptionKind::Bool)];
        const FORMAT: &[OptionSpec] = &[
            spec("size", OptionKind::Size),
            spec("backing_file", OptionKind::String),
            spec("backing_fmt", OptionKind::String),
            spec("data_file", OptionKind::String),
            spec("fail-create", OptionKind::Bool),
        ];
        match self.category {
            Category::Protocol => FILE,
            Category::Format => FORMAT,
            Category::Filter => &[],
        }
    }

    fn create<'a>(&'a self, context: CreateContext<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let CreateContext { file, data_file, backing_len, options } = context;
            bds_io::yield_now().await;
            let size = options.take_size("size")?.or(backing_len);
            for key in ["backing_file", "backing_fmt", "data_file"] {
                options.take_str(key)?;
            }
            let data_file = data_file.map(|child| child.filename());
            self.shared
                .note(format!("create {:?} data {data_file:?} size {size:?}", file.filename()));
            if options.take_bool("fail-create")?.unwrap_or(false) {
                return Err(Error::new(ErrorKind::NoSpace, "told to fail"));
            }
            Ok(())
        })
    }

    fn check_create(&self, options: &mut Options, backing_len: Option<u64>) -> Result<CreateFacts> {
        let size = options.take_size("size")?.or(backing_len);
        for key in ["backing_file", "backing_fmt", "data_file", "fail-create"] {
            options.take(key);
        }
        let len =
            size.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "option 'size' is missing"))?;
        Ok(CreateFacts { len, min_file_len: 0, compressed_unit: None })
    }

    fn claim_file(&self, fs: &Fs, path: &Path, options: &mut Options) -> Result<ClaimedFile> {
        options.take_bool("nocow")?;
        let was_there = fs.open(path, &OpenOptions::default()).is_ok();
        let wanted = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        let file =
            fs.open(path, &wanted).map_err(|error| Error::io(error, "cannot make").file(path))?;
        let identity = file.identity().expect("a simulated file has one");
        let shared = Arc::clone(&self.shared);
        let name = path.display().to_string();
        Ok(ClaimedFile {
            made_path: (!was_there).then(|| path.to_owned()),
            identity,
            max_len: None,
            empty: Box::pin(async move {
                shared.note(format!("empty {name}"));
                file.set_len(0).await.map_err(|error| Error::io(error, "cannot empty"))
            }),
        })
    }

    fn probe(&self, head: &[u8], _file_len: u64) -> u8 {
        u8::from(self.category == Category::Format && head.starts_with(b"COW")) * 100
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let name = context.node_name.to_owned();
            let options = &mut context.options;
            let mut driver = Fake {
                driver: self.name,
                category: self.category,
                name: name.clone(),
                shared: Arc::clone(&self.shared),
                max_transfer: options.take_size("max-transfer")?.unwrap_or(4096),
                fail_flush: options.take_bool("fail-flush")?.unwrap_or(false),
                fail_close: options.take_bool("fail-close")?.unwrap_or(false),
                file: None,
                children: Vec::new(),
                backing: Mutex::new(None),
                is_closed: AtomicBool::new(false),
                readers: AtomicUsize::new(0),
            };
            let fail_open = options.take_bool("fail-open")?.unwrap_or(false);
            match self.category {
                Category::Protocol => {
                    let path = options.take_str("filename")?.unwrap_or_default();
                    let wanted =
                        OpenOptions { write: !context.flags.read_only, ..OpenOptions::default() };
                    let file = context
                        .fs
                        .open(path.as_ref(), &wanted)
                        .map_err(|error| Error::io(error, "cannot open").file(&path))?;
                    driver.file = Some((path.into(), file));
                }
                Category::Filter => {
                    let role = Role::FILTERED | Role::PRIMARY;
                    driver.children.push(context.child("file", role).await?);
                }
                Category::Format => self.open_format(context, &mut driver).await?,
            }
            if fail_open {
                return Err(Error::new(ErrorKind::Io, format!("{name} was told to fail")));
            }
            self.shared.note(format!("open {name}"));
            let driver: Box<dyn Driver> = Box::new(driver);
            Ok(driver)
        })
    }
}

impl FakeType {
    async fn open_format(&self, context: &mut OpenContext<'_>, driver: &mut Fake) -> Result<()> {
        let role = Role::DATA | Role::METADATA | Role::PRIMARY;
        let file = context.child("file", role).await?;
        let header = match file.filename() {
            Some(path) => self.shared.headers.lock().unwrap().get(&path).cloned(),
            None => None,
        };
        let header = header.unwrap_or_default();
        driver.children.push(file);
        let reference = |kind, stored: Option<&str>, format: Option<&str>| {
            stored.map(|stored| Reference {
                kind,
                stored_name: stored.into(),
                stored_format: format.map(str::to_owned),
            })
        };
        let data = reference(ReferenceKind::DataFile, header.data_file, None);
        driver.children.extend(context.reference("data-file", Role::DATA, data).await?);
        let backing = reference(ReferenceKind::Backing, header.backing, header.backing_format);
        *driver.backing.get_mut().unwrap() =
            context.reference("backing", Role::COW, backing).await?;
        Ok(())
    }
}

struct Fake {
    driver: &'static str,
    category: Category,
    name: String,
    shared: Arc<Shared>,
    max_transfer: u64,
    fail_flush: bool,
    fail_close: bool,
    file: Option<(PathBuf, File)>,
    children: Vec<Child>,
    backing: Mutex<Option<Child>>,
    is_closed: AtomicBool,
    readers: AtomicUsize,
}

impl Drop for Fake {
    fn drop(&mut self) {
        let how = if self.is_closed.load(Ordering::Relaxed) { "drop" } else { "abandon" };
        self.shared.note(format!("{how} {}", self.name));
    }
}

struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Driver for Fake {
    fn name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        512
    }

    fn limits(&self) -> Limits {
        let max_transfer = if self.category == Category::Protocol { self.max_transfer } else { 0 };
        Limits { max_transfer, ..Limits::default() }
    }

    fn is_filter(&self) -> bool {
        self.category == Category::Filter
    }

    fn supports_backing(&self) -> bool {
        self.category == Category::Format
    }

    fn filename(&self) -> Option<PathBuf> {
        self.file.as_ref().map(|(path, _)| path.clone())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.file.as_ref().and_then(|(_, file)| file.identity().ok())
    }

    fn read(&self, _offset: u64, _iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            assert!(!self.is_closed.load(Ordering::Relaxed), "read after close");
            self.readers.fetch_add(1, Ordering::Relaxed);
            let _leave = Leave(&self.readers);
            for _ in 0..4 {
                bds_io::yield_now().await;
            }
            self.shared.note(format!("read {}", self.name));
            assert!(!self.is_closed.load(Ordering::Relaxed), "closed while reading");
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn block_status(
        &self,
        _offset: u64,
        len: u64,
        _precise: bool,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            self.shared.note(format!("flush {}", self.name));
            if self.fail_flush {
                return Err(Error::new(ErrorKind::NoSpace, "told to fail flushing"));
            }
            Ok(())
        })
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        if self.fail_close {
            return Err(Error::new(ErrorKind::NotSupported, "told to fail"));
        }
        assert_eq!(self.readers.load(Ordering::Relaxed), 0, "nobody is inside");
        Ok(std::mem::replace(&mut *self.backing.lock().unwrap(), backing))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            assert!(!self.is_closed.swap(true, Ordering::Relaxed), "closed twice");
            self.shared.note(format!("close {}", self.name));
            if self.fail_close {
                return Err(Error::new(ErrorKind::Io, "told to fail closing"));
            }
            Ok(())
        })
    }
}

/// A backend's edge.
pub(super) fn root(node: &NodeRef, name: &str, access: Access) -> Arc<Edge> {
    let root = Root { kind: HolderKind::Backend, name, access, stays: false, is_backend: false };
    node.graph().attach_root(Some(node), &root).unwrap()
}

/// A corridor of one step: through the gate, counted in, to the driver.
struct Port(Arc<Edge>);

pub(super) fn port(edge: Arc<Edge>) -> Box<dyn ChildPort> {
    Box::new(Port(edge))
}

/// A request through an edge, as a backend would send it.
pub(super) async fn read(edge: &Edge) -> Result<()> {
    let target = loop {
        if let Some(ticket) = edge.ticket() {
            let target = edge.target();
            let number = target.tracker().enter();
            let inside = Inside { target, number };
            if edge.admits(ticket) {
                break inside;
            }
        }
        edge.wait_open().await;
    };
    target.target.driver().read(0, IoVec::default(), ReadFlags::empty()).await
}

struct Inside<'a> {
    target: Target<'a>,
    number: crate::tracker::ShardNumber,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.target.tracker().leave(self.number);
    }
}

fn nothing<T>() -> BoxFuture<'static, Result<T>> {
    Box::pin(async { Err(Error::new(ErrorKind::NotSupported, "not in this test")) })
}

impl ChildPort for Port {
    fn len(&self) -> u64 {
        self.0.target().len()
    }
    fn limits(&self) -> Limits {
        self.0.target().limits()
    }
    fn node_name(&self) -> String {
        self.0.target().name().to_owned()
    }
    fn filename(&self) -> Option<PathBuf> {
        walk::filename(&self.0.target())
    }
    fn driver_name(&self) -> &'static str {
        self.0.target().driver_name()
    }
    fn is_writable(&self) -> bool {
        self.0.target().is_writable()
    }
    fn can_zero(&self) -> bool {
        false
    }
    fn try_read(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }
    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }
    fn read(&self, _offset: u64, _iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(read(&self.0))
    }
    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        nothing()
    }
    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        nothing()
    }
    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        nothing()
    }
    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        nothing()
    }
    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let target = self.0.target();
            target.driver().flush_to_os().await
        })
    }
    fn block_status(
        &self,
        _offset: u64,
        _len: u64,
        _precise: bool,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        nothing()
    }
    fn is_zero(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<bool>> {
        nothing()
    }
    fn truncate(&self, _change: Truncate) -> BoxFuture<'_, Result<()>> {
        nothing()
    }
    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        nothing()
    }
    fn identity(&self) -> Option<(u64, u64)> {
        walk::identity(&self.0.target())
    }
}
