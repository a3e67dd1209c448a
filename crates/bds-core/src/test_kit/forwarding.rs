//! Forwarding fake drivers: `leaf` at the bottom, `image` with a file and perhaps a backing node,
//! `filter`.
//!
//! They send requests on through their children over the real request path, yielding in between. A
//! test forbids entry to a node while it relies on a drained section.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bds_io::{Buf, IoVec};

use super::driver::{Behaviour, Children, FakeDriver, FakeType};
use super::option;
use crate::driver::{
    Access, BoxFuture, Category, Child, NodeUse, OpenContext, ReadFlags, Registry, Reopen,
    ReopenContext, Role, WriteFlags,
};
use crate::error::Result;
use crate::graph::Node;
use crate::options::{OptionKind, OptionSpec};

/// Length of every node.
const LEN: usize = 512;

/// One node's length of zeros.
pub(crate) fn block() -> IoVec {
    Buf::zeroed(LEN, 1).iov()
}

/// Counts of the forwarding drivers of one graph, and a hash of what happened to them.
#[derive(Default)]
pub(crate) struct Forwarding {
    pub(crate) opens: AtomicUsize,
    pub(crate) closes: AtomicUsize,
    /// Calls of `child_access`.
    pub(crate) access_queries: AtomicUsize,
    history: AtomicU64,
}

impl Forwarding {
    /// Registers the three drivers.
    pub(crate) fn register(registry: &mut Registry) -> Arc<Self> {
        let drivers = Arc::new(Self::default());
        for (name, category) in [
            ("leaf", Category::Protocol),
            ("image", Category::Format),
            ("filter", Category::Filter),
        ] {
            let shared = Arc::clone(&drivers);
            registry.register(Arc::new(FakeType { name, category, shared })).unwrap();
        }
        drivers
    }

    /// Adds an event to the hash (FNV-1a).
    fn note(&self, what: &str) {
        let before = self.history.load(Ordering::Relaxed);
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
        self.history.store(what.bytes().fold(before, mix), Ordering::Relaxed);
    }

    /// The hash: equal for equal histories.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.history.load(Ordering::Relaxed)
    }
}

/// State of one forwarding node.
#[derive(Default)]
pub(crate) struct ForwardingNode {
    /// Drained sections during which the test asserts that the node is empty.
    forbidden: AtomicUsize,
    is_dirty: AtomicBool,
}

/// A forwarding driver.
pub(crate) type Forwarder = FakeDriver<Forwarding>;

impl Forwarder {
    /// The driver of a node.
    pub(crate) fn of_node(node: &Node) -> &Self {
        Self::of(node.driver())
    }

    /// Asserts that no request is inside, and until [`Forwarder::allow`] that none enters.
    pub(crate) fn forbid(&self) {
        assert_eq!(self.inside(), 0, "inside a drained node");
        self.node.forbidden.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn allow(&self) {
        self.node.forbidden.fetch_sub(1, Ordering::SeqCst);
    }

    async fn check_entry(&self) {
        assert_eq!(self.node.forbidden.load(Ordering::SeqCst), 0, "entered a drained node");
        self.shared.note(&self.name);
        bds_io::yield_now().await;
    }

    fn file(&self) -> Arc<Child> {
        self.children.list().into_iter().next().expect("only leaves have none")
    }

    /// Writes back what is cached.
    async fn write_back(&self) -> Result<()> {
        if self.node.is_dirty.swap(false, Ordering::SeqCst) && self.category == Category::Format {
            self.file().write(0, block(), WriteFlags::empty()).await?;
        }
        Ok(())
    }
}

impl Behaviour for Forwarding {
    type Node = ForwardingNode;

    fn open_options(category: Category) -> &'static [OptionSpec] {
        const IMAGE: &[OptionSpec] =
            &[option("file", OptionKind::Child), option("backing", OptionKind::Child)];
        match category {
            Category::Protocol => &[],
            Category::Filter => &IMAGE[..1],
            Category::Format => IMAGE,
        }
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
        category: Category,
    ) -> BoxFuture<'a, Result<(Children, ForwardingNode)>> {
        Box::pin(async move {
            let mut children = Children::open(context, category).await?;
            if category == Category::Format {
                let file = children.list().remove(0);
                file.read(0, block(), ReadFlags::empty()).await?; // the header
                drop(file);
                children = children.open_backing(context, category).await?;
            }
            self.opens.fetch_add(1, Ordering::Relaxed);
            Ok((children, ForwardingNode::default()))
        })
    }

    fn read(
        driver: &FakeDriver<Self>,
        offset: u64,
        iov: IoVec,
        flags: ReadFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            driver.check_entry().await;
            if driver.category == Category::Protocol {
                return Ok(());
            }
            if let Some(backing) = driver.children.backing() {
                backing.read(offset, iov.clone(), flags).await?;
                drop(backing);
                bds_io::yield_now().await;
            }
            driver.file().read(offset, iov, flags).await
        })
    }

    fn write(
        driver: &FakeDriver<Self>,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            driver.check_entry().await;
            driver.node.is_dirty.store(true, Ordering::SeqCst);
            match driver.category {
                Category::Protocol => Ok(()),
                _ => driver.file().write(offset, iov, flags).await,
            }
        })
    }

    fn flush_to_os(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            driver.write_back().await
        })
    }

    fn child_access(driver: &FakeDriver<Self>, role: Role, node: &NodeUse) -> Access {
        driver.shared.access_queries.fetch_add(1, Ordering::Relaxed);
        Access::of_child(role, node)
    }

    fn prepare_reopen<'n: 'c, 'c>(
        driver: &'n FakeDriver<Self>,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        Box::pin(async {
            bds_io::yield_now().await;
            driver.write_back().await?;
            let ready: Box<dyn Reopen> = Box::new(());
            Ok(ready)
        })
    }

    fn before_close(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            assert_eq!(driver.inside(), 0, "{}: closed under a request", driver.name);
            if driver.category == Category::Format && driver.node.is_dirty.load(Ordering::SeqCst) {
                driver.file().write(0, block(), WriteFlags::empty()).await?;
            }
            bds_io::yield_now().await;
            Ok(())
        })
    }

    fn after_close(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.note(&driver.name);
            driver.shared.closes.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    }
}
