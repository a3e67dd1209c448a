//! Scripted fake drivers: a test may place a hook at any [`Point`] of any node, and it runs inside
//! the driver.
//!
//! `part` nodes are images with up to three children (`file`, `other`, `backing`), `sieve` nodes
//! are filters on `file`. Both log what the graph does to them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};

use bds_io::IoVec;
use futures_util::FutureExt;

use super::driver::{Behaviour, Children, FakeDriver, FakeType, file_role};
use super::{lock, option};
use crate::driver::{
    BoxFuture, Category, OpenContext, ReadFlags, Registry, Reopen, ReopenContext, Role,
};
use crate::error::{Error, ErrorKind, Result};
use crate::options::{OptionKind, OptionSpec};

/// A place in the driver where a hook can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Point {
    Open,
    Read,
    Flush,
    Close,
    Prepare,
    Inactivate,
    Activate,
    SetBacking,
}

type Hook = Arc<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// Log and hooks of the scripted drivers of one graph.
#[derive(Default)]
pub(crate) struct Script {
    log: Mutex<Vec<String>>,
    hooks: Mutex<HashMap<(String, Point), Hook>>,
}

impl Script {
    /// Registers both drivers.
    pub(crate) fn register(self: &Arc<Self>, registry: &mut Registry) {
        for (name, category) in [("part", Category::Format), ("sieve", Category::Filter)] {
            let shared = Arc::clone(self);
            registry.register(Arc::new(FakeType { name, category, shared })).unwrap();
        }
    }

    /// Takes the lines since the last call.
    pub(crate) fn log(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.log))
    }

    /// Counts a line in what [`Script::log`] would return.
    pub(crate) fn times(&self, line: &str) -> usize {
        lock(&self.log).iter().filter(|known| *known == line).count()
    }

    /// Runs `act` whenever the node comes to this point.
    pub(crate) fn at<F: Future<Output = Result<()>> + Send + 'static>(
        &self,
        node: &str,
        point: Point,
        act: impl Fn() -> F + Send + Sync + 'static,
    ) {
        let hook: Hook = Arc::new(move || Box::pin(act()));
        lock(&self.hooks).insert((node.to_owned(), point), hook);
    }

    /// Makes the node fail at this point.
    pub(crate) fn fail_at(&self, node: &str, point: Point) {
        self.at(node, point, || async { Err(Error::new(ErrorKind::Io, "injected failure")) });
    }

    /// Removes the hook.
    pub(crate) fn clear(&self, node: &str, point: Point) {
        lock(&self.hooks).remove(&(node.to_owned(), point));
    }

    fn note(&self, line: String) {
        lock(&self.log).push(line);
    }

    async fn reach(&self, node: &str, point: Point) -> Result<()> {
        let hook = lock(&self.hooks).get(&(node.to_owned(), point)).cloned();
        match hook {
            Some(hook) => hook().await,
            None => Ok(()),
        }
    }
}

/// A prepared reopen; logs that it took effect.
struct Ready(Arc<Script>, String);

impl Reopen for Ready {
    fn commit(self: Box<Self>) {
        self.0.note(format!("reopened {}", self.1));
    }
}

/// State of one scripted node.
pub(crate) struct ScriptedNode {
    /// Gives up its child handles when it is closed, before the graph does.
    clears_children: bool,
}

impl Behaviour for Script {
    type Node = ScriptedNode;

    fn open_options(_category: Category) -> &'static [OptionSpec] {
        const ALL: &[OptionSpec] = &[
            option("file", OptionKind::Child),
            option("other", OptionKind::Child),
            option("backing", OptionKind::Child),
            option("clear-children", OptionKind::Bool),
        ];
        ALL
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
        category: Category,
    ) -> BoxFuture<'a, Result<(Children, ScriptedNode)>> {
        Box::pin(async move {
            let children = Children::default();
            let file = context.reference("file", file_role(category), None).await?;
            file.into_iter().for_each(|child| children.push(child));
            if category == Category::Format {
                let other = context.reference("other", Role::DATA, None).await?;
                other.into_iter().for_each(|child| children.push(child));
            }
            let children = children.open_backing(context, category).await?;
            self.reach(context.node_name, Point::Open).await?;
            self.note(format!("open {}", context.node_name));
            let clears_children = context.options.take_bool("clear-children")?.unwrap_or(false);
            Ok((children, ScriptedNode { clears_children }))
        })
    }

    fn read(
        driver: &FakeDriver<Self>,
        _offset: u64,
        _iov: IoVec,
        _flags: ReadFlags,
    ) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.reach(&driver.name, Point::Read).await?;
            bds_io::yield_now().await;
            let mut line = format!("read {}", driver.name);
            // The child handles and the nodes they lead to now.
            for child in driver.children.list().iter().chain(&driver.children.backing()) {
                line += &format!(" {child:?}");
            }
            driver.shared.note(line);
            Ok(())
        })
    }

    fn flush_to_os(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.note(format!("flush {}", driver.name));
            driver.shared.reach(&driver.name, Point::Flush).await
        })
    }

    fn check_set_backing(driver: &FakeDriver<Self>) -> Result<()> {
        let hook = driver.shared.reach(&driver.name, Point::SetBacking);
        hook.now_or_never().expect("no hook waits here")
    }

    fn drain_begin(driver: &FakeDriver<Self>) {
        driver.shared.note(format!("drain begin {}", driver.name));
    }

    fn drain_end(driver: &FakeDriver<Self>) {
        driver.shared.note(format!("drain end {}", driver.name));
    }

    fn prepare_reopen<'n: 'c, 'c>(
        driver: &'n FakeDriver<Self>,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>> {
        Box::pin(async {
            driver.shared.reach(&driver.name, Point::Prepare).await?;
            let ready = Ready(Arc::clone(&driver.shared), driver.name.clone());
            Ok(Box::new(ready) as Box<dyn Reopen>)
        })
    }

    fn set_active(driver: &FakeDriver<Self>, is_active: bool) -> BoxFuture<'_, Result<()>> {
        let (point, word) = match is_active {
            true => (Point::Activate, "activate"),
            false => (Point::Inactivate, "inactivate"),
        };
        Box::pin(async move {
            driver.shared.reach(&driver.name, point).await?;
            driver.shared.note(format!("{word} {}", driver.name));
            Ok(())
        })
    }

    fn after_close(driver: &FakeDriver<Self>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            driver.shared.note(format!("close {}", driver.name));
            let result = driver.shared.reach(&driver.name, Point::Close).await;
            if driver.node.clears_children {
                driver.children.clear();
            }
            result
        })
    }
}
