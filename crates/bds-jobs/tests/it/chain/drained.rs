//! A commit takes its images out of the chain within one drained section of the whole chain:
//! nothing is in flight in any of them then, whatever the users of the overlays do.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::{
    Attempt, BoxFuture, Category, Child, Driver, DriverType, HostMap, OpenContext, Precision,
    ReadFlags, Role, StatusFlags, StatusRun, WriteFlags, ZeroFlags,
};
use bds_core::graph::{Graph, NewImage, NodeRef};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::request::Backend;
use bds_core::{Options, Result};
use bds_io::{Buf, IoVec, Task};
use bds_jobs::{Commit, CommitOptions, JobManager};
use bds_testkit::Chance;
use serde_json::json;

use super::kit::{Chain, Layer, graph_on, names, reader, run_job, world};

const K: u64 = 1024;

/// What was seen, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// A drained section begins for a user's disk.
    Begin(usize),
    /// It ends, with this in flight in the images.
    End(usize, u64),
    /// Whether the images are in the chain.
    Chain(bool),
}

#[derive(Default)]
struct Log {
    seen: Mutex<Vec<Seen>>,
    /// Images whose requests are counted.
    images: Mutex<Vec<NodeRef>>,
}

impl Log {
    fn in_flight(&self) -> u64 {
        self.images.lock().unwrap().iter().map(|node| node.in_flight() as u64).sum()
    }

    fn push(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
    }
}

/// A filter above a user's disk that notes its drained sections.
#[derive(Clone)]
struct SpyType(usize, Arc<Log>);

struct Spy {
    file: Child,
    kind: SpyType,
}

const OPEN_OPTIONS: &[OptionSpec] =
    &[OptionSpec { name: "file", kind: OptionKind::Child, help: "the disk", default: None }];

impl DriverType for SpyType {
    fn name(&self) -> &'static str {
        "spy"
    }

    fn category(&self) -> Category {
        Category::Filter
    }

    fn help(&self) -> &'static str {
        "notes drained sections"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
            Ok(Box::new(Spy { file, kind: self.clone() }) as Box<dyn Driver>)
        })
    }
}

impl Driver for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.file.read(offset, iov, flags)
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.file.write(offset, iov, flags)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        self.file.write_zeroes(offset, len, flags)
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let map = Some(HostMap { child: self.file.name(), offset });
        Box::pin(async move { Ok(StatusRun { len, flags: StatusFlags::RAW, map }) })
    }

    fn drain_begin(&self) {
        self.kind.1.push(Seen::Begin(self.kind.0));
    }

    fn drain_end(&self) {
        let SpyType(number, log) = &self.kind;
        log.push(Seen::End(*number, log.in_flight()));
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Another overlay of an image.
async fn overlay(chain: &Chain, graph: &Graph, below: &NodeRef) -> NodeRef {
    let options = json!({"size": 70 * K, "backing_file": below.name(), "backing_fmt": "qcow2"});
    let image = NewImage {
        format: "qcow2".into(),
        path: chain.path("second"),
        options: Options::from_json(options).unwrap(),
        skip_backing: true,
    };
    graph.create_image(image).await.unwrap();
    let mut options = chain.by_path("second", "second");
    options.set("backing", below.name());
    options.set("read-only", true);
    graph.open(options).await.unwrap()
}

/// Reads at random places, three requests at once, until it is stopped.
fn read_on(disk: &Backend, seed: u64, stop: &Arc<AtomicBool>) -> Vec<Task<()>> {
    let task = |n: u64| {
        let (disk, stop) = (disk.clone(), Arc::clone(stop));
        let mut chance = Chance::new(seed * 3 + n);
        bds_io::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let at = chance.below(disk.len() / 512) * 512;
                disk.read(at, Buf::zeroed(512, 512).iov()).await.unwrap();
                bds_io::sleep(Duration::from_micros(chance.below(3))).await;
            }
        })
    };
    (0..3).map(task).collect()
}

/// Looks at the chain until the images are out of it.
async fn watch(top: Backend, log: Arc<Log>) {
    loop {
        let is_in = names(&top).get(1).is_none_or(|name| name != "base");
        log.push(Seen::Chain(is_in));
        if !is_in {
            return;
        }
        bds_io::sleep(Duration::from_micros(2)).await;
    }
}

async fn commit_under_readers(chain: &Chain, graph: &Graph, seed: u64) -> Vec<Seen> {
    let nodes = chain.open(graph).await;
    let second = overlay(chain, graph, &nodes[2]).await;
    let (log, stop) = (Arc::<Log>::default(), Arc::<AtomicBool>::default());
    let mut readers = Vec::new();
    for (number, disk) in [&nodes[3], &second].into_iter().enumerate() {
        let options = Options::new().with("file", disk.name()).with("read-only", true);
        let spy = Arc::new(SpyType(number, Arc::clone(&log)));
        let spy = graph.open_driver(spy, options).await.unwrap();
        readers.extend(read_on(&reader(&spy, "guest"), seed, &stop));
    }
    *log.images.lock().unwrap() = nodes[..3].to_vec();
    let commit = CommitOptions { top: Some(nodes[2].clone()), ..CommitOptions::new(&nodes[3]) };
    let watch = bds_io::spawn(watch(reader(&nodes[3], "watch"), Arc::clone(&log)));
    let job = Commit::prepare("c", commit).await.unwrap();
    run_job(&JobManager::new(graph), "c", job).await.unwrap();
    watch.await;
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await;
    }
    log.images.lock().unwrap().clear();
    log.seen.lock().unwrap().clone()
}

/// Nothing is in flight in the images while both disks are drained, and between the last look that
/// found the images in the chain and the first that did not, both were.
fn check(seen: &[Seen]) -> std::result::Result<(), String> {
    let (mut drained, mut sections_since) = ([false; 2], 0);
    for seen in seen {
        match *seen {
            Seen::Begin(user) => drained[user] = true,
            Seen::End(user, in_flight) => {
                if drained == [true; 2] {
                    sections_since += 1;
                    if in_flight != 0 {
                        return Err(format!("{in_flight} requests in flight"));
                    }
                }
                drained[user] = false;
            }
            Seen::Chain(true) => sections_since = 0,
            Seen::Chain(false) => {
                return match sections_since {
                    1 => Ok(()),
                    count => Err(format!("{count} sections of both disks at the end")),
                };
            }
        }
    }
    Err("the images stay".to_owned())
}

#[test]
fn a_commit_ends_within_one_drained_section_of_the_whole_chain() {
    let layers = [
        Layer::qcow2("base", 100 * K, 4096),
        Layer::qcow2("low", 90 * K, 4096),
        Layer::qcow2("mid", 80 * K, 2048),
        Layer::qcow2("top", 96 * K, 4096),
    ];
    for seed in crate::budget::seeds(8, 200) {
        let sim = world(seed);
        let chain = sim.block_on(Chain::new(&layers).make(sim.fs(), seed));
        let graph = graph_on(sim.fs());
        sim.block_on(async {
            let seen = commit_under_readers(&chain, &graph, seed).await;
            check(&seen).unwrap_or_else(|why| panic!("seed {seed}: {why}: {seen:?}"));
            graph.shutdown().await.check_leaks().unwrap();
        });
    }
}
