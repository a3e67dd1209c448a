//! A fake driver that asserts the driver contract; its behaviour is a type parameter.
//!
//! Asserted for every behaviour: no request after close, no close under a request that returns, one
//! close, no child exchanged under a request or outside a drained section, `drain_begin` and
//! `drain_end` alternate, so do `inactivate` and `activate`.

use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::IoVec;

use super::lock;
use crate::driver::{
    Access, BoxFuture, Category, Child, Driver, DriverType, Limits, NodeUse, OpenContext,
    Precision, ReadFlags, Reopen, ReopenContext, Role, StatusFlags, StatusRun, WriteFlags,
};
use crate::error::Result;
use crate::options::OptionSpec;

/// What a set of fake drivers does beyond the contract. The value is shared by all nodes of a
/// graph.
pub(crate) trait Behaviour: Send + Sync + Sized + 'static {
    /// State of one node.
    type Node: Send + Sync;

    /// Options of the drivers, children included.
    fn open_options(category: Category) -> &'static [OptionSpec];

    /// Opens the children and makes the node's state.
    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
        category: Category,
    ) -> BoxFuture<'a, Result<(Children, Self::Node)>>;

    /// Length of the node.
    fn len(_driver: &FakeDriver<Self>) -> u64 {
        512
    }

    /// Limits of the node.
    fn limits(_driver: &FakeDriver<Self>) -> Limits {
        Limits::default()
    }

    /// File of a protocol node.
    fn file(_driver: &FakeDriver<Self>) -> Option<(PathBuf, (u64, u64))> {
        None
    }

    /// A read, counted as inside.
    fn read(
        driver: &FakeDriver<Self>,
        offset: u64,
        iov: IoVec,
        flags: ReadFlags,
    ) -> BoxFuture<'_, Result<()>>;

    /// A write, counted as inside.
    fn write(
        _driver: &FakeDriver<Self>,
        _offset: u64,
        _iov: IoVec,
        _flags: WriteFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Writes back what is cached.
    fn flush_to_os(_driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// May refuse that the backing child is exchanged.
    fn check_set_backing(_driver: &FakeDriver<Self>) -> Result<()> {
        Ok(())
    }

    /// The driver's use of a child.
    fn child_access(driver: &FakeDriver<Self>, role: Role, node: &NodeUse) -> Access {
        let _ = driver;
        Access::of_child(role, node)
    }

    /// A drained section has begun.
    fn drain_begin(_driver: &FakeDriver<Self>) {}

    /// The last drained section has ended.
    fn drain_end(_driver: &FakeDriver<Self>) {}

    /// Prepares a reopen.
    fn prepare_reopen<'n: 'c, 'c>(
        _driver: &'n FakeDriver<Self>,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        Box::pin(async {
            let ready: Box<dyn Reopen> = Box::new(());
            Ok(ready)
        })
    }

    /// The driver is about to be marked inactive (`false`) or active.
    fn set_active(_driver: &FakeDriver<Self>, _is_active: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// The driver is about to be marked closed. Its requests may still go down.
    fn before_close(_driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            Ok(())
        })
    }

    /// The driver has been marked closed; the answer is the one of `close`.
    fn after_close(_driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// The driver is being dropped.
    fn dropped(_driver: &FakeDriver<Self>) {}
}

/// Children of a fake driver. Requests clone the `Arc`, so that an exchange under a request is
/// seen.
#[derive(Default)]
pub(crate) struct Children {
    pub(crate) list: Mutex<Vec<Arc<Child>>>,
    pub(crate) backing: Mutex<Option<Arc<Child>>>,
}

impl Children {
    /// Opens the child "file" in the role that a driver of this category gives it; protocols have
    /// none.
    pub(crate) async fn open(context: &mut OpenContext<'_>, category: Category) -> Result<Self> {
        let children = Self::default();
        if category != Category::Protocol {
            children.push(context.child("file", file_role(category)).await?);
        }
        Ok(children)
    }

    /// Opens the child "backing" of a format, if the options name one.
    pub(crate) async fn open_backing(
        self,
        context: &mut OpenContext<'_>,
        category: Category,
    ) -> Result<Self> {
        match category {
            Category::Format => {
                let backing = context.reference("backing", Role::COW, None).await?;
                Ok(self.with_backing(backing))
            }
            Category::Protocol | Category::Filter => Ok(self),
        }
    }

    pub(crate) fn with_backing(mut self, backing: Option<Child>) -> Self {
        self.backing = Mutex::new(backing.map(Arc::new));
        self
    }

    pub(crate) fn push(&self, child: Child) {
        lock(&self.list).push(Arc::new(child));
    }

    pub(crate) fn list(&self) -> Vec<Arc<Child>> {
        lock(&self.list).clone()
    }

    pub(crate) fn backing(&self) -> Option<Arc<Child>> {
        lock(&self.backing).clone()
    }

    /// Gives up all child handles.
    pub(crate) fn clear(&self) {
        lock(&self.list).clear();
        *lock(&self.backing) = None;
    }
}

/// The role of the child "file".
pub(crate) fn file_role(category: Category) -> Role {
    match category {
        Category::Filter => Role::FILTERED | Role::PRIMARY,
        Category::Protocol | Category::Format => Role::DATA | Role::METADATA | Role::PRIMARY,
    }
}

/// Registers fake drivers under a name.
pub(crate) struct FakeType<B> {
    pub(crate) name: &'static str,
    pub(crate) category: Category,
    pub(crate) shared: Arc<B>,
}

impl<B: Behaviour> DriverType for FakeType<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        B::open_options(self.category)
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(FakeDriver::open(self.name, self.category, &self.shared, context))
    }
}

/// The fake driver. See the module.
pub(crate) struct FakeDriver<B: Behaviour> {
    pub(crate) driver: &'static str,
    pub(crate) category: Category,
    pub(crate) name: String,
    pub(crate) children: Children,
    pub(crate) shared: Arc<B>,
    pub(crate) node: B::Node,
    inside: AtomicUsize,
    is_closed: AtomicBool,
    is_drained: AtomicBool,
    is_active: AtomicBool,
}

impl<B: Behaviour> FakeDriver<B> {
    pub(crate) async fn open(
        driver: &'static str,
        category: Category,
        shared: &Arc<B>,
        context: &mut OpenContext<'_>,
    ) -> Result<Box<dyn Driver>> {
        let name = context.node_name.to_owned();
        let (children, node) = shared.open(context, category).await?;
        Ok(Box::new(Self {
            driver,
            category,
            name,
            children,
            shared: Arc::clone(shared),
            node,
            inside: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            is_drained: AtomicBool::new(false),
            is_active: AtomicBool::new(true),
        }))
    }

    /// The fake behind a driver.
    pub(crate) fn of(driver: &dyn Driver) -> &Self {
        driver.as_any().downcast_ref().expect("all drivers here are fakes of this kind")
    }

    /// Requests in the driver.
    pub(crate) fn inside(&self) -> usize {
        self.inside.load(Ordering::SeqCst)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.is_drained.load(Ordering::SeqCst)
    }

    fn enter(&self) -> Inside<'_> {
        assert!(!self.is_closed(), "P11: {}: request after close", self.name);
        self.inside.fetch_add(1, Ordering::SeqCst);
        Inside(&self.inside)
    }

    /// Runs a request; its future is not polled before it has been counted.
    async fn request(&self, operation: BoxFuture<'_, Result<()>>) -> Result<()> {
        let inside = self.enter();
        operation.await?;
        assert!(!self.is_closed(), "P11: {}: closed under a request", self.name);
        drop(inside);
        Ok(())
    }

    fn mark_active(&self, is_active: bool) {
        let was_active = self.is_active.swap(is_active, Ordering::SeqCst);
        assert_ne!(was_active, is_active, "{}: activate and inactivate alternate", self.name);
    }
}

impl<B: Behaviour> Drop for FakeDriver<B> {
    fn drop(&mut self) {
        B::dropped(self);
    }
}

struct Inside<'a>(&'a AtomicUsize);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<B: Behaviour> Driver for FakeDriver<B> {
    fn name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        B::len(self)
    }

    fn limits(&self) -> Limits {
        B::limits(self)
    }

    fn is_filter(&self) -> bool {
        self.category == Category::Filter
    }

    fn supports_backing(&self) -> bool {
        self.category == Category::Format
    }

    fn filename(&self) -> Option<PathBuf> {
        B::file(self).map(|(path, _)| path)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        B::file(self).map(|(_, identity)| identity)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.request(B::read(self, offset, iov, flags)))
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.request(B::write(self, offset, iov, flags)))
    }

    fn block_status(&self, _: u64, len: u64, _: Precision) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::DATA, map: None }) })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        B::flush_to_os(self)
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        B::check_set_backing(self)?;
        assert_eq!(self.inside(), 0, "P34: {}: child exchanged under a request", self.name);
        assert!(self.is_drained(), "{}: child exchanged while not drained", self.name);
        let old = std::mem::replace(&mut *lock(&self.children.backing), backing.map(Arc::new));
        Ok(old.map(|old| Arc::into_inner(old).expect("no request uses the old child")))
    }

    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        B::child_access(self, role, node)
    }

    fn drain_begin(&self) {
        let was_drained = self.is_drained.swap(true, Ordering::SeqCst);
        assert!(!was_drained, "P36: {}: drain_begin twice", self.name);
        B::drain_begin(self);
    }

    fn drain_end(&self) {
        let was_drained = self.is_drained.swap(false, Ordering::SeqCst);
        assert!(was_drained, "P36: {}: drain_end without drain_begin", self.name);
        B::drain_end(self);
    }

    fn prepare_reopen<'n: 'c, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        Box::pin(async move {
            assert_eq!(self.inside(), 0, "P34: {}: reopened under a request", self.name);
            B::prepare_reopen(self, context).await
        })
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            B::set_active(self, false).await?;
            self.mark_active(false);
            Ok(())
        })
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            B::set_active(self, true).await?;
            self.mark_active(true);
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            B::before_close(self).await?;
            let was_closed = self.is_closed.swap(true, Ordering::SeqCst);
            assert!(!was_closed, "P11: {}: closed twice", self.name);
            B::after_close(self).await
        })
    }
}
