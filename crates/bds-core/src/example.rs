//! Three tiny drivers in memory, for the examples of this crate's documentation. Not for use.
//!
//! | driver | options | what it is |
//! |---|---|---|
//! | `memory` | `size`, `fail-flush`, `stuck` | a disk; it may fail to flush, and its requests may never end |
//! | `pass` | `file` | a filter that changes nothing |
//! | `layer` | `file`, `backing` | an overlay of whole blocks; what it holds it forgets when it is closed |

use std::any::Any;
use std::collections::BTreeSet;
use std::future::{pending, ready};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::IoVec;

use crate::driver::{
    BoxFuture, Category, Child, Driver, DriverType, HostMap, Limits, OpenContext, Precision,
    ReadFlags, Registry, Reopen, ReopenContext, Role, StatusFlags, StatusRun, Truncate, WriteFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, GraphConfig, NodeRef};
use crate::options::{OptionKind, OptionSpec, Options};

/// What `layer` keeps apart, in bytes.
const BLOCK_LEN: u32 = 4096;
/// Longest `memory` disk, in bytes.
const MAX_LEN: u64 = 64 << 20;

/// A graph with these drivers.
pub fn graph() -> Graph {
    let mut registry = Registry::new();
    for kind in KINDS {
        registry.register(Arc::new(kind)).expect("three names");
    }
    Graph::new(GraphConfig::new(Arc::new(registry)))
}

/// Runs an example in a graph of its own, which it must leave without a leak.
///
/// # Panics
/// The example failed, or it left a node open.
pub fn run(example: impl AsyncFnOnce(Graph) -> Result<()>) {
    let outcome = bds_io::block_on(async {
        let graph = graph();
        example(graph.clone()).await?;
        graph.shutdown().await.check_leaks()
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// Opens a node that `key=value` options describe.
///
/// # Errors
/// As [`Graph::open`].
pub async fn open(graph: &Graph, options: &str) -> Result<NodeRef> {
    graph.open(Options::parse(options)?).await
}

#[derive(Clone, Copy)]
struct Kind(&'static str, Category, &'static [OptionSpec]);

const fn spec(name: &'static str, kind: OptionKind) -> OptionSpec {
    OptionSpec { name, kind, help: "", default: None }
}

const MEMORY: &[OptionSpec] = &[
    spec("size", OptionKind::Size),
    spec("fail-flush", OptionKind::Bool),
    spec("stuck", OptionKind::Bool),
];
const PASS: &[OptionSpec] = &[spec("file", OptionKind::Child)];
const LAYER: &[OptionSpec] = &[PASS[0], spec("backing", OptionKind::Child)];
const KINDS: [Kind; 3] = [
    Kind("memory", Category::Protocol, MEMORY),
    Kind("pass", Category::Filter, PASS),
    Kind("layer", Category::Format, LAYER),
];

impl DriverType for Kind {
    fn name(&self) -> &'static str {
        self.0
    }

    fn category(&self) -> Category {
        self.1
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        self.2
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let role = match self.1 {
                Category::Protocol => {
                    let options = &mut context.options;
                    let len = checked_len(options.take_size("size")?.unwrap_or(0))?;
                    return Ok(Box::new(Memory {
                        bytes: Mutex::new(vec![0; len]),
                        fail_flush: options.take_bool("fail-flush")?.unwrap_or(false),
                        is_stuck: options.take_bool("stuck")?.unwrap_or(false),
                    }) as Box<dyn Driver>);
                }
                Category::Filter => Role::FILTERED | Role::PRIMARY,
                Category::Format => Role::DATA | Role::METADATA | Role::PRIMARY,
            };
            let file = context.child("file", role).await?;
            let backing = context.reference("backing", Role::COW, None).await?;
            let backing = Mutex::new(backing.map(Arc::new));
            Ok(Box::new(Above { kind: *self, file, backing, own: Mutex::default() }) as _)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn checked_len(len: u64) -> Result<usize> {
    let fits = usize::try_from(len).ok().filter(|_| len <= MAX_LEN);
    fits.ok_or_else(|| Error::new(ErrorKind::NoSpace, format!("at most {MAX_LEN} bytes fit")))
}

struct Memory {
    bytes: Mutex<Vec<u8>>,
    fail_flush: bool,
    is_stuck: bool,
}

/// A `pass` or a `layer`.
struct Above {
    kind: Kind,
    file: Child,
    /// Exchanged with nobody inside.
    backing: Mutex<Option<Arc<Child>>>,
    /// Numbers of the blocks that were written.
    own: Mutex<BTreeSet<u64>>,
}

/// What both have to say: neither keeps anything that depends on how it is opened.
macro_rules! any_way {
    () => {
        fn prepare_reopen<'n, 'c>(
            &'n self,
            _: &'c mut ReopenContext<'_>,
        ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
        where
            'n: 'c,
        {
            Box::pin(async { Ok(Box::new(()) as Box<dyn Reopen>) })
        }

        fn as_any(&self) -> &dyn Any {
            self
        }
    };
}

impl Driver for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn len(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.is_stuck {
            return None;
        }
        let bytes = lock(&self.bytes);
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = begin.saturating_add(iov.len()).min(bytes.len());
        iov.copy_from(0, &bytes[begin..end]);
        iov.fill(end - begin..iov.len(), 0);
        Some(Ok(()))
    }

    fn read(&self, offset: u64, iov: IoVec, _: ReadFlags) -> BoxFuture<'_, Result<()>> {
        match self.try_read(offset, &iov) {
            Some(read) => Box::pin(ready(read)),
            None => Box::pin(pending()),
        }
    }

    fn write(&self, offset: u64, iov: IoVec, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        if self.is_stuck {
            return Box::pin(pending());
        }
        let end = checked_len(offset.saturating_add(iov.len() as u64));
        Box::pin(ready(end.map(|end| {
            let mut bytes = lock(&self.bytes);
            let len = bytes.len().max(end);
            bytes.resize(len, 0);
            iov.copy_to(0, &mut bytes[end - iov.len()..end]);
        })))
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        let failure = Error::new(ErrorKind::Io, "told to fail flushing");
        Box::pin(ready(if self.fail_flush { Err(failure) } else { Ok(()) }))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let flags = StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        Box::pin(ready(Ok(StatusRun { len, flags, map: Some(HostMap { child: "", offset }) })))
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(ready(checked_len(change.len).map(|len| lock(&self.bytes).resize(len, 0))))
    }

    any_way!();
}

impl Above {
    /// Do the bytes from here on lie in the file, and how many?
    fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        let (own, block) = (lock(&self.own), u64::from(BLOCK_LEN));
        let is_own = |at: u64| own.contains(&(at / block));
        let mut end = (offset / block + 1) * block;
        while end < offset + len && is_own(end) == is_own(offset) {
            end += block;
        }
        (is_own(offset), end.min(offset + len) - offset)
    }

    async fn load(&self, mut offset: u64, mut iov: IoVec, flags: ReadFlags) -> Result<()> {
        while !iov.is_empty() {
            let (is_own, len) = self.run(offset, iov.len() as u64);
            let rest = iov.split_off(checked_len(len)?);
            let backing = lock(&self.backing).clone();
            match backing {
                _ if is_own => self.file.read(offset, iov, flags).await?,
                Some(backing) => backing.read(offset, iov, flags).await?,
                None => iov.fill(0..iov.len(), 0),
            }
            (offset, iov) = (offset + len, rest);
        }
        Ok(())
    }
}

impl Driver for Above {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn limits(&self) -> Limits {
        let request_alignment = if self.supports_backing() { BLOCK_LEN } else { 1 };
        Limits { request_alignment, ..Limits::default() }
    }

    fn is_filter(&self) -> bool {
        self.kind.1 == Category::Filter
    }

    fn supports_backing(&self) -> bool {
        !self.is_filter()
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        match self.is_filter() {
            true => self.file.read(offset, iov, flags),
            false => Box::pin(self.load(offset, iov, flags)),
        }
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let (block, end) = (u64::from(BLOCK_LEN), offset + iov.len() as u64);
            self.file.write(offset, iov, flags).await?;
            lock(&self.own).extend(offset / block..end.div_ceil(block));
            Ok(())
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let (is_own, own_len) = self.run(offset, len);
        let own = StatusFlags::DATA | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        let map = Some(HostMap { child: "file", offset });
        Box::pin(ready(Ok(match (self.is_filter(), is_own) {
            (true, _) => StatusRun { len, flags: StatusFlags::RAW, map },
            (false, true) => StatusRun { len: own_len, flags: own, map },
            (false, false) => StatusRun { len: own_len, flags: StatusFlags::empty(), map: None },
        })))
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        let before = std::mem::replace(&mut *lock(&self.backing), backing.map(Arc::new));
        Ok(before.and_then(Arc::into_inner))
    }

    any_way!();
}
