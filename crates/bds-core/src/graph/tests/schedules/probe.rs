//! Drivers that watch: `leaf` at the bottom, `image` with a file and perhaps a backing node, `filter`.
//!
//! They send their requests on through their children, with others running in between, and assert what a driver is promised: nobody
//! comes in while the node is drained or after it was closed, nobody is inside when a child comes or goes, `drain_begin` and `drain_end` take turns.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::{Buf, IoVec};

use crate::driver::{
    Access, BoxFuture, Category, Child, Driver, DriverType, NodeUse, OpenContext, Precision,
    ReadFlags, Reopen, ReopenContext, Role, StatusFlags, StatusRun, WriteFlags,
};
use crate::error::Result;
use crate::graph::Node;
use crate::options::{OptionKind, OptionSpec};

/// Length of every node.
pub(super) const LEN: u64 = 512;

/// How many drivers were opened and closed in a world, and a hash of all that happened.
#[derive(Default)]
pub(super) struct Census {
    pub(super) opened: AtomicUsize,
    pub(super) closed: AtomicUsize,
    /// How often drivers were asked what they do with a child.
    pub(super) asked: AtomicUsize,
    history: AtomicU64,
}

impl Census {
    /// Remembers what happened, in its order.
    fn note(&self, what: &str) {
        let before = self.history.load(Ordering::Relaxed);
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
        self.history.store(what.bytes().fold(before, mix), Ordering::Relaxed);
    }

    /// Equal for equal histories.
    pub(super) fn fingerprint(&self) -> u64 {
        self.history.load(Ordering::Relaxed)
    }
}

pub(super) struct ProbeType {
    pub(super) name: &'static str,
    pub(super) category: Category,
    pub(super) census: Arc<Census>,
}

/// One block of memory.
pub(super) fn block() -> IoVec {
    Buf::zeroed(usize::try_from(LEN).unwrap(), 1).iov()
}

const fn child(name: &'static str) -> OptionSpec {
    OptionSpec { name, kind: OptionKind::Child, help: "", default: None }
}

impl DriverType for ProbeType {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        const IMAGE: &[OptionSpec] = &[child("file"), child("backing")];
        match self.category {
            Category::Protocol => &[],
            Category::Filter => &IMAGE[..1],
            Category::Format => IMAGE,
        }
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let mut probe = Probe {
                driver: self.name,
                name: context.node_name.to_owned(),
                category: self.category,
                file: None,
                backing: Mutex::default(),
                inside: AtomicUsize::new(0),
                forbidden: AtomicUsize::new(0),
                is_drained: AtomicBool::new(false),
                is_closed: AtomicBool::new(false),
                is_dirty: AtomicBool::new(false),
                census: Arc::clone(&self.census),
            };
            match self.category {
                Category::Protocol => {}
                Category::Filter => {
                    let role = Role::FILTERED | Role::PRIMARY;
                    probe.file = Some(context.child("file", role).await?);
                }
                Category::Format => {
                    let role = Role::DATA | Role::METADATA | Role::PRIMARY;
                    let file = context.child("file", role).await?;
                    file.read(0, block(), ReadFlags::empty()).await?; // the header
                    probe.file = Some(file);
                    let backing = context.reference("backing", Role::COW, None).await?;
                    *probe.backing.get_mut().unwrap() = backing.map(Arc::new);
                }
            }
            self.census.opened.fetch_add(1, Ordering::Relaxed);
            let driver: Box<dyn Driver> = Box::new(probe);
            Ok(driver)
        })
    }
}

pub(super) struct Probe {
    driver: &'static str,
    name: String,
    category: Category,
    file: Option<Child>,
    /// A request keeps it in hand: whoever takes it away sees that.
    backing: Mutex<Option<Arc<Child>>>,
    inside: AtomicUsize,
    /// Drained sections in which the test counts on nobody's being inside.
    forbidden: AtomicUsize,
    is_drained: AtomicBool,
    is_closed: AtomicBool,
    is_dirty: AtomicBool,
    census: Arc<Census>,
}

impl Probe {
    pub(super) fn of(node: &Node) -> &Self {
        node.driver().as_any().downcast_ref().expect("all drivers here are probes")
    }

    /// Nobody may come in until [`Probe::allow`]; nobody is inside.
    pub(super) fn forbid(&self) {
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "inside a drained node");
        self.forbidden.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn allow(&self) {
        self.forbidden.fetch_sub(1, Ordering::SeqCst);
    }

    /// Is the driver told to be quiet?
    pub(super) fn is_drained(&self) -> bool {
        self.is_drained.load(Ordering::SeqCst)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.is_dirty.load(Ordering::SeqCst)
    }

    async fn enter(&self) -> Inside<'_> {
        assert_eq!(self.forbidden.load(Ordering::SeqCst), 0, "came into a drained node");
        assert!(!self.is_closed.load(Ordering::SeqCst), "came into a closed node");
        self.census.note(&self.name);
        self.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Inside(self);
        bds_io::yield_now().await;
        inside
    }

    fn file(&self) -> &Child {
        self.file.as_ref().expect("only leaves have none")
    }

    async fn write_file(&self) -> Result<()> {
        self.file().write(0, block(), WriteFlags::empty()).await
    }

    /// Writes out what it holds back.
    async fn write_out(&self) -> Result<()> {
        bds_io::yield_now().await;
        if self.is_dirty.swap(false, Ordering::SeqCst) && self.category == Category::Format {
            self.write_file().await?;
        }
        Ok(())
    }
}

struct Inside<'a>(&'a Probe);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Driver for Probe {
    fn name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        LEN
    }

    fn is_filter(&self) -> bool {
        self.category == Category::Filter
    }

    fn supports_backing(&self) -> bool {
        self.category == Category::Format
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let _inside = self.enter().await;
            if self.category == Category::Protocol {
                return Ok(());
            }
            let backing = self.backing.lock().unwrap().clone();
            if let Some(backing) = backing {
                backing.read(offset, iov.clone(), flags).await?;
                drop(backing);
                bds_io::yield_now().await;
            }
            self.file().read(offset, iov, flags).await
        })
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let _inside = self.enter().await;
            self.is_dirty.store(true, Ordering::SeqCst);
            match self.category {
                Category::Protocol => Ok(()),
                _ => self.file().write(offset, iov, flags).await,
            }
        })
    }

    fn block_status(&self, _: u64, len: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_out())
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "a child moves while somebody is inside");
        let old = std::mem::replace(&mut *self.backing.lock().unwrap(), backing.map(Arc::new));
        Ok(old.map(|old| Arc::into_inner(old).expect("no request has it in hand")))
    }

    fn prepare_reopen<'d: 'c, 'c>(
        &'d self,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'd>>> {
        Box::pin(async {
            assert_eq!(self.inside.load(Ordering::SeqCst), 0, "reopened with somebody inside");
            self.write_out().await?;
            let done: Box<dyn Reopen> = Box::new(());
            Ok(done)
        })
    }

    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        self.census.asked.fetch_add(1, Ordering::Relaxed);
        Access::of_child(role, node)
    }

    fn drain_begin(&self) {
        assert!(!self.is_drained.swap(true, Ordering::SeqCst), "drain_begin twice");
    }

    fn drain_end(&self) {
        assert!(self.is_drained.swap(false, Ordering::SeqCst), "drain_end without drain_begin");
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            assert_eq!(self.inside.load(Ordering::SeqCst), 0, "closed with somebody inside");
            if self.category == Category::Format && self.is_dirty() {
                self.write_file().await?;
            }
            bds_io::yield_now().await;
            assert!(!self.is_closed.swap(true, Ordering::SeqCst), "closed twice");
            self.census.note(&self.name);
            self.census.closed.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    }
}
