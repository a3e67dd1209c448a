//! A fake driver over bytes in memory, and a graph of such nodes.
//!
//! It asserts what the request path promises to drivers (alignment, limits, declared flags), logs
//! its operations, yields to the seeded scheduler, fails, and answers status queries as configured.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use bds_io::IoVec;

use super::bitmap_store::FakeStore;
use super::{lock, option, yield_times};
use crate::driver::{
    Attempt, BitmapStore, BoxFuture, Category, Child, Driver, DriverType, HostMap, ImageInfo,
    Limits, OpenContext, Precision, ReadFlags, Registry, Reopen, ReopenContext, Role, StatusFlags,
    StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphConfig, NodeRef};
use crate::options::{OptionKind, OptionSpec, Options};
use crate::request::{Backend, BackendOptions};

/// An operation that reached the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read(Range<u64>),
    Write(Range<u64>, WriteFlags),
    Compressed(Range<u64>),
    Zero(Range<u64>, ZeroFlags),
    Discard(Range<u64>),
    FlushToOs,
    FlushToDisk,
    Truncate(u64, bool),
    CopyRange(Range<u64>),
}

/// The operation that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    Read,
    Write,
    Zero,
    FlushToDisk,
    Status,
    Truncate,
}

/// Configuration of a fake disk.
#[derive(Clone)]
pub(crate) struct Config {
    pub(crate) limits: Limits,
    pub(crate) write_flags: WriteFlags,
    pub(crate) zero_flags: Option<ZeroFlags>,
    /// Supports a backing child.
    pub(crate) supports_backing: bool,
    pub(crate) is_filter: bool,
    pub(crate) must_see_writes: bool,
    /// Forwards every request to the child "file".
    pub(crate) forwards: bool,
    /// Completes `try_read` and `try_write`.
    pub(crate) inline: bool,
    /// An inline write waits for the test here, once inside and once before it returns.
    pub(crate) barrier: Option<Arc<Barrier>>,
    /// Scheduler turns before and after an effect.
    pub(crate) turns: usize,
    /// Status answers by range; ranges not covered are data.
    pub(crate) statuses: Vec<Answer>,
    /// Where bitmaps are stored. Such a node can be reopened with any flags.
    pub(crate) store: Option<Arc<FakeStore>>,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) options: Options,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            write_flags: WriteFlags::empty(),
            zero_flags: None,
            supports_backing: false,
            is_filter: false,
            must_see_writes: false,
            forwards: false,
            inline: false,
            barrier: None,
            turns: 0,
            statuses: Vec::new(),
            store: None,
            cluster_size: None,
            options: Options::new(),
        }
    }
}

/// A fault: the operation, its range (any if `None`), and the error.
struct Fault {
    on: On,
    range: Option<Range<u64>>,
    is_once: bool,
    kind: ErrorKind,
}

/// A status answer: range, flags, mapping.
pub(crate) type Answer = (Range<u64>, StatusFlags, Option<HostMap>);

/// State of a fake disk, as tests see it.
pub(crate) struct State {
    pub(crate) bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Op>>,
    faults: Mutex<Vec<Fault>>,
    /// Calls of `try_read` and `try_write`.
    pub(crate) attempts: AtomicUsize,
    /// Writes in flight, and their maximum.
    writes: AtomicUsize,
    pub(crate) most_writes: AtomicUsize,
    config: Config,
}

impl State {
    pub(crate) fn new(bytes: Vec<u8>, config: Config) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            log: Mutex::default(),
            faults: Mutex::default(),
            attempts: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            most_writes: AtomicUsize::new(0),
            config,
        })
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// Takes the operations since the last call.
    pub(crate) fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut *lock(&self.log))
    }

    /// The operations so far.
    pub(crate) fn peek_log(&self) -> Vec<Op> {
        lock(&self.log).clone()
    }

    /// Makes the next such operation (overlapping the range, if one is given) fail with EIO.
    pub(crate) fn fail_once(&self, on: On, range: Option<Range<u64>>) {
        self.add_fault(on, range, true, ErrorKind::Io);
    }

    /// Makes all such operations fail with EIO.
    pub(crate) fn fail_always(&self, on: On, range: Option<Range<u64>>) {
        self.add_fault(on, range, false, ErrorKind::Io);
    }

    /// Makes all such operations fail with this kind until [`State::clear_faults`].
    pub(crate) fn fail_with(&self, on: On, kind: ErrorKind) {
        self.add_fault(on, None, false, kind);
    }

    /// Removes all faults.
    pub(crate) fn clear_faults(&self) {
        lock(&self.faults).clear();
    }

    fn add_fault(&self, on: On, range: Option<Range<u64>>, is_once: bool, kind: ErrorKind) {
        lock(&self.faults).push(Fault { on, range, is_once, kind });
    }

    fn note(&self, op: Op) {
        lock(&self.log).push(op);
    }

    fn check_fault(&self, on: On, range: &Range<u64>) -> Result<()> {
        let mut faults = lock(&self.faults);
        let hit = faults.iter().position(|fault| {
            let overlaps = |p: &Range<u64>| p.start < range.end && range.start < p.end;
            fault.on == on && fault.range.as_ref().is_none_or(overlaps)
        });
        let Some(hit) = hit else { return Ok(()) };
        let kind = faults[hit].kind;
        if faults[hit].is_once {
            faults.remove(hit);
        }
        Err(Error::new(kind, "injected").at(range.start))
    }

    fn check_contract(&self, offset: u64, iov: &IoVec) {
        let limits = &self.config.limits;
        let align = u64::from(limits.request_alignment);
        let len = iov.len() as u64;
        assert_eq!((offset % align, len % align), (0, 0), "{offset}+{len} is not aligned");
        assert!(len > 0 && (limits.max_transfer == 0 || len <= limits.max_transfer.max(align)));
        assert!(limits.max_iov == 0 || iov.segments().len() <= limits.max_iov as usize);
    }

    fn load(&self, offset: u64, iov: &IoVec) {
        let bytes = lock(&self.bytes);
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let end = (start + iov.len()).min(bytes.len());
        iov.copy_from(0, &bytes[start..end]);
        iov.fill(end - start..iov.len(), 0);
    }

    /// The disk changes: bitmaps in the image are marked in use first.
    fn touch(&self) {
        if let Some(store) = &self.config.store {
            store.touch();
        }
    }

    fn store(&self, offset: u64, data: &[u8]) {
        self.touch();
        let mut bytes = lock(&self.bytes);
        let start = usize::try_from(offset).unwrap();
        if bytes.len() < start + data.len() {
            bytes.resize(start + data.len(), 0);
        }
        bytes[start..start + data.len()].copy_from_slice(data);
    }
}

fn range(offset: u64, iov: &IoVec) -> Range<u64> {
    offset..offset + iov.len() as u64
}

/// The driver.
pub(crate) struct FakeDisk {
    state: Arc<State>,
    file: Option<Child>,
    _backing: Option<Child>,
}

impl FakeDisk {
    async fn wait_turns(&self) {
        yield_times(self.state.config.turns).await;
    }

    fn forward_to(&self) -> Option<&Child> {
        self.file.as_ref().filter(|_| self.state.config.forwards)
    }
}

impl Driver for FakeDisk {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn len(&self) -> u64 {
        match self.forward_to() {
            Some(file) => file.len(),
            None => lock(&self.state.bytes).len() as u64,
        }
    }

    fn limits(&self) -> Limits {
        self.state.config.limits
    }

    fn is_filter(&self) -> bool {
        self.state.config.is_filter
    }

    fn must_see_writes(&self) -> bool {
        self.state.config.must_see_writes
    }

    fn supports_backing(&self) -> bool {
        self.state.config.supports_backing
    }

    fn write_flags(&self) -> WriteFlags {
        self.state.config.write_flags
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        self.state.config.zero_flags
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if let Some(file) = self.forward_to() {
            return file.try_read(offset, iov);
        }
        self.state.attempts.fetch_add(1, Ordering::SeqCst);
        if !self.state.config.inline {
            return None;
        }
        self.state.check_contract(offset, iov);
        if let Err(error) = self.state.check_fault(On::Read, &range(offset, iov)) {
            return Some(Err(error));
        }
        self.state.load(offset, iov);
        Some(Ok(()))
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if let Some(file) = self.forward_to() {
            return file.try_write(offset, iov);
        }
        self.state.attempts.fetch_add(1, Ordering::SeqCst);
        if !self.state.config.inline {
            return None;
        }
        self.state.check_contract(offset, iov);
        if let Err(error) = self.state.check_fault(On::Write, &range(offset, iov)) {
            return Some(Err(error));
        }
        let wait = || self.state.config.barrier.as_ref().map(|test| test.wait());
        wait();
        self.state.store(offset, &iov.to_vec(0..iov.len()));
        wait();
        Some(Ok(()))
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        if let Some(file) = self.forward_to() {
            return file.read(offset, iov, flags);
        }
        Box::pin(async move {
            self.state.check_contract(offset, &iov);
            self.state.note(Op::Read(range(offset, &iov)));
            self.wait_turns().await;
            self.state.check_fault(On::Read, &range(offset, &iov))?;
            self.state.load(offset, &iov);
            self.wait_turns().await;
            Ok(())
        })
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        if let Some(file) = self.forward_to() {
            return file.write(offset, iov, flags);
        }
        Box::pin(async move {
            self.state.check_contract(offset, &iov);
            self.state.note(Op::Write(range(offset, &iov), flags));
            assert!(self.state.config.write_flags.contains(flags), "undeclared flags {flags:?}");
            let data = iov.to_vec(0..iov.len());
            let in_flight = self.state.writes.fetch_add(1, Ordering::SeqCst) + 1;
            self.state.most_writes.fetch_max(in_flight, Ordering::SeqCst);
            self.wait_turns().await;
            self.state.writes.fetch_sub(1, Ordering::SeqCst);
            self.state.check_fault(On::Write, &range(offset, &iov))?;
            self.state.store(offset, &data);
            self.wait_turns().await;
            Ok(())
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.state.note(Op::Compressed(range(offset, &iov)));
            self.wait_turns().await;
            if !iov.is_empty() {
                self.state.store(offset, &iov.to_vec(0..iov.len()));
            }
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            let limits = &self.state.config.limits;
            let align = u64::from(limits.request_alignment);
            let unit = u64::from(limits.zero_alignment).max(align);
            assert_eq!((offset % align, len % align), (0, 0));
            let crosses = offset / unit != (offset + len - 1) / unit;
            let whole = offset.is_multiple_of(unit) && len.is_multiple_of(unit);
            assert!(whole || !crosses, "{offset}+{len} crosses a unit of {unit}");
            assert!(limits.max_zero == 0 || len <= limits.max_zero.max(unit));
            assert!(self.state.config.zero_flags.is_some_and(|known| known.contains(flags)));
            self.state.note(Op::Zero(offset..offset + len, flags));
            self.wait_turns().await;
            if self.state.check_fault(On::Zero, &(offset..offset + len)).is_err() {
                return Ok(Attempt::Unsupported);
            }
            self.state.store(offset, &vec![0; usize::try_from(len).unwrap()]);
            self.wait_turns().await;
            Ok(Attempt::Done)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        self.state.note(Op::Discard(offset..offset + len));
        self.state.touch();
        Box::pin(async { Ok(Attempt::Done) })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        self.state.note(Op::FlushToOs);
        Box::pin(async { Ok(()) })
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        self.state.note(Op::FlushToDisk);
        Box::pin(async {
            self.wait_turns().await;
            self.state.check_fault(On::FlushToDisk, &(0..u64::MAX))
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let statuses = &self.state.config.statuses;
        let found = statuses.iter().find(|(range, ..)| range.contains(&offset));
        let run = match found {
            Some((range, flags, map)) => {
                let map = map.map(|m| HostMap { offset: m.offset + offset - range.start, ..m });
                StatusRun { len: len.min(range.end - offset), flags: *flags, map }
            }
            None => {
                let next = statuses.iter().map(|(r, ..)| r.start).filter(|s| *s > offset).min();
                let len = next.map_or(len, |next| len.min(next - offset));
                StatusRun { len, flags: StatusFlags::DATA, map: None }
            }
        };
        let fault = self.state.check_fault(On::Status, &(offset..offset + 1));
        Box::pin(async move { fault.map(|()| run) })
    }

    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        let cluster_size = self.state.config.cluster_size;
        Box::pin(async move { Ok(ImageInfo { cluster_size, ..ImageInfo::default() }) })
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        let store: &FakeStore = self.state.config.store.as_ref()?;
        Some(store)
    }

    fn prepare_reopen<'n: 'c, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        let is_same = context.current.read_only == context.flags.read_only;
        let ready: Result<Box<dyn Reopen>> = match self.state.config.store.is_some() || is_same {
            true => Ok(Box::new(())),
            false => Err(Error::new(ErrorKind::NotSupported, "reopen")),
        };
        Box::pin(async { ready })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        if self.state.config.is_filter {
            let text = "a filter has no length";
            return Box::pin(async move { Err(Error::new(ErrorKind::NotSupported, text)) });
        }
        Box::pin(async move {
            self.wait_turns().await;
            self.state.note(Op::Truncate(change.len, change.zero_new));
            self.state.check_fault(On::Truncate, &(0..u64::MAX))?;
            self.state.touch();
            lock(&self.state.bytes).resize(usize::try_from(change.len).unwrap(), 0);
            Ok(())
        })
    }

    fn copy_range_from<'a>(
        &'a self,
        source: &'a dyn Driver,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async move {
            let Some(source) = source.as_any().downcast_ref::<FakeDisk>() else {
                return Ok(Attempt::Unsupported);
            };
            self.state.note(Op::CopyRange(offset..offset + len));
            let from = usize::try_from(source_offset).unwrap();
            let data = source.state.bytes()[from..from + usize::try_from(len).unwrap()].to_vec();
            self.state.store(offset, &data);
            Ok(Attempt::Done)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Opens fake disks by their node's name.
struct FakeDiskType(Mutex<HashMap<String, Arc<State>>>);

impl DriverType for FakeDiskType {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        const CHILDREN: &[OptionSpec] =
            &[option("file", OptionKind::Child), option("backing", OptionKind::Child)];
        CHILDREN
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let state = lock(&self.0).get(context.node_name).cloned();
            let state = state.expect("the test configured this node");
            let role = if state.config.is_filter {
                Role::FILTERED | Role::PRIMARY
            } else {
                Role::DATA | Role::PRIMARY
            };
            let file = match context.options.contains("file") {
                true => Some(context.child("file", role).await?),
                false => None,
            };
            let backing = match context.options.contains("backing") {
                true => Some(context.child("backing", Role::COW).await?),
                false => None,
            };
            let fake: Box<dyn Driver> = Box::new(FakeDisk { state, file, _backing: backing });
            Ok(fake)
        })
    }
}

/// A graph of fake disks.
pub(crate) struct DiskGraph {
    graph: Graph,
    kind: Arc<FakeDiskType>,
}

impl DiskGraph {
    pub(crate) fn new() -> Self {
        let kind = Arc::new(FakeDiskType(Mutex::default()));
        let mut registry = Registry::new();
        registry.register(kind.clone()).unwrap();
        Self { graph: Graph::new(GraphConfig::new(Arc::new(registry))), kind }
    }

    /// Opens a node; `config.options` may name children that are open already.
    pub(crate) async fn node(
        &self,
        name: &str,
        bytes: Vec<u8>,
        config: Config,
    ) -> (NodeRef, Arc<State>) {
        self.open_node(name, bytes, config).await.unwrap()
    }

    /// As [`DiskGraph::node`], with the error of the open.
    pub(crate) async fn open_node(
        &self,
        name: &str,
        bytes: Vec<u8>,
        config: Config,
    ) -> Result<(NodeRef, Arc<State>)> {
        let options = config.options.clone().with("driver", "fake").with("node-name", name);
        let state = State::new(bytes, config);
        lock(&self.kind.0).insert(name.to_owned(), state.clone());
        Ok((self.graph.open(options).await?, state))
    }

    /// The graph.
    pub(crate) fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The open node of this name.
    pub(crate) fn find(&self, name: &str) -> NodeRef {
        self.graph.find(name).unwrap()
    }

    /// Opens a node and a writable backend on it.
    pub(crate) async fn disk(&self, bytes: Vec<u8>, config: Config) -> (Backend, Arc<State>) {
        let (node, state) = self.node("disk", bytes, config).await;
        (backend(&node), state)
    }
}

/// A backend on the node, writable if the node is.
pub(crate) fn backend(node: &NodeRef) -> Backend {
    let writable = node.is_writable();
    Backend::new(node, BackendOptions { name: "test".into(), writable, ..Default::default() })
        .unwrap()
}
