//! Logging fake drivers and the fixture of most graph tests.
//!
//! `file` opens a file of the simulated disk, `cow` is an image format whose headers lie in a
//! table, `pass` is a filter. Each logs what the graph does to it and fails as its options say.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bds_io::{File, Fs, IoVec, OpenOptions, Sim, SimConfig};

use super::driver::{Behaviour, Children, FakeDriver, file_role};
use super::{gate_port, lock, option, yield_times};
use crate::driver::{
    BoxFuture, Category, ClaimedFile, CreateContext, CreateFacts, Driver, DriverType, Limits,
    OpenContext, ReadFlags, Reference, ReferenceKind, Registry, Role,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::reference_gate::TrustAll;
use crate::graph::{Graph, GraphConfig, NodeRef};
use crate::options::{OptionKind, OptionSpec, Options};

/// A graph of logging drivers on a simulated disk.
pub(crate) struct Fixture {
    pub(crate) graph: Graph,
    pub(crate) drivers: Arc<Logging>,
    pub(crate) sim: Sim,
}

/// Runs a test in a simulation of its own, on a graph whose reference gate trusts the images.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(Fixture) -> F) {
    run_with(|_| {}, test);
}

/// As [`run`], with an adjusted configuration of the graph.
pub(crate) fn run_with<F: Future<Output = ()>>(
    adjust: impl FnOnce(&mut GraphConfig),
    test: impl FnOnce(Fixture) -> F,
) {
    run_seeded(7, adjust, test);
}

/// As [`run_with`], under the schedule of this seed.
pub(crate) fn run_seeded<F: Future<Output = ()>>(
    seed: u64,
    adjust: impl FnOnce(&mut GraphConfig),
    test: impl FnOnce(Fixture) -> F,
) {
    let sim = Sim::new(seed, SimConfig::calm());
    let drivers = Arc::new(Logging::default());
    let mut registry = Registry::new();
    for (name, category) in
        [("file", Category::Protocol), ("cow", Category::Format), ("pass", Category::Filter)]
    {
        let drivers = Arc::clone(&drivers);
        registry.register(Arc::new(LoggingType { name, category, drivers })).unwrap();
    }
    let mut config = GraphConfig::new(Arc::new(registry));
    config.fs = sim.fs();
    config.gate = Arc::new(TrustAll { may_probe: false });
    adjust(&mut config);
    let graph = Graph::with_ports(config, gate_port::port);
    sim.block_on(test(Fixture { graph, drivers, sim: sim.clone() }));
}

impl Fixture {
    /// Makes an image file with this header.
    pub(crate) fn image(&self, path: &'static str, header: Header) {
        self.sim.put_file(path, &[0; 512]);
        lock(&self.drivers.headers).insert(path.into(), header);
    }

    /// Makes an image file without references.
    pub(crate) fn plain(&self, path: &'static str) {
        self.image(path, Header::default());
    }

    /// Opens the node that the options describe.
    pub(crate) async fn open(&self, text: &str) -> NodeRef {
        self.graph.open(Options::parse(text).unwrap()).await.unwrap()
    }

    /// Opens as [`Fixture::open`], which must fail.
    pub(crate) async fn open_error(&self, text: &str) -> Error {
        self.graph.open(Options::parse(text).unwrap()).await.unwrap_err()
    }
}

/// References stored in an image of the format `cow`.
#[derive(Clone, Default)]
pub(crate) struct Header {
    pub(crate) backing: Option<&'static str>,
    pub(crate) backing_format: Option<&'static str>,
    pub(crate) data_file: Option<&'static str>,
}

/// Log and image headers of the logging drivers.
#[derive(Default)]
pub(crate) struct Logging {
    pub(crate) log: Mutex<Vec<String>>,
    headers: Mutex<HashMap<PathBuf, Header>>,
}

impl Logging {
    fn note(&self, line: String) {
        lock(&self.log).push(line);
    }

    /// Takes the lines since the last call.
    pub(crate) fn log(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.log))
    }
}

/// State of one logging node.
pub(crate) struct LoggingNode {
    max_transfer: u64,
    fail_flush: bool,
    fail_close: bool,
    file: Option<(PathBuf, File)>,
}

impl Behaviour for Logging {
    type Node = LoggingNode;

    fn open_options(category: Category) -> &'static [OptionSpec] {
        const FILE: &[OptionSpec] = &[
            option("filename", OptionKind::String),
            option("max-transfer", OptionKind::Size),
            option("fail-open", OptionKind::Bool),
            option("fail-flush", OptionKind::Bool),
            option("fail-close", OptionKind::Bool),
            option("ignored", OptionKind::Bool),
        ];
        const OTHER: &[OptionSpec] = &[
            option("file", OptionKind::Child),
            option("backing", OptionKind::Child),
            option("data-file", OptionKind::Child),
            option("fail-open", OptionKind::Bool),
            option("fail-flush", OptionKind::Bool),
            option("fail-close", OptionKind::Bool),
            option("ignored", OptionKind::Bool),
        ];
        if category == Category::Protocol { FILE } else { OTHER }
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
        category: Category,
    ) -> BoxFuture<'a, Result<(Children, LoggingNode)>> {
        Box::pin(async move {
            let options = &mut context.options;
            let mut node = LoggingNode {
                max_transfer: options.take_size("max-transfer")?.unwrap_or(4096),
                fail_flush: options.take_bool("fail-flush")?.unwrap_or(false),
                fail_close: options.take_bool("fail-close")?.unwrap_or(false),
                file: None,
            };
            let fail_open = options.take_bool("fail-open")?.unwrap_or(false);
            let children = match category {
                Category::Protocol => {
                    let path = options.take_str("filename")?.unwrap_or_default();
                    let wanted =
                        OpenOptions { write: !context.flags.read_only, ..OpenOptions::default() };
                    let file = context
                        .fs
                        .open(path.as_ref(), &wanted)
                        .map_err(|error| Error::io(error, "cannot open").file(&path))?;
                    node.file = Some((path.into(), file));
                    Children::default()
                }
                Category::Filter => Children::open(context, category).await?,
                Category::Format => self.open_format(context).await?,
            };
            if fail_open {
                let words = format!("injected failure to open {}", context.node_name);
                return Err(Error::new(ErrorKind::Io, words));
            }
            self.note(format!("open {}", context.node_name));
            Ok((children, node))
        })
    }

    fn limits(driver: &FakeDriver<Self>) -> Limits {
        let is_protocol = driver.category == Category::Protocol;
        let max_transfer = if is_protocol { driver.node.max_transfer } else { 0 };
        Limits { max_transfer, ..Limits::default() }
    }

    fn file(driver: &FakeDriver<Self>) -> Option<(PathBuf, (u64, u64))> {
        let (path, file) = driver.node.file.as_ref()?;
        Some((path.clone(), file.identity().expect("a simulated file has one")))
    }

    fn read(
        driver: &FakeDriver<Self>,
        _offset: u64,
        _iov: IoVec,
        _flags: ReadFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            yield_times(4).await;
            driver.shared.note(format!("read {}", driver.name));
            Ok(())
        })
    }

    fn flush_to_os(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            driver.shared.note(format!("flush {}", driver.name));
            match driver.node.fail_flush {
                true => Err(Error::new(ErrorKind::NoSpace, "injected flush failure")),
                false => Ok(()),
            }
        })
    }

    fn check_set_backing(driver: &FakeDriver<Self>) -> Result<()> {
        match driver.node.fail_close {
            true => Err(Error::new(ErrorKind::NotSupported, "injected failure")),
            false => Ok(()),
        }
    }

    fn after_close(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.note(format!("close {}", driver.name));
            match driver.node.fail_close {
                true => Err(Error::new(ErrorKind::Io, "injected close failure")),
                false => Ok(()),
            }
        })
    }

    fn dropped(driver: &FakeDriver<Self>) {
        let how = if driver.is_closed() { "drop" } else { "abandon" };
        driver.shared.note(format!("{how} {}", driver.name));
    }
}

impl Logging {
    /// Opens the children of a `cow` node, those in the header of its image included.
    async fn open_format(&self, context: &mut OpenContext<'_>) -> Result<Children> {
        let file = context.child("file", file_role(Category::Format)).await?;
        let header = file.filename().and_then(|path| lock(&self.headers).get(&path).cloned());
        let header = header.unwrap_or_default();
        let children = Children::default();
        children.push(file);
        let reference = |kind, stored: Option<&str>, format: Option<&str>| {
            stored.map(|stored| Reference {
                kind,
                stored_name: stored.into(),
                stored_format: format.map(str::to_owned),
            })
        };
        let data = reference(ReferenceKind::DataFile, header.data_file, None);
        if let Some(data) = context.reference("data-file", Role::DATA, data).await? {
            children.push(data);
        }
        let backing = reference(ReferenceKind::Backing, header.backing, header.backing_format);
        Ok(children.with_backing(context.reference("backing", Role::COW, backing).await?))
    }
}

/// Registers a logging driver; creates images beside what [`super::driver::FakeType`] can do.
struct LoggingType {
    name: &'static str,
    category: Category,
    drivers: Arc<Logging>,
}

impl DriverType for LoggingType {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        Logging::open_options(self.category)
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(FakeDriver::open(self.name, self.category, &self.drivers, context))
    }

    fn probe(&self, head: &[u8], _file_len: u64) -> u8 {
        u8::from(self.category == Category::Format && head.starts_with(b"COW")) * 100
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        const FILE: &[OptionSpec] = &[option("nocow", OptionKind::Bool)];
        const FORMAT: &[OptionSpec] = &[
            option("size", OptionKind::Size),
            option("backing_file", OptionKind::String),
            option("backing_fmt", OptionKind::String),
            option("data_file", OptionKind::String),
            option("fail-create", OptionKind::Bool),
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
            self.drivers
                .note(format!("create {:?} data {data_file:?} size {size:?}", file.filename()));
            match options.take_bool("fail-create")?.unwrap_or(false) {
                true => Err(Error::new(ErrorKind::NoSpace, "injected failure")),
                false => Ok(()),
            }
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
        let drivers = Arc::clone(&self.drivers);
        let name = path.display().to_string();
        Ok(ClaimedFile {
            made_path: (!was_there).then(|| path.to_owned()),
            identity,
            max_len: None,
            empty: Box::pin(async move {
                drivers.note(format!("empty {name}"));
                file.set_len(0).await.map_err(|error| Error::io(error, "cannot empty"))
            }),
        })
    }
}
