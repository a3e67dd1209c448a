//! Fake drivers of the model-driven property tests: they fail at numbered steps and count what must
//! balance.
//!
//! `file` is a protocol without a file, `cow` an image format, `pass` a filter. Reads go down
//! through all children and can be held at the `file` nodes. "P1" to "P50" are the properties
//! listed in `graph/tests/properties`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bds_io::IoVec;
use bds_io::sync::Semaphore;

use super::driver::{Behaviour, Children, FakeDriver, FakeType};
use super::{lock, option};
use crate::driver::{
    BoxFuture, Category, Driver, Limits, OpenContext, ReadFlags, Registry, Reopen, ReopenContext,
};
use crate::error::{Error, ErrorKind, Result};
use crate::options::{OptionKind, OptionSpec};

/// The graph's source of numbered faults, so that steps of drivers and of the graph have one
/// numbering.
type FailStep = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// Counters and switches of the drivers of one graph.
pub(crate) struct Stepwise {
    fail_step: OnceLock<FailStep>,
    /// Driver steps fail too. Off where an operation is already being undone: a second fault would
    /// leave nothing to assert.
    pub(crate) drivers_fail: AtomicBool,
    /// Names of nodes that were closed, in order.
    pub(crate) closed: Mutex<Vec<String>>,
    pub(crate) opens: AtomicUsize,
    pub(crate) closes: AtomicUsize,
    pub(crate) prepared: AtomicUsize,
    pub(crate) committed: AtomicUsize,
    pub(crate) dropped: AtomicUsize,
    /// Requests wait at `file` nodes for a permit.
    pub(crate) holds_requests: AtomicBool,
    pub(crate) permits: Semaphore,
    /// Nodes in drained sections whose beginning has returned, with the number of sections.
    sealed: Mutex<HashMap<String, usize>>,
}

impl Stepwise {
    /// Registers the three drivers.
    pub(crate) fn register(registry: &mut Registry) -> Arc<Self> {
        let drivers = Arc::new(Self {
            fail_step: OnceLock::new(),
            drivers_fail: AtomicBool::new(true),
            closed: Mutex::default(),
            opens: AtomicUsize::new(0),
            closes: AtomicUsize::new(0),
            prepared: AtomicUsize::new(0),
            committed: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            holds_requests: AtomicBool::new(false),
            permits: Semaphore::new(0),
            sealed: Mutex::default(),
        });
        for (name, category) in
            [("file", Category::Protocol), ("cow", Category::Format), ("pass", Category::Filter)]
        {
            let shared = Arc::clone(&drivers);
            registry.register(Arc::new(FakeType { name, category, shared })).unwrap();
        }
        drivers
    }

    /// Sets what counts and fails the steps of drivers.
    pub(crate) fn set_fail_step(&self, fail_step: FailStep) {
        assert!(self.fail_step.set(fail_step).is_ok(), "one graph a set of drivers");
    }

    /// A step of a driver that can fail.
    fn step(&self) -> Result<()> {
        match self.fail_step.get().filter(|_| self.drivers_fail.load(Ordering::Relaxed)) {
            Some(fail_step) => fail_step(),
            None => Ok(()),
        }
    }

    /// Asserts until [`Stepwise::unseal`] that no request enters the node.
    pub(crate) fn seal(&self, name: &str) {
        *lock(&self.sealed).entry(name.to_owned()).or_default() += 1;
    }

    pub(crate) fn unseal(&self, name: &str) {
        *lock(&self.sealed).get_mut(name).unwrap() -= 1;
    }

    fn is_sealed(&self, name: &str) -> bool {
        lock(&self.sealed).get(name).is_some_and(|count| *count > 0)
    }
}

/// Requests in the driver. A change that drains the node works there too and is not counted.
pub(crate) fn requests(driver: &dyn Driver) -> usize {
    FakeDriver::<Stepwise>::of(driver).inside()
}

/// The driver's value of the reopenable option "level".
pub(crate) fn level(driver: &dyn Driver) -> u64 {
    FakeDriver::<Stepwise>::of(driver).node.level.load(Ordering::Relaxed)
}

/// State of one node.
pub(crate) struct StepwiseNode {
    fail_flush: bool,
    fail_close: bool,
    refuses_backing: bool,
    has_odd_len: bool,
    transfer: u64,
    level: AtomicU64,
}

/// A prepared reopen: committed or dropped, once (P28, P30).
struct Ready<'a> {
    driver: &'a FakeDriver<Stepwise>,
    level: Option<u64>,
    is_committed: bool,
}

impl Reopen for Ready<'_> {
    fn commit(mut self: Box<Self>) {
        self.is_committed = true;
        self.driver.shared.committed.fetch_add(1, Ordering::Relaxed);
        if let Some(level) = self.level {
            self.driver.node.level.store(level, Ordering::Relaxed);
        }
    }
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        if !self.is_committed {
            self.driver.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Behaviour for Stepwise {
    type Node = StepwiseNode;

    fn open_options(_category: Category) -> &'static [OptionSpec] {
        const ALL: &[OptionSpec] = &[
            option("fail-open", OptionKind::Bool),
            option("fail-flush", OptionKind::Bool),
            option("fail-close", OptionKind::Bool),
            option("refuse-backing", OptionKind::Bool),
            option("odd-len", OptionKind::Bool),
            option("transfer", OptionKind::Size),
            option("level", OptionKind::Size),
            option("file", OptionKind::Child),
            option("backing", OptionKind::Child),
        ];
        ALL
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
        category: Category,
    ) -> BoxFuture<'a, Result<(Children, StepwiseNode)>> {
        Box::pin(async move {
            self.step()?;
            let children = Children::open(context, category).await?;
            let children = children.open_backing(context, category).await?;
            let options = &mut context.options;
            let mut switch = |key| Ok::<bool, Error>(options.take_bool(key)?.unwrap_or(false));
            let fail_open = switch("fail-open")?;
            let node = StepwiseNode {
                fail_flush: switch("fail-flush")?,
                fail_close: switch("fail-close")?,
                refuses_backing: switch("refuse-backing")?,
                has_odd_len: switch("odd-len")?,
                transfer: options.take_size("transfer")?.unwrap_or(0),
                level: AtomicU64::new(options.take_size("level")?.unwrap_or(0)),
            };
            self.step()?;
            if fail_open {
                return Err(Error::new(ErrorKind::Io, "injected failure to open"));
            }
            self.opens.fetch_add(1, Ordering::Relaxed);
            Ok((children, node))
        })
    }

    fn len(driver: &FakeDriver<Self>) -> u64 {
        if driver.node.has_odd_len { 1000 } else { 1024 }
    }

    fn limits(driver: &FakeDriver<Self>) -> Limits {
        let request_alignment = if driver.node.has_odd_len { 512 } else { 1 };
        Limits { max_transfer: driver.node.transfer, request_alignment, ..Limits::default() }
    }

    fn read(
        driver: &FakeDriver<Self>,
        _offset: u64,
        iov: IoVec,
        _flags: ReadFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let shared = &driver.shared;
            assert!(!shared.is_sealed(&driver.name), "P34: {} is drained", driver.name);
            for child in driver.children.list() {
                child.read(0, iov.clone(), ReadFlags::empty()).await?;
            }
            match (driver.category, shared.holds_requests.load(Ordering::Relaxed)) {
                (Category::Protocol, true) => shared.permits.acquire().await.unwrap().forget(),
                (Category::Protocol, false) => super::yield_times(2).await,
                _ => {}
            }
            Ok(())
        })
    }

    fn flush_to_os(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            match driver.node.fail_flush {
                true => Err(Error::new(ErrorKind::NoSpace, "injected flush failure")),
                false => Ok(()),
            }
        })
    }

    fn check_set_backing(driver: &FakeDriver<Self>) -> Result<()> {
        driver.shared.step()?;
        match driver.node.refuses_backing {
            true => Err(Error::new(ErrorKind::NotSupported, "refused as configured")),
            false => Ok(()),
        }
    }

    fn prepare_reopen<'n: 'c, 'c>(
        driver: &'n FakeDriver<Self>,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        Box::pin(async move {
            driver.shared.step()?;
            bds_io::yield_now().await;
            let level = context.options.take_size("level")?;
            driver.shared.prepared.fetch_add(1, Ordering::Relaxed);
            let ready: Box<dyn Reopen + 'n> =
                Box::new(Ready { driver, level, is_committed: false });
            Ok(ready)
        })
    }

    fn set_active(driver: &FakeDriver<Self>, _is_active: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.step()?;
            bds_io::yield_now().await;
            Ok(())
        })
    }

    fn after_close(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.closes.fetch_add(1, Ordering::Relaxed);
            lock(&driver.shared.closed).push(driver.name.clone());
            match driver.node.fail_close {
                true => Err(Error::new(ErrorKind::Io, "injected close failure")),
                false => Ok(()),
            }
        })
    }
}
