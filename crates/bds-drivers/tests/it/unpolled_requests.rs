//! Requests that are polled once and then kept or forgotten block no other request, on files of the
//! host.
//!
//! With clusters of 512 bytes a few requests leave more than 4,096 runs of freed clusters pending,
//! and from then on every request that frees something waits until they are released; whatever
//! delays the release blocks all of those.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bds_core::driver::{Precision, WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, NewImage, NodeRef};
use bds_core::request::Backend;
use bds_core::{Options, Result};
use bds_io::Fs;
use bds_testkit::Scratch;
use serde_json::json;

use crate::kit::{filled, poll_once, resize_to, trusting_graph, within, writer};

const NONE: WriteFlags = WriteFlags::empty();
/// More runs than may be pending.
const RUNS: u64 = 4096 + 500;

/// An image with clusters of `cluster` bytes, and two users.
struct Setup {
    graph: Graph,
    disk: NodeRef,
    one: Backend,
    other: Backend,
    cluster: u64,
    _scratch: Scratch,
}

impl Setup {
    async fn open(cluster: u64) -> Setup {
        let scratch = Scratch::new();
        let graph = trusting_graph(Fs::Host);
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
        let (one, other) = (writer(&disk, "one"), writer(&disk, "other"));
        one.write(0, filled(1, cluster * 200), NONE).await.unwrap();
        one.flush().await.unwrap();
        Setup { graph, disk, one, other, cluster, _scratch: scratch }
    }

    /// The future of one request of each kind.
    fn begin(&self, shape: &str) -> Pin<Box<dyn Future<Output = Result<()>> + '_>> {
        let (one, c) = (&self.one, self.cluster);
        match shape {
            "inplace" => Box::pin(one.write(0, filled(7, c), NONE)),
            "new" => Box::pin(one.write(c * 2048, filled(7, c), NONE)),
            "unaligned" => Box::pin(one.write(c * 2048 + 100, filled(7, 50), NONE)),
            "unaligned_inplace" => Box::pin(one.write(100, filled(7, 50), NONE)),
            "zero" => {
                Box::pin(
                    async move { one.write_zeroes(0, c, ZeroFlags::MAY_UNMAP).await.map(drop) },
                )
            }
            "discard" => Box::pin(one.discard(0, c)),
            "flush" => Box::pin(one.flush()),
            "status" => {
                Box::pin(
                    async move { one.block_status(0, c * 200, Precision::Exact).await.map(drop) },
                )
            }
            "truncate" => Box::pin(one.truncate(resize_to(c * 32770))),
            _ => Box::pin(one.read(0, filled(0, c))),
        }
    }

    /// Frees more runs than may be pending, then sends requests that wait for those.
    async fn free_and_write_by_other(&self) -> Result<()> {
        let (other, c) = (&self.other, self.cluster);
        let base = c * 4096;
        other.write(base, filled(3, c * 2 * RUNS), NONE).await?;
        for run in 0..RUNS {
            other.discard(base + run * 2 * c, c).await?;
        }
        other.write(base, filled(4, c), NONE).await?;
        self.run_other_requests().await
    }

    async fn run_other_requests(&self) -> Result<()> {
        let (other, c) = (&self.other, self.cluster);
        other.write(c * 3000, filled(3, c), NONE).await?;
        other.write(c * 64, filled(3, c), NONE).await?;
        other.read(c * 64, filled(0, c)).await?;
        other.write(0, filled(3, c), NONE).await?;
        other.discard(c * 128, c * 64).await?;
        other.flush().await?;
        other.write(c * 2048 + 7, filled(3, 9), NONE).await?;
        other.truncate(resize_to(c * 32772)).await?;
        self.graph.reopen(&self.disk, Options::parse("lazy-refcounts=off").unwrap()).await?;
        other.write(7, filled(3, 9), WriteFlags::FUA).await
    }

    async fn end(self) {
        let Setup { graph, disk, one, other, _scratch, .. } = self;
        let report = other.check(&|_, _| {}).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
        drop((disk, one, other));
        let reports = graph.reap().await;
        assert!(reports.iter().all(bds_core::graph::CloseReport::is_clean), "{reports:?}");
        assert_eq!(graph.nodes().len(), 0, "a forgotten future holds a node");
    }
}

/// Panics if the work fails or takes too long.
async fn watched<T>(what: &str, work: impl Future<Output = Result<T>>) {
    let done = within(Duration::from_secs(300), what, work).await;
    drop(done.unwrap_or_else(|error| panic!("{what}: {error}")));
}

/// As `select!` does with a timer: polled once, and kept.
#[test]
fn an_unpolled_flush_blocks_no_other_request() {
    bds_io::block_on(async {
        let setup = Setup::open(512).await;
        setup.one.write(0, filled(1, 512), NONE).await.unwrap();
        let mut kept = setup.begin("flush");
        assert!(!poll_once(&mut kept).await, "a flush has to wait for the disk");
        watched("another's flush", setup.other.flush()).await;
        watched("others", setup.run_other_requests()).await;
        watched("the kept flush", kept).await;
        setup.end().await;
    });
}

#[test]
fn unpolled_requests_do_not_block_reuse_of_freed_clusters() {
    for shape in ["read", "status", "inplace"] {
        bds_io::block_on(async {
            let setup = Setup::open(512).await;
            let mut kept = setup.begin(shape);
            let is_done = poll_once(&mut kept).await;
            watched(shape, setup.free_and_write_by_other()).await;
            match is_done {
                true => drop(kept),
                false => watched(shape, kept).await,
            }
            setup.end().await;
        });
    }
}

#[test]
fn forgotten_requests_block_no_other_request() {
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
                let setup = Setup::open(cluster).await;
                let mut forgotten = setup.begin(shape);
                poll_once(&mut forgotten).await;
                std::mem::forget(forgotten);
                if cluster == 512 && matches!(shape, "read" | "status" | "inplace") {
                    watched(&what, setup.free_and_write_by_other()).await;
                } else {
                    watched(&what, setup.run_other_requests()).await;
                }
                setup.end().await;
            });
        }
    }
}

/// The thread that made the futures does other work, and never drives its ring again.
#[test]
fn an_unpolled_future_of_a_plain_thread_blocks_no_other_thread() {
    let setup = Arc::new(bds_io::block_on(Setup::open(512)));
    let (tell, hear) = std::sync::mpsc::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let keeper = {
        let setup = Arc::clone(&setup);
        std::thread::spawn(move || {
            let (mut flush, mut read) = (setup.begin("flush"), setup.begin("read"));
            bds_io::block_on(async {
                setup.one.write(0, filled(1, 512), NONE).await.unwrap();
                poll_once(&mut flush).await;
                poll_once(&mut read).await;
            });
            tell.send(()).unwrap();
            ends.recv().unwrap();
            drop((flush, read));
        })
    };
    hear.recv().unwrap();
    bds_io::block_on(watched("another thread", setup.free_and_write_by_other()));
    end.send(()).unwrap();
    keeper.join().unwrap();
    bds_io::block_on(Arc::into_inner(setup).unwrap().end());
}
