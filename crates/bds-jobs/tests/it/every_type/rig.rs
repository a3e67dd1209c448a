//! A disk with a guest, and one job of any type for it.
//!
//! ```text
//! backup          guest ─► disk                      copy
//! mirror          guest ─► disk                      copy
//! active commit   guest ─► top ─► mid ─► base        top and mid into base
//! commit          guest ─► top ─► mid ─► base        mid into base
//! stream          guest ─► top ─► mid ─► base        all into top
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{BitmapOptions, Graph, GraphConfig, NewImage, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::Fs;
use bds_jobs::backup::{Backup, BackupOptions, BitmapSync};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions};
use bds_jobs::{
    Commit, CommitOptions, CopyMode, JobDriver, JobHandle, JobManager, JobOptions, Stream,
    StreamOptions,
};
use bds_testkit::{StampedDisk, Tick};

use crate::load::{Load, Pace};

/// A job and its variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Backup,
    /// With old data kept in memory.
    BackupStaged,
    Mirror,
    MirrorSynced,
    ActiveCommit,
    Commit,
    Stream,
}

pub(super) const KINDS: [Kind; 7] = [
    Kind::Backup,
    Kind::BackupStaged,
    Kind::Mirror,
    Kind::MirrorSynced,
    Kind::ActiveCommit,
    Kind::Commit,
    Kind::Stream,
];

impl Kind {
    fn is_chain(self) -> bool {
        matches!(self, Self::ActiveCommit | Self::Commit | Self::Stream)
    }

    pub(super) fn is_backup(self) -> bool {
        matches!(self, Self::Backup | Self::BackupStaged)
    }

    /// Whether it waits to be completed.
    pub(super) fn gets_ready(self) -> bool {
        matches!(self, Self::Mirror | Self::MirrorSynced | Self::ActiveCommit)
    }
}

/// The load of a test: few requests at a time on a simulated disk, many on a real one.
pub(super) const CALM: Pace = Pace { depth: 3, max_pause_us: 300, most: u64::MAX };

pub(super) struct Rig {
    pub(super) kind: Kind,
    pub(super) jobs: JobManager,
    pub(super) guest: Backend,
    pub(super) model: Arc<StampedDisk>,
    /// The target of a backup or mirror.
    pub(super) copy: Option<NodeRef>,
    /// Moments between which a backup began.
    pub(super) window: (Tick, Tick),
    dir: PathBuf,
    /// An operation of the world was made to fail.
    pub(super) has_fault: bool,
}

pub(super) fn graph_on(fs: Fs) -> Graph {
    let gate = Arc::new(TrustAll { may_probe: false });
    let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    Graph::new(GraphConfig { fs, gate, ..config })
}

impl Rig {
    /// Makes the images, each layer with writes of its own.
    pub(super) async fn make(fs: Fs, dir: &Path, kind: Kind, len: u64, seed: u64) -> Self {
        let graph = graph_on(fs);
        let model = Arc::new(StampedDisk::new(seed + 1, len));
        let names: &[&str] = if kind.is_chain() { &["base", "mid", "top"] } else { &["disk"] };
        let mut top: Option<NodeRef> = None;
        for (number, name) in names.iter().enumerate() {
            let node = image(&graph, dir, name, len, top.as_ref()).await.unwrap();
            let disk = backend(&node, "fill", true).unwrap();
            let mut load = Load::paced(&disk, Arc::clone(&model), seed ^ number as u64, CALM);
            bds_io::sleep(std::time::Duration::from_millis(3)).await;
            load.stop().await;
            disk.flush().await.unwrap();
            top = Some(node);
        }
        let top = top.unwrap();
        let copy = match kind.is_chain() {
            true => None,
            false => Some(image(&graph, dir, "copy", len, None).await.unwrap()),
        };
        if kind.is_backup() {
            top.add_bitmap(BitmapOptions::named("b")).await.unwrap();
        }
        let guest = backend(&top, "guest", true).unwrap();
        let (jobs, window, dir) = (JobManager::new(&graph), (0, 0), dir.to_owned());
        Self { kind, jobs, guest, model, copy, window, dir, has_fault: false }
    }

    pub(super) fn graph(&self) -> &Graph {
        self.jobs.graph()
    }

    pub(super) fn load(&self, seed: u64) -> Load {
        self.load_of(seed, CALM)
    }

    pub(super) fn load_of(&self, seed: u64, pace: Pace) -> Load {
        Load::paced(&self.guest, Arc::clone(&self.model), seed, pace)
    }

    /// The image that the guest uses.
    pub(super) fn top(&self) -> NodeRef {
        let mut node = self.guest.node().expect("it has a medium");
        while node.driver_name() != "qcow2" {
            node = walk::next_below(&node).expect("an image");
        }
        node
    }

    /// Prepares the job.
    pub(super) async fn prepare(&mut self) -> Result<Box<dyn JobDriver>> {
        let (kind, id) = (self.kind, "j");
        let top = self.top();
        let copy = || self.copy.clone().expect("a copy has a target");
        Ok(match kind {
            Kind::Backup | Kind::BackupStaged => {
                let mut options = BackupOptions::new(&top, &copy(), id);
                (options.bitmap, options.bitmap_mode) =
                    (Some("b".into()), Some(BitmapSync::OnSuccess));
                options.staging_len = if kind == Kind::Backup { 0 } else { 1 << 20 };
                let from = self.model.now();
                let backup = Backup::prepare(options).await?;
                self.window = (from, self.model.now());
                Box::new(backup)
            }
            Kind::Mirror | Kind::MirrorSynced => {
                let mut options = MirrorOptions::new(&top, &copy(), id);
                options.unmap = true;
                if kind == Kind::MirrorSynced {
                    options.copy_mode = CopyMode::WriteBlocking;
                }
                Box::new(Mirror::prepare(options).await?)
            }
            Kind::ActiveCommit => {
                Box::new(ActiveCommit::prepare(ActiveCommitOptions::new(&top, id)).await?)
            }
            Kind::Commit => {
                let mid = walk::child(&top, "backing").map(|(node, _)| node);
                let options = CommitOptions { top: mid, ..CommitOptions::new(&top) };
                Commit::prepare(id, options).await?
            }
            Kind::Stream => Stream::prepare(id, StreamOptions::new(&top)).await?,
        })
    }

    /// Prepares and starts it.
    pub(super) async fn start(&mut self, options: JobOptions) -> Result<JobHandle> {
        let driver = self.prepare().await?;
        self.jobs.start(options, driver).await
    }

    /// Checks what all must see after the job's end; consumes everything.
    pub(super) async fn finish(self, mut load: Load, succeeded: bool, fs: Fs, words: &str) {
        load.stop().await;
        let Self { kind, jobs, guest, model, copy, window, dir, has_fault } = self;
        let expected = match (kind, succeeded) {
            (Kind::Mirror | Kind::MirrorSynced, true) => "copy",
            (Kind::ActiveCommit, true) => "base",
            (kind, _) if kind.is_chain() => "top",
            _ => "disk",
        };
        let node = guest.node().unwrap();
        assert_eq!(node.name(), expected, "{kind:?} {words}: the guest's node");
        load.verify(&guest).await;
        if let (true, Some(copy)) = (kind.is_backup() && succeeded, &copy) {
            load.verify_window(&backend(copy, "look", false).unwrap(), window).await;
        }
        for bitmap in node.bitmaps() {
            assert!(!bitmap.busy, "{kind:?} {words}: {bitmap:?}");
        }
        let below: Vec<String> = std::iter::successors(Some(node.clone()), |node| {
            walk::child(node, "backing").map(|(node, _)| node)
        })
        .map(|node| node.name().to_owned())
        .collect();
        let chain: &[&str] = match (kind, succeeded) {
            (Kind::Commit, true) => &["top", "base"],
            (Kind::Stream, true) => &["top"],
            (kind, false) if kind.is_chain() => &["top", "mid", "base"],
            _ => &[expected],
        };
        assert_eq!(below, chain, "{kind:?} {words}: the chain");
        let flush = model.begin_flush();
        let mut is_durable = true;
        match guest.flush().await {
            Ok(()) => model.end_flush(flush),
            // A file whose flush failed fails all later ones.
            Err(error) => {
                assert!(has_fault, "{kind:?} {words}: {error}");
                is_durable = false;
            }
        }
        let graph = jobs.graph().clone();
        drop((node, guest, copy, jobs));
        let report = graph.shutdown().await;
        report.check_leaks().unwrap();
        let load = is_durable.then_some(&load);
        reopen(fs, &dir, expected, load, words).await;
    }
}

/// What another program finds behind the headers; without a load the image alone is checked.
async fn reopen(fs: Fs, dir: &Path, top: &str, load: Option<&Load>, words: &str) {
    let graph = graph_on(fs);
    let text = format!(
        "driver=qcow2,node-name={top},read-only=on,file.driver=file,file.filename={}",
        dir.join(top).display()
    );
    let node = graph.open(Options::parse(&text).unwrap()).await.unwrap();
    let look = backend(&node, "look", false).unwrap();
    if let Some(load) = load {
        load.verify(&look).await;
    }
    let report = look.check(&|_, _| ()).await.unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{words}: {report:?}");
    drop((look, node));
    graph.shutdown().await.check_leaks().unwrap();
}

pub(super) fn backend(node: &NodeRef, name: &str, writable: bool) -> Result<Backend> {
    Backend::new(node, BackendOptions { name: name.into(), writable, ..Default::default() })
}

/// Makes and opens a qcow2 image.
async fn image(
    graph: &Graph,
    dir: &Path,
    name: &str,
    len: u64,
    backing: Option<&NodeRef>,
) -> Result<NodeRef> {
    let path = dir.join(name);
    let mut options = Options::new().with("size", len).with("cluster_size", 4096);
    if let Some(backing) = backing {
        options = options.with("backing_file", backing.name()).with("backing_fmt", "qcow2");
    }
    let image =
        NewImage { format: "qcow2".into(), path: path.clone(), options, skip_backing: true };
    graph.create_image(image).await?;
    let mut text = format!(
        "driver=qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={},\
         file.discard=unmap",
        path.display()
    );
    if let Some(backing) = backing {
        text += &format!(",backing={}", backing.name());
    }
    graph.open(Options::parse(&text)?).await
}

/// The graph as text, without lengths of files, counts, and the test's own references.
pub(super) fn shape(graph: &Graph) -> String {
    let is_kept = |word: &&str| !word.starts_with("len=") && !word.starts_with("refs=");
    let of_line = |line: &str| line.split(' ').filter(is_kept).collect::<Vec<_>>().join(" ");
    let dump = graph.dump();
    let lines = dump.lines().filter(|line| !line.contains("held by owner 'open'"));
    lines.map(of_line).collect::<Vec<_>>().join("\n")
}
