//! Requests that are polled once and then kept or forgotten block no other request, on files of the host.
//!
//! With clusters of 512 bytes a few requests leave more than 4,096 runs of freed clusters pending, and from then on
//! every request that frees something waits until they are released; whatever delays the release blocks all of those.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bds_core::driver::{Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::graph::gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, IoVec};
use bds_testkit::Scratch;
use futures_util::future::{Either, select};
use serde_json::json;

const NONE: WriteFlags = WriteFlags::empty();
/// More runs than may be pending.
const RUNS: u64 = 4096 + 500;

/// An image with clusters of `cluster` bytes, and two users.
struct Stage {
    graph: Graph,
    disk: NodeRef,
    one: Backend,
    other: Backend,
    cluster: u64,
    _scratch: Scratch,
}

fn iov(byte: u8, len: u64) -> IoVec {
    let len = usize::try_from(len).unwrap();
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, byte);
    iov
}

fn backend(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { name: name.into(), writable: true, ..Default::default() };
    Backend::new(node, options).unwrap()
}

impl Stage {
    async fn set(cluster: u64) -> Stage {
        let scratch = Scratch::new();
        let gate = Arc::new(TrustAll::default());
        let registry = Arc::new(bds_drivers::registry());
        let graph = Graph::new(GraphConfig { gate, ..GraphConfig::new(registry) });
        let path = scratch.path("disk");
        let options = json!({"size": cluster * 32768, "cluster_size": cluster});
        let image = NewImage {
            format: "qcow2".into(),
            path: path.clone(),
            options: Options::from_json(options).unwrap(),
            skip_backing: true,
        };
        graph.create_image(image).await.unwrap();
        let options = json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap", "cache": {"direct": true},
            "file": {"driver": "file", "filename": path},
        });
        let disk = graph.open(Options::from_json(options).unwrap()).await.unwrap();
        let (one, other) = (backend(&disk, "one"), backend(&disk, "other"));
        one.write(0, iov(1, cluster * 200), NONE).await.unwrap();
        one.flush().await.unwrap();
        Stage { graph, disk, one, other, cluster, _scratch: scratch }
    }

    /// The future of one request of each kind.
    fn begin(&self, shape: &str) -> Pin<Box<dyn Future<Output = Result<()>> + '_>> {
        let (one, c) = (&self.one, self.cluster);
        match shape {
            "inplace" => Box::pin(one.write(0, iov(7, c), NONE)),
            "new" => Box::pin(one.write(c * 2048, iov(7, c), NONE)),
            "unaligned" => Box::pin(one.write(c * 2048 + 100, iov(7, 50), NONE)),
            "unaligned_inplace" => Box::pin(one.write(100, iov(7, 50), NONE)),
            "zero" => {
                Box::pin(
                    async move { one.write_zeroes(0, c, ZeroFlags::MAY_UNMAP).await.map(drop) },
                )
            }
            "discard" => Box::pin(one.discard(0, c)),
            "flush" => Box::pin(one.flush()),
            "status" => Box::pin(async move { one.block_status(0, c * 200, true).await.map(drop) }),
            "truncate" => Box::pin(one.truncate(grown(c * 32770))),
            _ => Box::pin(one.read(0, iov(0, c))),
        }
    }

    /// Frees more runs than may be pending, then sends requests that wait for those.
    async fn others_free_and_write(&self) -> Result<()> {
        let (other, c) = (&self.other, self.cluster);
        let base = c * 4096;
        other.write(base, iov(3, c * 2 * RUNS), NONE).await?;
        for run in 0..RUNS {
            other.discard(base + run * 2 * c, c).await?;
        }
        other.write(base, iov(4, c), NONE).await?;
        self.others_go_on().await
    }

    async fn others_go_on(&self) -> Result<()> {
        let (other, c) = (&self.other, self.cluster);
        other.write(c * 3000, iov(3, c), NONE).await?;
        other.write(c * 64, iov(3, c), NONE).await?;
        other.read(c * 64, iov(0, c)).await?;
        other.write(0, iov(3, c), NONE).await?;
        other.discard(c * 128, c * 64).await?;
        other.flush().await?;
        other.write(c * 2048 + 7, iov(3, 9), NONE).await?;
        other.truncate(grown(c * 32772)).await?;
        self.graph.reopen(&self.disk, Options::parse("lazy-refcounts=off").unwrap()).await?;
        other.write(7, iov(3, 9), WriteFlags::FUA).await
    }

    async fn end(self) {
        let Stage { graph, disk, one, other, _scratch, .. } = self;
        let report = other.check(&|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
        drop((disk, one, other));
        let reports = graph.reap().await;
        assert!(reports.iter().all(bds_core::graph::CloseReport::is_clean), "{reports:?}");
        assert_eq!(graph.nodes().len(), 0, "what was forgotten holds a node");
    }
}

fn grown(len: u64) -> Truncate {
    Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false }
}

/// Panics if the work takes too long.
async fn watched<T>(what: &str, work: impl Future<Output = Result<T>>) {
    match select(pin!(work), pin!(bds_io::sleep(Duration::from_secs(300)))).await {
        Either::Left((done, _)) => drop(done.unwrap_or_else(|error| panic!("{what}: {error}"))),
        Either::Right(_) => panic!("{what}: hangs"),
    }
}

async fn poll_once<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

/// As `select!` does with a timer: polled once, and kept.
#[test]
fn a_flush_that_is_polled_once_and_kept_holds_up_no_other() {
    bds_io::block_on(async {
        let stage = Stage::set(512).await;
        stage.one.write(0, iov(1, 512), NONE).await.unwrap();
        let mut kept = stage.begin("flush");
        assert!(!poll_once(&mut kept).await, "a flush has to wait for the disk");
        watched("another's flush", stage.other.flush()).await;
        watched("others", stage.others_go_on()).await;
        watched("the kept flush", kept).await;
        stage.end().await;
    });
}

#[test]
fn requests_that_are_polled_once_and_kept_do_not_keep_freed_clusters_from_being_used() {
    for shape in ["read", "status", "inplace"] {
        bds_io::block_on(async {
            let stage = Stage::set(512).await;
            let mut kept = stage.begin(shape);
            let is_done = poll_once(&mut kept).await;
            watched(shape, stage.others_free_and_write()).await;
            match is_done {
                true => drop(kept),
                false => watched(shape, kept).await,
            }
            stage.end().await;
        });
    }
}

#[test]
fn forgotten_requests_hold_up_no_other() {
    const SHAPES: [&str; 10] = [
        "inplace",
        "new",
        "unaligned",
        "unaligned_inplace",
        "zero",
        "discard",
        "flush",
        "status",
        "truncate",
        "read",
    ];
    for cluster in [512, 65536] {
        for shape in SHAPES {
            let what = format!("{shape}, clusters of {cluster}");
            bds_io::block_on(async {
                let stage = Stage::set(cluster).await;
                let mut forgotten = stage.begin(shape);
                poll_once(&mut forgotten).await;
                std::mem::forget(forgotten);
                if cluster == 512 && matches!(shape, "read" | "status" | "inplace") {
                    watched(&what, stage.others_free_and_write()).await;
                } else {
                    watched(&what, stage.others_go_on()).await;
                }
                stage.end().await;
            });
        }
    }
}

/// The thread that made the futures does other work, and never drives its ring again.
#[test]
fn a_future_that_a_plain_thread_keeps_after_its_block_on_holds_up_no_other_thread() {
    let stage = Arc::new(bds_io::block_on(Stage::set(512)));
    let (tell, hear) = std::sync::mpsc::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let keeper = {
        let stage = Arc::clone(&stage);
        std::thread::spawn(move || {
            let (mut flush, mut read) = (stage.begin("flush"), stage.begin("read"));
            bds_io::block_on(async {
                stage.one.write(0, iov(1, 512), NONE).await.unwrap();
                poll_once(&mut flush).await;
                poll_once(&mut read).await;
            });
            tell.send(()).unwrap();
            ends.recv().unwrap();
            drop((flush, read));
        })
    };
    hear.recv().unwrap();
    bds_io::block_on(watched("another thread", stage.others_free_and_write()));
    end.send(()).unwrap();
    keeper.join().unwrap();
    bds_io::block_on(Arc::into_inner(stage).unwrap().end());
}
