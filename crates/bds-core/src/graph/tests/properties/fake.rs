//! Drivers that watch the graph: each asserts what the contract promises it, and can be told to fail or to hold requests.
//!
//! `file` is a protocol without a file, `cow` an image format, `pass` a filter. Requests go down through all children and are held
//! at the files while the world says so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use bds_io::IoVec;
use bds_io::sync::Semaphore;

use crate::driver::{
    BoxFuture, Category, Child, Driver, DriverType, Limits, OpenContext, Precision, ReadFlags,
    Reopen, ReopenContext, Role, StatusFlags, StatusRun, WriteFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::graph::core::Shared;
use crate::options::{OptionKind, OptionSpec};

/// What the drivers of one world share.
pub(super) struct Floor {
    /// Whose faults strike drivers too, so that all steps have one numbering.
    graph: OnceLock<Weak<Shared>>,
    /// Do drivers fail? Not where something is taken back already: were that made to fail too, nothing would hold.
    pub(super) is_frail: AtomicBool,
    /// Nodes that were closed, in order.
    pub(super) closed: Mutex<Vec<String>>,
    pub(super) opened: AtomicUsize,
    pub(super) closings: AtomicUsize,
    pub(super) prepared: AtomicUsize,
    pub(super) committed: AtomicUsize,
    pub(super) dropped: AtomicUsize,
    /// Requests stop at the files until they are given a permit.
    pub(super) is_holding: AtomicBool,
    pub(super) permits: Semaphore,
    /// Nodes in drained sections whose beginning has returned: how many.
    pub(super) sealed: Mutex<HashMap<String, usize>>,
    /// Requests that got to a driver.
    pub(super) arrived: AtomicUsize,
}

impl Floor {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            graph: OnceLock::new(),
            is_frail: AtomicBool::new(true),
            closed: Mutex::default(),
            opened: AtomicUsize::new(0),
            closings: AtomicUsize::new(0),
            prepared: AtomicUsize::new(0),
            committed: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            is_holding: AtomicBool::new(false),
            permits: Semaphore::new(0),
            sealed: Mutex::default(),
            arrived: AtomicUsize::new(0),
        })
    }

    pub(super) fn belongs_to(&self, graph: &Graph) {
        self.graph.set(Arc::downgrade(&graph.0)).expect("one graph a floor");
    }

    /// A step of a driver that can fail.
    fn step(&self) -> Result<()> {
        let graph = self.graph.get().and_then(Weak::upgrade);
        match graph.filter(|_| self.is_frail.load(Ordering::Relaxed)) {
            Some(graph) => graph.faults.step(),
            None => Ok(()),
        }
    }

    pub(super) fn seal(&self, name: &str) {
        *self.sealed.lock().unwrap().entry(name.to_owned()).or_default() += 1;
    }

    pub(super) fn unseal(&self, name: &str) {
        *self.sealed.lock().unwrap().get_mut(name).unwrap() -= 1;
    }

    fn is_sealed(&self, name: &str) -> bool {
        self.sealed.lock().unwrap().get(name).is_some_and(|count| *count > 0)
    }
}

pub(super) struct FakeType {
    pub(super) name: &'static str,
    pub(super) category: Category,
    pub(super) floor: Arc<Floor>,
}

const fn spec(name: &'static str, kind: OptionKind) -> OptionSpec {
    OptionSpec { name, kind, help: "", default: None }
}

const OPTIONS: &[OptionSpec] = &[
    spec("fail-open", OptionKind::Bool),
    spec("fail-flush", OptionKind::Bool),
    spec("fail-close", OptionKind::Bool),
    spec("stubborn", OptionKind::Bool),
    spec("odd", OptionKind::Bool),
    spec("transfer", OptionKind::Size),
    spec("level", OptionKind::Size),
    spec("file", OptionKind::Child),
    spec("backing", OptionKind::Child),
];

impl DriverType for FakeType {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            self.floor.step()?;
            let name = context.node_name.to_owned();
            let mut children = Vec::new();
            let mut backing = None;
            match self.category {
                Category::Protocol => {}
                Category::Filter => {
                    children.push(context.child("file", Role::FILTERED | Role::PRIMARY).await?);
                }
                Category::Format => {
                    let role = Role::DATA | Role::METADATA | Role::PRIMARY;
                    children.push(context.child("file", role).await?);
                    backing = context.reference("backing", Role::COW, None).await?;
                }
            }
            let options = &mut context.options;
            let mut switch = |key| Ok::<bool, Error>(options.take_bool(key)?.unwrap_or(false));
            let fails = switch("fail-open")?;
            let driver = Fake {
                driver: self.name,
                category: self.category,
                floor: Arc::clone(&self.floor),
                fail_flush: switch("fail-flush")?,
                fail_close: switch("fail-close")?,
                is_stubborn: switch("stubborn")?,
                is_odd: switch("odd")?,
                transfer: options.take_size("transfer")?.unwrap_or(0),
                level: AtomicU64::new(options.take_size("level")?.unwrap_or(0)),
                name,
                children,
                backing: Mutex::new(backing),
                is_closed: AtomicBool::new(false),
                is_drained: AtomicBool::new(false),
                is_active: AtomicBool::new(true),
                inside: AtomicUsize::new(0),
            };
            self.floor.step()?;
            if fails {
                return Err(Error::new(ErrorKind::Io, "told to fail opening"));
            }
            self.floor.opened.fetch_add(1, Ordering::Relaxed);
            let driver: Box<dyn Driver> = Box::new(driver);
            Ok(driver)
        })
    }
}

struct Fake {
    driver: &'static str,
    category: Category,
    name: String,
    floor: Arc<Floor>,
    fail_flush: bool,
    fail_close: bool,
    is_stubborn: bool,
    is_odd: bool,
    transfer: u64,
    level: AtomicU64,
    children: Vec<Child>,
    backing: Mutex<Option<Child>>,
    is_closed: AtomicBool,
    is_drained: AtomicBool,
    is_active: AtomicBool,
    inside: AtomicUsize,
}

impl Fake {
    fn turn_active(&self, on: bool) {
        let was = self.is_active.swap(on, Ordering::Relaxed);
        assert_ne!(was, on, "{}: activation and inactivation alternate", self.name);
    }

    async fn pass_on(&self, iov: IoVec) -> Result<()> {
        for child in &self.children {
            child.read(0, iov.clone(), ReadFlags::empty()).await?;
        }
        if self.category == Category::Protocol {
            if self.floor.is_holding.load(Ordering::Relaxed) {
                self.floor.permits.acquire().await.unwrap().forget();
            } else {
                bds_io::yield_now().await;
                bds_io::yield_now().await;
            }
        }
        Ok(())
    }
}

struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A prepared reopen: committed or dropped, each once (P28, P30).
struct Ready<'a> {
    driver: &'a Fake,
    level: Option<u64>,
    is_done: bool,
}

impl Reopen for Ready<'_> {
    fn commit(mut self: Box<Self>) {
        self.is_done = true;
        self.driver.floor.committed.fetch_add(1, Ordering::Relaxed);
        if let Some(level) = self.level {
            self.driver.level.store(level, Ordering::Relaxed);
        }
    }
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.driver.floor.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Driver for Fake {
    fn name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        if self.is_odd { 1000 } else { 1024 }
    }

    fn limits(&self) -> Limits {
        let request_alignment = if self.is_odd { 512 } else { 1 };
        Limits { max_transfer: self.transfer, request_alignment, ..Limits::default() }
    }

    fn is_filter(&self) -> bool {
        self.category == Category::Filter
    }

    fn supports_backing(&self) -> bool {
        self.category == Category::Format
    }

    fn read(&self, _offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            assert!(!self.is_closed.load(Ordering::Relaxed), "P11: nothing comes after close");
            assert!(!self.floor.is_sealed(&self.name), "P34: {} is drained", self.name);
            self.floor.arrived.fetch_add(1, Ordering::Relaxed);
            self.inside.fetch_add(1, Ordering::Relaxed);
            let leave = Leave(&self.inside);
            self.pass_on(iov).await?;
            assert!(!self.is_closed.load(Ordering::Relaxed), "P11: not closed under a request");
            drop(leave);
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
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            match self.fail_flush {
                true => Err(Error::new(ErrorKind::NoSpace, "told to fail flushing")),
                false => Ok(()),
            }
        })
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        self.floor.step()?;
        if self.is_stubborn {
            return Err(Error::new(ErrorKind::NotSupported, "told to be stubborn"));
        }
        assert_eq!(self.inside.load(Ordering::Relaxed), 0, "P34: nobody is inside");
        assert!(self.is_drained.load(Ordering::Relaxed), "{} is not drained", self.name);
        Ok(std::mem::replace(&mut *self.backing.lock().unwrap(), backing))
    }

    /// P36: begin first, then strictly in turn.
    fn drain_begin(&self) {
        let was = self.is_drained.swap(true, Ordering::Relaxed);
        assert!(!was, "P36: {} is drained twice", self.name);
    }

    fn drain_end(&self) {
        let was = self.is_drained.swap(false, Ordering::Relaxed);
        assert!(was, "P36: {} was not drained", self.name);
    }

    fn prepare_reopen<'d: 'c, 'c>(
        &'d self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'd>>> {
        Box::pin(async move {
            self.floor.step()?;
            assert_eq!(self.inside.load(Ordering::Relaxed), 0, "P34: nobody is inside");
            bds_io::yield_now().await;
            let level = context.options.take_size("level")?;
            self.floor.prepared.fetch_add(1, Ordering::Relaxed);
            let ready: Box<dyn Reopen + 'd> =
                Box::new(Ready { driver: self, level, is_done: false });
            Ok(ready)
        })
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.floor.step()?;
            bds_io::yield_now().await;
            self.turn_active(false);
            Ok(())
        })
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.floor.step()?;
            bds_io::yield_now().await;
            self.turn_active(true);
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            assert!(!self.is_closed.swap(true, Ordering::Relaxed), "P11: closed twice");
            self.floor.closings.fetch_add(1, Ordering::Relaxed);
            self.floor.closed.lock().unwrap().push(self.name.clone());
            match self.fail_close {
                true => Err(Error::new(ErrorKind::Io, "told to fail closing")),
                false => Ok(()),
            }
        })
    }
}

/// Requests in the driver. A change that has the node drained works there too, and is none.
pub(super) fn requests(driver: &dyn Driver) -> usize {
    let fake = driver.as_any().downcast_ref::<Fake>().expect("all drivers here are fakes");
    fake.inside.load(Ordering::Relaxed)
}

/// The number that a driver's reopenable option has now.
pub(super) fn level(driver: &dyn Driver) -> u64 {
    let fake = driver.as_any().downcast_ref::<Fake>().expect("all drivers here are fakes");
    fake.level.load(Ordering::Relaxed)
}
