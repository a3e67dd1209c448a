//! Opens the images and sets the job up.

use bds_core::graph::{Graph, NodeRef};
use bds_core::options::Options;
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions};
use bds_jobs::{Commit, CommitOptions, JobDriver, Stream, StreamOptions};
use serde_json::{Value, json};

use crate::Result;
use crate::settings::{Kind, Settings};

/// Bytes of a null device.
const NULL_LEN: u64 = 1 << 30;

/// The disks of a run.
pub(crate) struct Disks {
    /// What the guest writes to.
    pub(crate) guest: NodeRef,
    /// What is copied to; for a commit the image that is committed from.
    other: Option<NodeRef>,
}

/// A job that is ready to be started.
pub(crate) struct Prepared {
    pub(crate) work: Box<dyn JobDriver>,
    /// It does not end by itself.
    pub(crate) needs_complete: bool,
}

pub(crate) async fn open(graph: &Graph, settings: &Settings) -> Result<Disks> {
    let image = |name: &str, backing: Value| image(settings, name, backing);
    let (guest, other) = match settings.kind {
        Kind::Backup | Kind::Mirror => {
            let source = if settings.latency.is_zero() {
                image("src", Value::Null)
            } else {
                null(settings, "src")
            };
            (source, Some(image("dst", Value::Null)))
        }
        Kind::Stream => (image("top", base(settings)), None),
        Kind::Commit => (image("top", image("mid", base(settings))), None),
        Kind::Active => (image("mid", base(settings)), None),
        Kind::Chain => return chain(graph, settings).await,
    };
    let guest = graph.open(Options::from_json(guest)?).await?;
    let other = match other {
        Some(other) => Some(graph.open(Options::from_json(other)?).await?),
        None => None,
    };
    Ok(Disks { guest, other })
}

pub(crate) async fn prepare(settings: &Settings, disks: &Disks) -> Result<Prepared> {
    let guest = &disks.guest;
    let target = || disks.other.as_ref().ok_or("no target");
    let below = |name: &str| guest.graph().find(name);
    let done = |work: Box<dyn JobDriver>| Ok(Prepared { work, needs_complete: false });
    match settings.kind {
        Kind::Backup => {
            let options = BackupOptions {
                staging_len: settings.staging_len,
                ..BackupOptions::new(guest, target()?, "job0")
            };
            done(Box::new(Backup::prepare(options).await?))
        }
        Kind::Mirror => {
            let options = MirrorOptions {
                max_pivot_stall: settings.stall,
                ..MirrorOptions::new(guest, target()?, "job0")
            };
            let work = Box::new(Mirror::prepare(options).await?);
            Ok(Prepared { work, needs_complete: true })
        }
        Kind::Active => {
            let options = ActiveCommitOptions {
                max_pivot_stall: settings.stall,
                ..ActiveCommitOptions::new(guest, "job0")
            };
            let work = Box::new(ActiveCommit::prepare(options).await?);
            Ok(Prepared { work, needs_complete: true })
        }
        Kind::Stream => done(Stream::prepare("job0", StreamOptions::new(guest)).await?),
        Kind::Commit => {
            // A null device has no name that an image could record.
            let backing_file = (!settings.latency.is_zero()).then(|| "null-co://".into());
            let options = CommitOptions {
                top: Some(below("mid")?),
                backing_file,
                ..CommitOptions::new(guest)
            };
            done(Commit::prepare("job0", options).await?)
        }
        Kind::Chain => {
            let top = format!("layer{}", layers(settings) - 1);
            let options = CommitOptions { top: Some(below(&top)?), ..CommitOptions::new(guest) };
            done(Commit::prepare("job0", options).await?)
        }
    }
}

fn image(settings: &Settings, name: &str, backing: Value) -> Value {
    let path = settings.dir.join(format!("{name}.qcow2"));
    json!({
        "driver": "qcow2", "node-name": name, "backing": backing, "discard": "unmap",
        "file": {
            "driver": "file", "filename": path, "discard": "unmap",
            "cache": {"direct": settings.is_direct},
        },
    })
}

/// A device without data that takes its time.
fn null(settings: &Settings, name: &str) -> Value {
    let nanoseconds = u64::try_from(settings.latency.as_nanos()).unwrap_or(u64::MAX);
    json!({
        "driver": "null-co", "node-name": name, "size": NULL_LEN, "latency-ns": nanoseconds,
        "read-zeroes": false,
    })
}

fn base(settings: &Settings) -> Value {
    match settings.latency.is_zero() {
        true => image(settings, "base", Value::Null),
        false => null(settings, "base"),
    }
}

/// How many layers lie in the directory.
fn layers(settings: &Settings) -> usize {
    let is_there = |index: &usize| settings.dir.join(format!("layer{index}.qcow2")).exists();
    (1..).take_while(is_there).count()
}

/// Opens the layers one by one: options are not nested so deep.
async fn chain(graph: &Graph, settings: &Settings) -> Result<Disks> {
    let count = layers(settings);
    if count < 2 {
        return Err("there are no layers".into());
    }
    let mut guest = graph.open(Options::from_json(base(settings))?).await?;
    for index in 1..=count {
        let layer = image(settings, &format!("layer{index}"), guest.name().into());
        guest = graph.open(Options::from_json(layer)?).await?;
    }
    Ok(Disks { guest, other: None })
}
