//! Makes the tracker of a job: checks the options, opens an earlier record or begins a new one.
//!
//! A record belongs to the copy if its image has the same length and its target is the same file:
//! by (device, inode), or by name where these have changed, as after a reboot. It may be of another
//! job, of another type, or of another source: what it says is of the target alone. One of a file
//! that is known by name only is checked in full, by this job and by all that go on with it.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bds_core::graph::{NodeRef, walk};
use bds_core::{Error, ErrorKind, Result};
use bds_io::Fs;

use super::chunks::ChunkMap;
use super::file::{Found, RecordFile};
use super::format::{CHUNK_BITS, RecordHeader, shortened};
use super::options::{CheckTarget, ManifestOptions, RecordOptions, wrong};
use super::plan::ManifestPlan;
use super::tracker::{ContentTracker, Inner, Record, Trust, place};

/// What a job wants to be tracked.
pub(crate) struct TrackerOptions<'a> {
    pub(crate) job: String,
    pub(crate) source: &'a NodeRef,
    pub(crate) target: &'a NodeRef,
    pub(crate) record: Option<&'a RecordOptions>,
    pub(crate) manifest: Option<&'a ManifestOptions>,
}

impl ContentTracker {
    /// Checks the options, and opens or makes the record. `None`: nothing is to be tracked.
    ///
    /// # Errors
    /// `InvalidInput`: the record belongs to another copy, or is none; the manifest's name belongs
    /// to another file; the base's manifest is of another shape; the bitmap does not record.
    /// `NotFound`: the bitmap. Others of the files. No file has changed.
    pub(crate) async fn prepare(options: TrackerOptions<'_>) -> Result<Option<Self>> {
        if options.record.is_none() && options.manifest.is_none() {
            return Ok(None);
        }
        let (source, fs) = (options.source, options.source.graph().config().fs.clone());
        let len = source.len();
        let manifest = match options.manifest {
            Some(manifest) => Some(ManifestPlan::new(&fs, manifest, len).await?),
            None => None,
        };
        let mut chunks = ChunkMap::new(len.div_ceil(1 << CHUNK_BITS))?;
        let (record, trust) = match options.record {
            Some(record) => {
                let (record, trust) = open(&fs, &options, record, &mut chunks).await?;
                (Some(record), trust)
            }
            None => (None, Trust::Checked),
        };
        let inner = Inner::new((fs, len), (chunks, trust), record, manifest);
        Ok(Some(Self(std::sync::Arc::new(inner), source.clone())))
    }

    /// Undoes [`ContentTracker::prepare`]: a record that it made is removed.
    pub(crate) async fn undo(&self) {
        let is_new = self.0.record.as_ref().is_some_and(|record| !record.is_continued);
        if is_new && let Err(error) = self.remove_record().await {
            tracing::warn!("the record of a job that did not begin is left: {error}");
        }
    }
}

async fn open(
    fs: &Fs,
    options: &TrackerOptions<'_>,
    record: &RecordOptions,
    chunks: &mut ChunkMap,
) -> Result<(Record, Trust)> {
    let bitmap_bytes = check_bitmap(options.source, record)?;
    let bitmap = shortened(record.bitmap.as_deref().unwrap_or_default());
    let copy = new_header(&options.job, options.source, options.target);
    let mut new = RecordHeader { bitmap_bytes, bitmap, ..copy };
    let (mut ignored, mut is_continued) = (None, true);
    match RecordFile::find(fs, &record.path).await? {
        Found::Record(file, old) => {
            let old = *old;
            check_belongs(&old, &new, &record.path)?;
            file.load(&old, |page| chunks.load(page)).await?;
            if !keeps_bitmap(&old, &new) {
                new.bitmap.clear();
            }
            let must_check = old.must_check || !is_same_file(&old, &new);
            new = RecordHeader { epoch: old.epoch + 1, id: old.id, must_check, ..new };
            file.write_header(&new).await?;
            file.sync().await?;
            let trust = match record.check_target {
                CheckTarget::None if !must_check => Trust::Trusted,
                _ => Trust::Checked,
            };
            return Ok((made(file, record, new, (None, true), chunks), trust));
        }
        Found::Damaged => ignored = Some("its headers are damaged".to_owned()),
        Found::Nothing => is_continued = false,
    }
    let file = RecordFile::create(fs, &record.path, &new).await?;
    Ok((made(file, record, new, (ignored, is_continued), chunks), Trust::Checked))
}

/// The header of a record that begins now.
fn new_header(job: &str, source: &NodeRef, target: &NodeRef) -> RecordHeader {
    RecordHeader {
        epoch: 1,
        id: new_id(target),
        len: source.len(),
        identity: walk::identity(target),
        must_check: false,
        bitmap_bytes: 0,
        job: shortened(job),
        source: shortened(&place(source)),
        target: shortened(&place(target)),
        bitmap: String::new(),
    }
}

/// What a file is to a job that would use it as its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// There is none: the job begins one.
    Missing,
    /// A record whose headers are damaged: the job begins another one.
    Damaged,
    /// A record of a copy to this target: the job goes on with it.
    Fits,
}

/// Looks at a job's record before the job is set up: says what a backup or a mirror from `source`
/// to `target` would do with it. Changes nothing.
///
/// ```
/// use bds_core::Options;
/// use bds_jobs::record::{RecordState, look_at_record};
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
/// let copy = graph.open(Options::parse("driver=mem,node-name=copy,size=1M")?).await?;
/// let found = look_at_record("no-such-record".as_ref(), &disk, &copy).await?;
/// assert_eq!(found, RecordState::Missing);
/// # drop((disk, copy));
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
///
/// # Errors
/// `InvalidInput`: it is of another copy, or no record; `NotSupported`: of another version. Others
/// of the file.
pub async fn look_at_record(
    path: &Path,
    source: &NodeRef,
    target: &NodeRef,
) -> Result<RecordState> {
    match RecordFile::find(&source.graph().config().fs, path).await? {
        Found::Nothing => Ok(RecordState::Missing),
        Found::Damaged => Ok(RecordState::Damaged),
        Found::Record(_, old) => {
            check_belongs(&old, &new_header("", source, target), path)?;
            Ok(RecordState::Fits)
        }
    }
}

/// Whether the bitmap has recorded since the record was begun, as far as can be seen.
fn keeps_bitmap(old: &RecordHeader, new: &RecordHeader) -> bool {
    let is_the_same = old.bitmap == new.bitmap && old.source == new.source;
    let was_cleared = old.bitmap_bytes > new.bitmap_bytes;
    if !new.bitmap.is_empty() && (!is_the_same || was_cleared) {
        let bitmap = &new.bitmap;
        tracing::warn!("bitmap '{bitmap}' has not recorded since the record was begun: not used");
    }
    is_the_same && !was_cleared
}

fn made(
    file: RecordFile,
    options: &RecordOptions,
    header: RecordHeader,
    (ignored, is_continued): (Option<String>, bool),
    chunks: &ChunkMap,
) -> Record {
    let known_bytes = chunks.inherited().len() as u64 * (1 << CHUNK_BITS);
    Record {
        file,
        options: options.clone(),
        header: bds_io::sync::Mutex::new(header),
        ignored,
        is_continued,
        known_bytes,
    }
}

/// Checks that the bitmap records. Returns its dirty bytes.
fn check_bitmap(source: &NodeRef, record: &RecordOptions) -> Result<u64> {
    let Some(name) = &record.bitmap else { return Ok(0) };
    let mut bitmaps = source.bitmaps().into_iter();
    let Some(info) = bitmaps.find(|info| info.name.as_deref() == Some(name.as_str())) else {
        let words = format!("Bitmap '{name}' could not be found");
        return Err(Error::new(ErrorKind::NotFound, words).node(source.name()));
    };
    if info.inconsistent || !info.recording {
        return wrong(format!(
            "bitmap '{name}' does not record what changes: leave out 'record-bitmap'"
        ));
    }
    Ok(info.count)
}

fn is_same_file(old: &RecordHeader, new: &RecordHeader) -> bool {
    old.identity.is_some() && old.identity == new.identity
}

fn check_belongs(old: &RecordHeader, new: &RecordHeader, path: &Path) -> Result<()> {
    if old.len == new.len && (is_same_file(old, new) || old.target == new.target) {
        return Ok(());
    }
    let words = format!(
        "the record is of a copy of {} bytes from {} to {}, but this job copies {} bytes from {} to \
         {}: name another record, or remove this one to copy everything",
        old.len, old.source, old.target, new.len, new.source, new.target
    );
    Err(Error::new(ErrorKind::InvalidInput, words).file(path))
}

/// A name that no other record has.
fn new_id(target: &NodeRef) -> [u8; 16] {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let seed = format!("{now} {count} {} {}", std::process::id(), place(target));
    blake3::hash(seed.as_bytes()).as_bytes()[..16].try_into().expect("a hash is longer")
}
