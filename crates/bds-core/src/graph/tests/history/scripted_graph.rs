//! A driver that does what a test tells it to, and what the tests of this folder ask of a world.
//!
//! `part` nodes are images with up to three children (`file`, `other`, `backing`), `sieve` nodes are filters on `file`. Both
//! log what is done to them. A test may put a hook at any [`Point`] of any node: it runs inside the driver.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::IoVec;
use futures_util::FutureExt;

use super::super::fakes::{self, Fixture};
use crate::driver::{
    BoxFuture, Category, Child, Driver, DriverType, OpenContext, ReadFlags, Reopen, ReopenContext,
    Role, StatusFlags, StatusRun, WriteFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{ChangeReport, Graph, GraphConfig, NodeRef, walk};
use crate::options::{OptionKind, OptionSpec, Options};

/// Where a driver can be told what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Point {
    Open,
    Read,
    Flush,
    Close,
    Prepare,
    Inactivate,
    Activate,
    SetBacking,
    DrainBegin,
    DrainEnd,
}

type Hook = Arc<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// What the drivers of one world share.
#[derive(Default)]
pub(super) struct Script {
    log: Mutex<Vec<String>>,
    hooks: Mutex<HashMap<(String, Point), Hook>>,
}

impl Script {
    /// What happened since the last call.
    pub(super) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// How often this line stands in what [`Script::log`] would return.
    pub(super) fn times(&self, line: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|known| *known == line).count()
    }

    /// Has `act` done whenever the node comes to this point.
    pub(super) fn at<F: Future<Output = Result<()>> + Send + 'static>(
        &self,
        node: &str,
        point: Point,
        act: impl Fn() -> F + Send + Sync + 'static,
    ) {
        let hook: Hook = Arc::new(move || Box::pin(act()));
        self.hooks.lock().unwrap().insert((node.to_owned(), point), hook);
    }

    /// Has the node fail at this point.
    pub(super) fn fail_at(&self, node: &str, point: Point) {
        self.at(node, point, || async { Err(Error::new(ErrorKind::Io, "told to fail")) });
    }

    pub(super) fn forget(&self, node: &str, point: Point) {
        self.hooks.lock().unwrap().remove(&(node.to_owned(), point));
    }

    fn note(&self, line: String) {
        self.log.lock().unwrap().push(line);
    }

    async fn reach(&self, node: &str, point: Point) -> Result<()> {
        let hook = self.hooks.lock().unwrap().get(&(node.to_owned(), point)).cloned();
        match hook {
            Some(hook) => hook().await,
            None => Ok(()),
        }
    }

    /// Where a driver cannot wait.
    fn pass(&self, node: &str, point: Point) -> Result<()> {
        self.reach(node, point).now_or_never().expect("no hook waits here")
    }
}

/// A world, and the script its drivers follow.
pub(super) struct World {
    pub(super) fixture: Fixture,
    pub(super) graph: Graph,
    pub(super) script: Arc<Script>,
}

/// Runs a test under one schedule.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    run_seeded(7, test);
}

/// Runs a test under many schedules. What fails says which seed it was.
pub(super) fn run_schedules<F: Future<Output = ()>>(count: u64, test: impl Fn(World) -> F) {
    struct Say(u64);
    impl Drop for Say {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the seed of the schedule was {}", self.0);
            }
        }
    }
    for seed in 0..count {
        let _say = Say(seed);
        run_seeded(seed, &test);
    }
}

fn run_seeded<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(World) -> F) {
    let script = Arc::new(Script::default());
    let register = |config: &mut GraphConfig| {
        let registry = Arc::get_mut(&mut config.registry).unwrap();
        for (name, category) in [("part", Category::Format), ("sieve", Category::Filter)] {
            let script = Arc::clone(&script);
            registry.register(Arc::new(ScriptedType { name, category, script })).unwrap();
        }
    };
    fakes::run_seeded(seed, register, |fixture| {
        test(World { graph: fixture.graph.clone(), fixture, script: Arc::clone(&script) })
    });
}

impl World {
    /// Opens by this text.
    pub(super) async fn open(&self, text: &str) -> NodeRef {
        self.fixture.open(text).await
    }

    /// An image without children.
    pub(super) async fn part(&self, name: &str) -> NodeRef {
        self.open(&format!("driver=part,node-name={name}")).await
    }

    /// An image on these nodes: "file=a,backing=b".
    pub(super) async fn part_on(&self, name: &str, children: &str) -> NodeRef {
        self.open(&format!("driver=part,node-name={name},{children}")).await
    }

    /// A filter on the node.
    pub(super) async fn sieve(&self, name: &str, file: &str) -> NodeRef {
        self.open(&format!("driver=sieve,node-name={name},file={file}")).await
    }

    /// `names[0]` over `names[1]` over … Each held by the caller.
    pub(super) async fn chain<const N: usize>(&self, names: [&str; N]) -> [NodeRef; N] {
        let mut nodes: Vec<NodeRef> = Vec::new();
        for name in names.iter().rev() {
            let node = match nodes.last() {
                Some(below) => self.part_on(name, &format!("backing={}", below.name())).await,
                None => self.part(name).await,
            };
            nodes.push(node);
        }
        nodes.reverse();
        nodes.try_into().unwrap()
    }

    /// Everything that can be known of the graph, as text. References held while asking are not in it.
    pub(super) fn picture(&self) -> String {
        // Whoever takes the lock sees to the permissions of edges that are gone.
        drop(self.graph.0.core.lock());
        let mut picture = self.graph.dump();
        for node in self.graph.nodes() {
            let node = node.node();
            let inherits = node.inherits_from().map(|id| self.graph.acquire(id).is_ok());
            picture += &format!(
                "{}: quiesce {} inside {} flags {:?} limits {:?} active {} inherits {inherits:?}\n",
                node.name(),
                node.quiesce_count(),
                node.tracker().in_flight(),
                node.flags(),
                node.limits(),
                node.is_active(),
            );
            let mut edges: Vec<String> = node
                .parents()
                .iter()
                .map(|e| format!("  {}: {:?} closed {}\n", e.holder(), e.access(), e.is_closed()))
                .collect();
            edges.sort();
            picture.extend(edges);
        }
        picture
    }

    /// Does it once for every step that can fail, with that step failing. Each time it must fail, and leave no trace; at last it
    /// succeeds.
    pub(super) async fn fail_every_step<T, F: Future<Output = Result<T>>>(
        &self,
        act: impl Fn() -> F,
    ) -> T {
        let before = self.picture();
        for step in 0.. {
            self.graph.0.faults.set(Some(step));
            let result = act().await;
            if !self.graph.0.faults.has_struck() {
                self.graph.0.faults.set(None);
                return result.unwrap_or_else(|error| panic!("nothing was made to fail: {error}"));
            }
            let error = result.err().unwrap_or_else(|| panic!("step {step} failed in silence"));
            assert_eq!(error.kind(), ErrorKind::Io, "step {step}: {error}");
            self.graph.reap().await;
            assert_eq!(self.picture(), before, "step {step} left a trace");
        }
        unreachable!("there are finitely many steps")
    }

    /// Lets tasks go on for a while.
    pub(super) async fn idle(&self) {
        for _ in 0..50 {
            bds_io::yield_now().await;
        }
    }

    /// Everything is closed and forgotten.
    pub(super) async fn assert_empty(&self) {
        self.graph.reap().await;
        assert_eq!(self.graph.dump(), "");
        let arena = &self.graph.0.core.arena;
        assert_eq!((arena.live(), arena.dead()), (0, 0));
    }

    /// Every driver that was told of a drain was told of its end, and nothing is drained now.
    pub(super) fn assert_undrained(&self) {
        for node in self.graph.nodes() {
            assert_eq!(node.quiesce_count(), 0, "{} is still drained", node.name());
            for edge in node.node().parents() {
                assert!(!edge.is_closed(), "{} is still shut out", edge.holder());
            }
            let [begun, ended] = ["begin", "end"]
                .map(|word| self.script.times(&format!("drain {word} {}", node.name())));
            assert_eq!(begun, ended, "{}", node.name());
        }
    }
}

/// The names of the nodes from here down.
pub(super) fn names_below(node: &NodeRef) -> Vec<String> {
    walk::backing_chain(node).iter().map(|node| node.name().to_owned()).collect()
}

/// A change as one future.
pub(super) async fn commit(change: crate::graph::Change) -> Result<ChangeReport> {
    change.commit().await
}

struct ScriptedType {
    name: &'static str,
    category: Category,
    script: Arc<Script>,
}

const fn spec(name: &'static str, kind: OptionKind) -> OptionSpec {
    OptionSpec { name, kind, help: "", default: None }
}

impl DriverType for ScriptedType {
    fn name(&self) -> &'static str {
        self.name
    }

    fn category(&self) -> Category {
        self.category
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        const ALL: &[OptionSpec] = &[
            spec("file", OptionKind::Child),
            spec("other", OptionKind::Child),
            spec("backing", OptionKind::Child),
            spec("lets-go", OptionKind::Bool),
        ];
        ALL
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let is_filter = self.category == Category::Filter;
            let file_role = match is_filter {
                true => Role::FILTERED | Role::PRIMARY,
                false => Role::DATA | Role::METADATA | Role::PRIMARY,
            };
            let mut children = Vec::new();
            children.extend(context.reference("file", file_role, None).await?);
            if !is_filter {
                children.extend(context.reference("other", Role::DATA, None).await?);
            }
            let backing = match is_filter {
                true => None,
                false => context.reference("backing", Role::COW, None).await?,
            };
            let name = context.node_name.to_owned();
            self.script.reach(&name, Point::Open).await?;
            self.script.note(format!("open {name}"));
            let driver: Box<dyn Driver> = Box::new(Scripted {
                driver: self.name,
                is_filter,
                lets_go: context.options.take_bool("lets-go")?.unwrap_or(false),
                children: Mutex::new(children),
                backing: Mutex::new(backing),
                drains: AtomicU32::new(0),
                is_closed: AtomicBool::new(false),
                script: Arc::clone(&self.script),
                name,
            });
            Ok(driver)
        })
    }
}

struct Scripted {
    driver: &'static str,
    name: String,
    is_filter: bool,
    /// Gives its children up when it is closed, before the graph does.
    lets_go: bool,
    children: Mutex<Vec<Child>>,
    backing: Mutex<Option<Child>>,
    drains: AtomicU32,
    is_closed: AtomicBool,
    script: Arc<Script>,
}

impl Scripted {
    /// Its doors and where they lead now.
    fn doors(&self) -> String {
        let children = self.children.lock().unwrap();
        let backing = self.backing.lock().unwrap();
        let doors: Vec<String> =
            children.iter().chain(&*backing).map(|child| format!("{child:?}")).collect();
        doors.join(" ")
    }
}

struct Ready(Arc<Script>, String);

impl Reopen for Ready {
    fn commit(self: Box<Self>) {
        self.0.note(format!("reopened {}", self.1));
    }
}

impl Driver for Scripted {
    fn name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        512
    }

    fn is_filter(&self) -> bool {
        self.is_filter
    }

    fn supports_backing(&self) -> bool {
        !self.is_filter
    }

    fn read(&self, _offset: u64, _iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.script.reach(&self.name, Point::Read).await?;
            bds_io::yield_now().await;
            assert!(!self.is_closed.load(Ordering::Relaxed), "{} was closed", self.name);
            self.script.note(format!("read {} {}", self.name, self.doors()).trim_end().to_owned());
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
            self.script.note(format!("flush {}", self.name));
            self.script.reach(&self.name, Point::Flush).await
        })
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        self.script.pass(&self.name, Point::SetBacking)?;
        Ok(std::mem::replace(&mut *self.backing.lock().unwrap(), backing))
    }

    fn drain_begin(&self) {
        assert_eq!(self.drains.fetch_add(1, Ordering::SeqCst), 0, "{}: twice", self.name);
        self.script.note(format!("drain begin {}", self.name));
        let _ = self.script.pass(&self.name, Point::DrainBegin);
    }

    fn drain_end(&self) {
        assert_eq!(self.drains.fetch_sub(1, Ordering::SeqCst), 1, "{}: not begun", self.name);
        self.script.note(format!("drain end {}", self.name));
        let _ = self.script.pass(&self.name, Point::DrainEnd);
    }

    fn prepare_reopen<'d: 'c, 'c>(
        &'d self,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'd>>> {
        Box::pin(async {
            self.script.reach(&self.name, Point::Prepare).await?;
            let ready = Ready(Arc::clone(&self.script), self.name.clone());
            Ok(Box::new(ready) as Box<dyn Reopen>)
        })
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.script.reach(&self.name, Point::Inactivate).await?;
            self.script.note(format!("inactivate {}", self.name));
            Ok(())
        })
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.script.reach(&self.name, Point::Activate).await?;
            self.script.note(format!("activate {}", self.name));
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            bds_io::yield_now().await;
            assert!(!self.is_closed.swap(true, Ordering::Relaxed), "{}: closed twice", self.name);
            self.script.note(format!("close {}", self.name));
            let result = self.script.reach(&self.name, Point::Close).await;
            if self.lets_go {
                self.children.lock().unwrap().clear();
                *self.backing.lock().unwrap() = None;
            }
            result
        })
    }
}

/// Options by text.
pub(super) fn options(text: &str) -> Options {
    Options::parse(text).unwrap()
}
