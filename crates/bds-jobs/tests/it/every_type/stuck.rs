//! Targets and images whose requests do not end (scenario 12, F4): a cancel concludes within its
//! timeout, other disks notice nothing, and requests that end later do no harm. Time is virtual.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bds_core::graph::{NewImage, NodeRef, walk};
use bds_core::request::Backend;
use bds_core::{ErrorKind, Options};
use bds_io::{Buf, Sim, SimConfig};
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions};
use bds_jobs::{
    Commit, CommitOptions, CopyMode, JobDriver, JobManager, JobOptions, Stream, StreamOptions,
};

use futures_util::future::{Either, select};

use crate::controlled::{Control, ControlledType};

use super::rig::{KINDS, Kind, backend, graph_on};

const LEN: u64 = 256 << 10;
const BLOCK: u64 = 4096;
const TIMEOUT: Duration = Duration::from_secs(2);

/// Writes whole clusters, one after the other, so that nothing is read from below.
struct Writer {
    disk: Backend,
    done: AtomicU64,
    /// Longest time of a write in microseconds.
    longest_us: AtomicU64,
    stop: AtomicU64,
}

impl Writer {
    fn start(node: &NodeRef, name: &str) -> Arc<Self> {
        let disk = backend(node, name, true).unwrap();
        let (done, longest_us, stop) = Default::default();
        let writer = Arc::new(Self { disk, done, longest_us, stop });
        bds_io::spawn(Arc::clone(&writer).run()).detach();
        writer
    }

    async fn run(self: Arc<Self>) {
        for number in 0.. {
            if self.stop.load(Ordering::SeqCst) != 0 {
                return;
            }
            let began = bds_io::now();
            let buf = Buf::from_slice(&vec![byte_of(number); BLOCK as usize]);
            let offset = number % (LEN / BLOCK) * BLOCK;
            self.disk.write(offset, buf.iov(), Default::default()).await.unwrap();
            let took = (bds_io::now() - began).as_micros() as u64;
            self.longest_us.fetch_max(took, Ordering::SeqCst);
            self.done.fetch_add(1, Ordering::SeqCst);
            bds_io::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it and checks the last write of each block that it got to.
    async fn check(&self) {
        self.stop.store(1, Ordering::SeqCst);
        bds_io::sleep(Duration::from_millis(50)).await;
        let done = self.done.load(Ordering::SeqCst);
        for number in done.saturating_sub(LEN / BLOCK)..done {
            let buf = Buf::zeroed(BLOCK as usize, 512);
            self.disk.read(number % (LEN / BLOCK) * BLOCK, buf.iov()).await.unwrap();
            assert_eq!(buf.iov().to_vec(0..1), [byte_of(number)], "write {number}");
        }
    }
}

fn byte_of(number: u64) -> u8 {
    (number / (LEN / BLOCK) * 7 + number) as u8 | 1
}

async fn mem(jobs: &JobManager, name: &str) -> NodeRef {
    let text = format!("driver=mem,node-name={name},size={LEN},discard=unmap");
    jobs.graph().open(Options::parse(&text).unwrap()).await.unwrap()
}

async fn overlay(jobs: &JobManager, name: &str, below: &NodeRef) -> NodeRef {
    let options = Options::new()
        .with("size", LEN)
        .with("cluster_size", BLOCK)
        .with("backing_file", below.name())
        .with("backing_fmt", "raw");
    let path = name.into();
    let image = NewImage { format: "qcow2".into(), path, options, skip_backing: true };
    jobs.graph().create_image(image).await.unwrap();
    let text = format!(
        "driver=qcow2,node-name={name},file.driver=file,file.filename={name},backing={}",
        below.name()
    );
    let node = jobs.graph().open(Options::parse(&text).unwrap()).await.unwrap();
    let fill = backend(&node, "fill", true).unwrap();
    let buf = Buf::from_slice(&[3; 64 << 10]);
    fill.write(64 << 10, buf.iov(), Default::default()).await.unwrap();
    node
}

/// The disk: on the image that hangs, or beside it.
async fn disk(jobs: &JobManager, kind: Kind, hangs: &NodeRef) -> NodeRef {
    if !matches!(kind, Kind::ActiveCommit | Kind::Commit | Kind::Stream) {
        return mem(jobs, "disk").await;
    }
    let mid = overlay(jobs, "mid", hangs).await;
    overlay(jobs, "top", &mid).await
}

/// The job, which writes to (stream: reads from) the image that hangs.
async fn prepare(kind: Kind, device: &NodeRef, hangs: &NodeRef) -> Box<dyn JobDriver> {
    match kind {
        Kind::Backup | Kind::BackupStaged => {
            let mut options = BackupOptions::new(device, hangs, "j");
            options.staging_len = if kind == Kind::Backup { 0 } else { 1 << 20 };
            Box::new(Backup::prepare(options).await.unwrap())
        }
        Kind::Mirror | Kind::MirrorSynced => {
            let mut options = MirrorOptions::new(device, hangs, "j");
            if kind == Kind::MirrorSynced {
                options.copy_mode = CopyMode::WriteBlocking;
            }
            Box::new(Mirror::prepare(options).await.unwrap())
        }
        Kind::ActiveCommit => {
            let options = ActiveCommitOptions::new(device, "j");
            Box::new(ActiveCommit::prepare(options).await.unwrap())
        }
        Kind::Commit => {
            let top = walk::child(device, "backing").map(|(node, _)| node);
            let backing_file = Some("base".into());
            let options = CommitOptions { top, backing_file, ..CommitOptions::new(device) };
            Commit::prepare("j", options).await.unwrap()
        }
        Kind::Stream => Stream::prepare("j", StreamOptions::new(device)).await.unwrap(),
    }
}

/// The image whose requests hang: writes from [`Control::hold`] on, reads of a stream for a
/// minute.
async fn hanging(jobs: &JobManager, kind: Kind) -> (NodeRef, Arc<Control>) {
    let control = Control::new(vec![0; LEN as usize]);
    if kind == Kind::Stream {
        let text = format!("driver=null-co,node-name=base,size={LEN},latency-ns=60000000000");
        let node = jobs.graph().open(Options::parse(&text).unwrap()).await.unwrap();
        return (node, control);
    }
    let options = Options::new().with("node-name", "base");
    let driver = Arc::new(ControlledType(Arc::clone(&control)));
    (jobs.graph().open_driver(driver, options).await.unwrap(), control)
}

#[test]
fn a_cancel_concludes_within_its_timeout_whatever_hangs() {
    for kind in KINDS {
        let sim = Sim::new(1, SimConfig::calm());
        sim.block_on(async {
            let jobs = JobManager::new(&graph_on(sim.fs()));
            let (hangs, control) = hanging(&jobs, kind).await;
            let (device, other) = (disk(&jobs, kind, &hangs).await, mem(&jobs, "other").await);
            let (guest, neighbour) =
                (Writer::start(&device, "guest"), Writer::start(&other, "neighbour"));
            let driver = prepare(kind, &device, &hangs).await;
            control.hold();
            let options =
                JobOptions { cancel_timeout: TIMEOUT, auto_dismiss: false, ..JobOptions::new("j") };
            let job = jobs.start(options, driver).await.unwrap();
            bds_io::sleep(Duration::from_secs(1)).await;
            assert!(!job.status().is_over(), "{kind:?}: it hangs");

            let began = bds_io::now();
            job.cancel(true).unwrap();
            // Commands to other disks do not wait.
            drop(jobs.graph().drain(&other).await);
            assert!(bds_io::now() - began <= Duration::from_millis(10), "{kind:?}");
            let limit = std::pin::pin!(bds_io::sleep(Duration::from_secs(30)));
            let ended = match select(std::pin::pin!(job.wait()), limit).await {
                Either::Left((result, _)) => result,
                Either::Right(_) => panic!("{kind:?}: {:?}\n{}", job.info(), jobs.graph().dump()),
            };
            let error = ended.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{kind:?}: {error}");
            let took = bds_io::now() - began;
            assert!(took <= TIMEOUT + Duration::from_secs(1), "{kind:?}: {took:?}");
            jobs.dismiss("j").unwrap();

            let before = guest.done.load(Ordering::SeqCst);
            bds_io::sleep(Duration::from_secs(1)).await;
            // What a stream reads is the guest's own disk, which hangs for the guest too.
            let goes_on = guest.done.load(Ordering::SeqCst) > before + 50;
            assert!(goes_on || kind == Kind::Stream, "{kind:?}: the guest goes on");
            let longest = neighbour.longest_us.load(Ordering::SeqCst);
            assert!(longest <= 10_000, "{kind:?}: the other disk waited {longest} us");
            // The requests end after all.
            control.release();
            bds_io::sleep(Duration::from_secs(60)).await;
            let before = guest.done.load(Ordering::SeqCst);
            bds_io::sleep(Duration::from_secs(20)).await;
            let done = guest.done.load(Ordering::SeqCst) - before;
            assert!(done > 1000, "{kind:?}: the guest goes on, {done} writes in 20 s");
            guest.check().await;
            neighbour.check().await;
            let dump = jobs.graph().dump();
            for filter in ["copy-before-write", "mirror_top", "commit_top", "copy-on-read"] {
                assert!(!dump.contains(filter), "{kind:?}: {dump}");
            }
            assert!(jobs.query().is_empty(), "{kind:?}");
        });
        drop(sim);
    }
}
