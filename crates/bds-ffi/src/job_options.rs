//! Reads the options of jobs, with QAPI's names, and makes the jobs.

use std::ffi::OsString;

use bds_core::graph::{Graph, NodeRef};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::amend::Amend;
use bds_jobs::backup::{Backup, BackupOptions, BackupSync, BitmapSync, OnCbwError};
use bds_jobs::create::Create;
use bds_jobs::mirror::{
    ActiveCommit, ActiveCommitOptions, BitmapTransfer, Mirror, MirrorOptions, MirrorSync,
};
use bds_jobs::{
    Commit, CommitOptions, CopyMode, JobDriver, JobOptions, OnError, Stream, StreamOptions,
};

/// QAPI's words for what to do when a request fails.
const ON_ERROR: [(&str, OnError); 5] = [
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Auto),
];

/// Takes the options that every job has.
pub(crate) fn common(options: &mut Options) -> Result<JobOptions> {
    let id = options.take_str("job-id")?.ok_or_else(|| missing("job-id"))?;
    let mut job = JobOptions::new(id);
    job.speed = options.take_size("speed")?.unwrap_or(0);
    job.auto_finalize = options.take_bool("auto-finalize")?.unwrap_or(true);
    job.auto_dismiss = options.take_bool("auto-dismiss")?.unwrap_or(true);
    let both = options.take_choice("on-error", &ON_ERROR)?.unwrap_or_default();
    job.on_source_error = options.take_choice("on-source-error", &ON_ERROR)?.unwrap_or(both);
    job.on_target_error = options.take_choice("on-target-error", &ON_ERROR)?.unwrap_or(both);
    Ok(job)
}

/// Sets a job of this type up, with the rest of the options.
pub(crate) async fn prepare(
    graph: &Graph,
    kind: &str,
    job: &str,
    mut options: Options,
) -> Result<Box<dyn JobDriver>> {
    match kind {
        "stream" => stream(graph, job, options).await,
        "commit" => commit(graph, job, options).await,
        "mirror" => mirror(graph, job, options).await,
        "backup" => backup(graph, job, options).await,
        "create" => {
            let nested = options.take("options").ok_or_else(|| missing("options"))?;
            options.finish("a create job")?;
            Ok(Create::prepare(graph, Options::from_json(nested)?)?.into())
        }
        "amend" => {
            let name = options.take_str("node-name")?.ok_or_else(|| missing("node-name"))?;
            let nested = options.take("options").ok_or_else(|| missing("options"))?;
            let force = options.take_bool("force")?.unwrap_or(false);
            options.finish("an amend job")?;
            Ok(Amend::prepare(graph, job, &name, Options::from_json(nested)?, force)?.into())
        }
        _ => {
            Err(Error::new(ErrorKind::NotSupported, format!("there are no jobs of type '{kind}'")))
        }
    }
}

fn missing(name: &'static str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is missing"))
}

/// The node of this name, or the medium of the backend of this name.
fn find(graph: &Graph, name: &str) -> Result<NodeRef> {
    let medium = || graph.backend(name).ok().and_then(|backend| backend.node());
    graph.find(name).or_else(|error| medium().ok_or(error))
}

fn node(graph: &Graph, options: &mut Options, key: &'static str) -> Result<Option<NodeRef>> {
    options.take_str(key)?.map(|name| find(graph, &name)).transpose()
}

fn device(graph: &Graph, options: &mut Options) -> Result<NodeRef> {
    node(graph, options, "device")?.ok_or_else(|| missing("device"))
}

fn path(options: &mut Options, key: &'static str) -> Result<Option<OsString>> {
    Ok(options.take_path(key)?.map(Into::into))
}

fn granularity(options: &mut Options) -> Result<Option<u32>> {
    let Some(bytes) = options.take_size("granularity")? else { return Ok(None) };
    let wrong = |_| Error::new(ErrorKind::InvalidInput, "Invalid parameter 'granularity'");
    u32::try_from(bytes).map(Some).map_err(wrong)
}

fn copy_mode(options: &mut Options) -> Result<CopyMode> {
    let words = [("background", CopyMode::Background), ("write-blocking", CopyMode::WriteBlocking)];
    Ok(options.take_choice("copy-mode", &words)?.unwrap_or_default())
}

async fn stream(graph: &Graph, job: &str, mut given: Options) -> Result<Box<dyn JobDriver>> {
    let mut options = StreamOptions::new(&device(graph, &mut given)?);
    options.base = node(graph, &mut given, "base-node")?;
    options.bottom = node(graph, &mut given, "bottom")?;
    options.backing_file = path(&mut given, "backing-file")?;
    options.backing_mask_protocol = given.take_bool("backing-mask-protocol")?.unwrap_or(false);
    options.filter_node_name = given.take_str("filter-node-name")?;
    given.finish("a stream job")?;
    Stream::prepare(job, options).await
}

async fn commit(graph: &Graph, job: &str, mut given: Options) -> Result<Box<dyn JobDriver>> {
    let mut options = CommitOptions::new(&device(graph, &mut given)?);
    options.top = node(graph, &mut given, "top-node")?;
    options.base = node(graph, &mut given, "base-node")?;
    options.backing_file = path(&mut given, "backing-file")?;
    options.backing_mask_protocol = given.take_bool("backing-mask-protocol")?.unwrap_or(false);
    options.filter_node_name = given.take_str("filter-node-name")?;
    options.force = given.take_bool("force")?.unwrap_or(false);
    given.finish("a commit job")?;
    if !options.is_active() {
        return Commit::prepare(job, options).await;
    }
    let mut active = ActiveCommitOptions::new(options.top.as_ref().unwrap_or(&options.device), job);
    active.base = options.base;
    active.filter_node_name = options.filter_node_name;
    Ok(Box::new(ActiveCommit::prepare(active).await?))
}

async fn mirror(graph: &Graph, job: &str, mut given: Options) -> Result<Box<dyn JobDriver>> {
    let source = device(graph, &mut given)?;
    let target = node(graph, &mut given, "target")?.ok_or_else(|| missing("target"))?;
    let mut options = MirrorOptions::new(&source, &target, job);
    if let Some(word) = given.take_str("sync")? {
        options.sync = MirrorSync::parse(&word)?;
    }
    options.granularity = granularity(&mut given)?;
    options.buf_size = given.take_size("buf-size")?.unwrap_or(0);
    options.copy_mode = copy_mode(&mut given)?;
    options.unmap = given.take_bool("unmap")?.unwrap_or(true);
    options.replaces = given.take_str("replaces")?;
    options.filter_node_name = given.take_str("filter-node-name")?;
    options.target_is_zero = given.take_bool("target-is-zero")?.unwrap_or(false);
    let words = [
        ("none", BitmapTransfer::None),
        ("copy", BitmapTransfer::Copy),
        ("move", BitmapTransfer::Move),
    ];
    options.bitmaps = given.take_choice("bitmaps", &words)?.unwrap_or_default();
    given.finish("a mirror job")?;
    Ok(Box::new(Mirror::prepare(options).await?))
}

async fn backup(graph: &Graph, job: &str, mut given: Options) -> Result<Box<dyn JobDriver>> {
    let source = device(graph, &mut given)?;
    let target = node(graph, &mut given, "target")?.ok_or_else(|| missing("target"))?;
    let mut options = BackupOptions::new(&source, &target, job);
    let modes = [
        ("full", BackupSync::Full),
        ("top", BackupSync::Top),
        ("incremental", BackupSync::Incremental),
        ("bitmap", BackupSync::Bitmap),
        ("none", BackupSync::None),
    ];
    options.sync = given.take_choice("sync", &modes)?.ok_or_else(|| missing("sync"))?;
    options.bitmap = given.take_str("bitmap")?;
    let modes = [
        ("on-success", BitmapSync::OnSuccess),
        ("never", BitmapSync::Never),
        ("always", BitmapSync::Always),
    ];
    options.bitmap_mode = given.take_choice("bitmap-mode", &modes)?;
    options.compress = given.take_bool("compress")?.unwrap_or(false);
    options.discard_source = given.take_bool("discard-source")?.unwrap_or(false);
    options.target_is_zero = given.take_bool("target-is-zero")?.unwrap_or(false);
    options.filter_node_name = given.take_str("filter-node-name")?;
    let on_error = [
        ("break-guest-write", OnCbwError::BreakGuestWrite),
        ("break-snapshot", OnCbwError::BreakSnapshot),
    ];
    if let Some(choice) = given.take_choice("on-cbw-error", &on_error)? {
        options.on_cbw_error = choice;
    }
    given.finish("a backup job")?;
    Ok(Box::new(Backup::prepare(options).await?))
}
