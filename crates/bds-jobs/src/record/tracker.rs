//! `ContentTracker`: hashes what a copy reads, knows what its target holds, leaves out writes that
//! change nothing, and keeps the record up to date.
//!
//! ```text
//! examine    hash ─► the target holds it? nothing to write : take it out of the record ─► write
//! written    the target holds it
//! checkpoint flush the target ─► store the pages of what was written before the flush
//! ```
//!
//! **What the record's file says is true at every moment**, so a crash at any moment leaves a right
//! one: a chunk comes in only after a flush of the target that began after its write had ended, and
//! is taken out, durably, before other bytes are written there.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::Result;
use bds_core::copy::{Content, CopyObserver, CopyWrite, Examined, Observation};
use bds_core::driver::BoxFuture;
use bds_core::graph::NodeRef;
use bds_core::request::Backend;
use bds_io::sync::Notify;
use bds_io::{Buf, Fs, IoVec};

use super::chunks::{ChunkMap, Known};
use super::file::RecordFile;
use super::format::RecordHeader;
use super::options::RecordOptions;
use super::plan::ManifestPlan;
use crate::manifest::{ContentHash, ManifestBuilder};

const CHUNK: u64 = ManifestBuilder::CHUNK_LEN;
/// Longest data that is hashed on the thread that copies, in bytes.
const MAX_INLINE_HASH: u64 = 64 << 10;
/// Longest run of zeros of which the target is read to compare; longer ones are zeroed again, which
/// takes less time on most targets.
const MAX_COMPARED_ZEROS: u64 = 4 << 20;
/// Alignment of buffers.
const ALIGN: usize = 4096;

/// What is believed of a record that was there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Each chunk is read before it is left alone.
    Checked,
    /// The record is right.
    Trusted,
}

/// Bytes of the target that were not what the record said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Differences {
    pub(super) bytes: u64,
    /// Where the first of them was found.
    pub(super) first: u64,
    /// Those that were reported.
    pub(super) reported: u64,
}

pub(super) struct State {
    pub(super) chunks: ChunkMap,
    pub(super) trust: Trust,
    /// Bytes that were not copied because the target held them already.
    resumed: u64,
    /// Bytes that were written since the last checkpoint began.
    pub(super) unrecorded: u64,
    pub(super) differences: Differences,
}

/// The record in use.
pub(super) struct Record {
    pub(super) file: RecordFile,
    pub(super) options: RecordOptions,
    /// The newest header. Held while pages are written.
    pub(super) header: bds_io::sync::Mutex<RecordHeader>,
    /// Why an earlier record is not used; `None`: there was none, or it is.
    pub(super) ignored: Option<String>,
    /// It was there before this job.
    pub(super) is_continued: bool,
    /// Bytes of chunks that it named when the job began.
    pub(super) known_bytes: u64,
}

pub(super) struct Inner {
    pub(super) len: u64,
    state: Mutex<State>,
    pub(super) record: Option<Record>,
    pub(super) manifest: Option<ManifestPlan>,
    /// Notified when enough was written for a checkpoint.
    pub(super) is_due: Notify,
    pub(super) fs: Fs,
}

/// Knows what a copy's target holds: the job's part. The engine and the filters have an
/// [`Observer`], which keeps no node.
pub(crate) struct ContentTracker(pub(super) Arc<Inner>, pub(super) NodeRef);

/// See [`ContentTracker`].
#[derive(Clone)]
struct Observer(Arc<Inner>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").field("len", &self.0.len).finish_non_exhaustive()
    }
}

impl fmt::Debug for ContentTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContentTracker").field("len", &self.0.len).finish_non_exhaustive()
    }
}

impl Inner {
    pub(super) fn new(
        (fs, len): (Fs, u64),
        (chunks, trust): (ChunkMap, Trust),
        record: Option<Record>,
        manifest: Option<ManifestPlan>,
    ) -> Self {
        let state =
            State { chunks, trust, resumed: 0, unrecorded: 0, differences: Differences::default() };
        let state = Mutex::new(state);
        Self { len, state, record, manifest, is_due: Notify::new(), fs }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of a chunk.
    pub(super) fn chunk(&self, index: u64) -> Range<u64> {
        index * CHUNK..self.len.min((index + 1) * CHUNK)
    }

    pub(super) fn interval_bytes(&self, options: &RecordOptions) -> u64 {
        match options.interval_bytes {
            0 => (self.len / 128).clamp(4 << 20, 256 << 20),
            bytes => bytes,
        }
    }

    /// The parts of a range in different chunks.
    fn pieces(&self, range: &Range<u64>) -> Vec<Piece> {
        let piece = |index| {
            let chunk = self.chunk(index);
            let part = chunk.start.max(range.start)..chunk.end.min(range.end);
            Piece { index, is_whole: part == chunk, range: part, hash: None, is_held: false }
        };
        (range.start / CHUNK..range.end.min(self.len).div_ceil(CHUNK)).map(piece).collect()
    }

    /// Finds what the target is known to hold. Returns which pieces have to be compared first.
    fn find_held(&self, pieces: &mut [Piece]) -> Vec<usize> {
        let mut state = self.state();
        let mut compared = Vec::new();
        for (at, piece) in pieces.iter_mut().enumerate() {
            let Some(hash) = piece.hash else { continue };
            let (known, held) = state.chunks.get(piece.index);
            if held != hash {
                continue;
            }
            match (known, state.trust) {
                (Known::Inherited, Trust::Checked) => compared.push(at),
                (Known::Inherited, Trust::Trusted) => {
                    state.confirm(piece.index, piece.len());
                    piece.is_held = true;
                }
                (known, _) => piece.is_held = known.is_sure(),
            }
        }
        compared
    }

    /// Reads what the record names in the target, and takes what it holds as held.
    async fn compare(
        &self,
        target: &dyn CopyWrite,
        pieces: &mut [Piece],
        compared: &[usize],
    ) -> Result<()> {
        for at in compared {
            let piece = &mut pieces[*at];
            let len = usize::try_from(piece.len()).expect("at most a chunk");
            let buffer = Buf::zeroed(len, ALIGN).iov();
            target.read_back(piece.range.start, buffer.clone()).await?;
            let found = hash_all(buffer, vec![Range { start: 0, end: len }]).await;
            let mut state = self.state();
            if found.first() == piece.hash.as_ref() {
                state.confirm(piece.index, piece.len());
                piece.is_held = true;
            } else {
                state.differ(piece);
            }
        }
        Ok(())
    }

    /// Notes that what is missing is about to be written, and takes it out of the record's file.
    async fn begin(self: &Arc<Self>, pieces: &[Piece]) -> Result<()> {
        let outdated: Vec<u64> = {
            let mut state = self.state();
            let missing = pieces.iter().filter(|piece| !piece.is_held);
            missing
                .filter(|piece| state.chunks.begin(piece.index, piece.hash))
                .map(|piece| piece.index)
                .collect()
        };
        if outdated.is_empty() || self.record.is_none() {
            return Ok(());
        }
        let this = Arc::clone(self);
        // Runs to its end: a write that is still under way would undo a later one.
        bds_io::spawn(async move { this.take_out(&outdated).await }).detach_on_drop().await
    }

    async fn take_out(&self, indices: &[u64]) -> Result<()> {
        let Some(record) = &self.record else { return Ok(()) };
        let header = record.header.lock().await;
        // Another request may have stored the page meanwhile.
        let pages = self.state().chunks.outdated(indices);
        self.store_pages(record, &header.id, &pages).await
    }

    /// Stores pages as they are now. The caller has the header's lock.
    async fn store_pages(
        &self,
        record: &Record,
        id: &[u8; 16],
        pages: &BTreeSet<u64>,
    ) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let mut written = Vec::with_capacity(pages.len());
        for number in pages {
            let page = self.state().chunks.page_to_store(*number);
            record.file.write_page(&page, id).await?;
            written.push(page);
        }
        record.file.sync().await?;
        let mut state = self.state();
        written.iter().for_each(|page| state.chunks.stored(page));
        Ok(())
    }

    async fn store(&self, bitmap_bytes: u64) -> Result<()> {
        let Some(record) = &self.record else { return Ok(()) };
        let mut header = record.header.lock().await;
        let pages = self.state().chunks.take_unstored();
        let next = RecordHeader { epoch: header.epoch + 1, bitmap_bytes, ..header.clone() };
        let stored = async {
            record.file.write_header(&next).await?;
            self.store_pages(record, &header.id, &pages).await
        };
        let stored = stored.await;
        match &stored {
            Ok(()) => *header = next,
            Err(_) => self.state().chunks.not_stored(pages),
        }
        stored
    }
}

impl State {
    /// The target holds what the record says of the chunk.
    fn confirm(&mut self, index: u64, len: u64) {
        if self.chunks.get(index).0 == Known::Inherited {
            self.chunks.confirm(index);
            self.resumed += len;
        }
    }

    fn differ(&mut self, piece: &Piece) {
        self.chunks.distrust(piece.index);
        if self.differences.bytes == 0 {
            self.differences.first = piece.range.start;
        }
        self.differences.bytes += piece.len();
    }
}

impl ContentTracker {
    /// What the copy engine and the filters call.
    pub(crate) fn observer(&self) -> Arc<dyn CopyObserver> {
        Arc::new(Observer(Arc::clone(&self.0)))
    }

    /// The target was found to hold what the record says of the chunk.
    pub(super) fn confirm(&self, index: u64) {
        let chunk = self.0.chunk(index);
        self.0.state().confirm(index, chunk.end - chunk.start);
    }

    /// Bytes that were not copied because the target held them when the job began.
    pub(crate) fn resumed_bytes(&self) -> u64 {
        self.0.state().resumed
    }

    /// True if an earlier job has written to the target: it does not read as zeros.
    pub(crate) fn is_continued(&self) -> bool {
        self.0.record.as_ref().is_some_and(|record| record.is_continued)
    }

    /// True if there is a record to be kept.
    pub(crate) fn has_record(&self) -> bool {
        self.0.record.is_some()
    }

    /// Flushes the target and brings the record up to date with what was written before.
    ///
    /// # Errors
    /// The target's flush failed, and nothing since the last checkpoint counts as held; or the
    /// record cannot be written, and stays as it was.
    pub(crate) async fn checkpoint(&self, target: &Backend) -> Result<()> {
        let inner = &self.0;
        {
            let mut state = inner.state();
            state.unrecorded = 0;
            if inner.record.is_none() || !state.chunks.take_fresh() {
                return Ok(());
            }
        }
        let bitmap_bytes = self.bitmap_bytes();
        if let Err(error) = target.flush().await {
            inner.state().chunks.flush_failed();
            return Err(error.context("cannot flush the target"));
        }
        inner.state().chunks.flushed();
        let inner = Arc::clone(inner);
        bds_io::spawn(async move { inner.store(bitmap_bytes).await }).detach_on_drop().await
    }

    /// Notes, durably, that others are about to write to the target: from then on the record may
    /// be wrong. Returns whether it was noted just now.
    ///
    /// # Errors
    /// The record cannot be written, and stays as it was.
    pub(crate) async fn release_target(&self) -> Result<bool> {
        self.set_must_check(true).await
    }

    /// Undoes [`ContentTracker::release_target`]: nothing has written to it.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn reclaim_target(&self) -> Result<()> {
        self.set_must_check(false).await.map(drop)
    }

    async fn set_must_check(&self, must_check: bool) -> Result<bool> {
        let inner = Arc::clone(&self.0);
        let write = async move {
            let Some(record) = &inner.record else { return Ok(false) };
            let mut header = record.header.lock().await;
            if header.must_check == must_check {
                return Ok(false);
            }
            let next = RecordHeader { epoch: header.epoch + 1, must_check, ..header.clone() };
            record.file.write_header(&next).await?;
            record.file.sync().await?;
            *header = next;
            Ok(true)
        };
        bds_io::spawn(write).detach_on_drop().await
    }

    /// Dirty bytes of the source's bitmap now; 0 without one.
    fn bitmap_bytes(&self) -> u64 {
        let name = self.0.record.as_ref().and_then(|record| record.options.bitmap.as_deref());
        let bitmaps = || self.1.bitmaps().into_iter();
        let found = name.and_then(|name| bitmaps().find(|b| b.name.as_deref() == Some(name)));
        found.map_or(0, |info| info.count)
    }

    /// Removes the record of a job that has succeeded, unless its options keep it.
    ///
    /// # Errors
    /// Of the file system.
    pub(crate) async fn end_record(&self) -> Result<()> {
        if self.keeps_record() { Ok(()) } else { self.remove_record().await }
    }

    fn keeps_record(&self) -> bool {
        self.0.record.as_ref().is_some_and(|record| record.options.keep_at_success)
    }

    /// Brings a record up to date that stays at success. The copy is complete.
    ///
    /// # Errors
    /// As [`ContentTracker::checkpoint`].
    pub(crate) async fn complete_record(&self, target: &Backend) -> Result<()> {
        if self.keeps_record() { self.checkpoint(target).await } else { Ok(()) }
    }

    /// Removes the record.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) async fn remove_record(&self) -> Result<()> {
        let Some(record) = &self.0.record else { return Ok(()) };
        // After writes that are under way.
        let _header = record.header.lock().await;
        record.file.remove()
    }
}

/// The part of a request in one chunk.
struct Piece {
    index: u64,
    range: Range<u64>,
    is_whole: bool,
    /// Of a whole chunk.
    hash: Option<ContentHash>,
    is_held: bool,
}

impl Piece {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Hashes parts of a buffer, on the processor pool if they are long.
pub(super) async fn hash_all(data: IoVec, parts: Vec<Range<usize>>) -> Vec<ContentHash> {
    let is_long = parts.iter().map(|part| part.len() as u64).sum::<u64>() > MAX_INLINE_HASH;
    let work = move || {
        let mut scratch = vec![0; parts.iter().map(Range::len).max().unwrap_or(0)];
        let hash = |part: Range<usize>| {
            let scratch = &mut scratch[..part.len()];
            data.copy_to(part.start, scratch);
            ContentHash::of_chunk(scratch)
        };
        parts.into_iter().map(hash).collect()
    };
    match is_long {
        true => bds_io::spawn_cpu(work).await,
        false => work(),
    }
}

async fn hash_pieces(offset: u64, content: Content<'_>, pieces: &mut [Piece]) {
    let whole = pieces.iter_mut().filter(|piece| piece.is_whole);
    match content {
        Content::Zeros(_) => whole.for_each(|piece| piece.hash = Some(ContentHash::ZERO)),
        Content::Data(data) => {
            let index = |at: u64| usize::try_from(at - offset).expect("inside the data");
            let whole: Vec<_> = whole.collect();
            let parts = whole.iter().map(|p| index(p.range.start)..index(p.range.end)).collect();
            let hashes = hash_all(data.clone(), parts).await;
            whole.into_iter().zip(hashes).for_each(|(piece, hash)| piece.hash = Some(hash));
        }
    }
}

impl CopyObserver for Observer {
    fn examine<'a>(&'a self, request: Examined<'a>) -> BoxFuture<'a, Result<Box<dyn Observation>>> {
        Box::pin(async move {
            let Examined { offset, content, is_unit, target } = request;
            let inner = &self.0;
            let mut pieces = inner.pieces(&(offset..offset + content.len()));
            hash_pieces(offset, content, &mut pieces).await;
            let compared = inner.find_held(&mut pieces);
            let is_short = match content {
                Content::Data(_) => true,
                Content::Zeros(_) => compared.len() as u64 * CHUNK <= MAX_COMPARED_ZEROS,
            };
            if is_short {
                inner.compare(target, &mut pieces, &compared).await?;
            }
            if is_unit && !pieces.iter().all(|piece| piece.is_held) {
                pieces.iter_mut().for_each(|piece| piece.is_held = false);
            }
            inner.begin(&pieces).await?;
            Ok(Box::new(Tracked::new(inner, pieces)) as Box<dyn Observation>)
        })
    }
}

/// A request that was examined.
struct Tracked {
    inner: Arc<Inner>,
    missing: Vec<Range<u64>>,
    pieces: Vec<Piece>,
}

impl Tracked {
    fn new(inner: &Arc<Inner>, mut pieces: Vec<Piece>) -> Self {
        pieces.retain(|piece| !piece.is_held);
        let mut missing: Vec<Range<u64>> = Vec::new();
        for piece in &pieces {
            match missing.last_mut() {
                Some(last) if last.end == piece.range.start => last.end = piece.range.end,
                _ => missing.push(piece.range.clone()),
            }
        }
        Self { inner: Arc::clone(inner), missing, pieces }
    }
}

impl Observation for Tracked {
    fn missing(&self) -> &[Range<u64>] {
        &self.missing
    }

    fn written(self: Box<Self>) {
        let mut state = self.inner.state();
        for piece in &self.pieces {
            if let Some(hash) = piece.hash {
                state.chunks.hold(piece.index, hash);
            }
            state.unrecorded += piece.len();
        }
        let unrecorded = state.unrecorded;
        drop(state);
        let record = self.inner.record.as_ref();
        if record.is_some_and(|r| unrecorded >= self.inner.interval_bytes(&r.options)) {
            self.inner.is_due.notify_waiters();
        }
    }
}

/// The place of an image, for messages and to know it again: its file, or its node.
pub(super) fn place(node: &NodeRef) -> String {
    match bds_core::graph::walk::filename(node) {
        Some(path) => absolute(path),
        None => format!("node '{}'", node.name()),
    }
}

fn absolute(path: PathBuf) -> String {
    let absolute = std::path::absolute(&path).unwrap_or(path);
    absolute.to_string_lossy().into_owned()
}
