//! The log in use: which regions are durable, requests that wait for new ones, checkpoints.
//!
//! Group commit: a request that needs regions adds them to `wanted` and takes its turn at the file.
//! The first one writes the pages of all that are wanted by then, and flushes once; the others find
//! their regions durable when their turn comes. A region counts as logged only after the flush.
//!
//! ```text
//!            start                    begin_epoch, checkpoint
//! idle ────────────────► started ◄────────────────────────────┐
//!   ▲  ▲    finish, stop    │  └─────────────────────────────┘
//!   │  └────────────────────┤
//!   │        give_up        ▼
//!   └──────────────────  given up: protects nothing until the next start
//! ```
//!
//! Lock order: the caller's turn for checkpoints, then `writer`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bds_io::sync::Mutex;
use bds_io::{File, IoVec};

use super::page::{
    EndState, HEADERS_LEN, Header, LogPage, PAGE_LEN, Shape, Snapshot, Tie, checksum, overlap,
    snapshots_to_bytes, words_of,
};
use super::recover::Found;
use super::regions::Regions;
use crate::error::{Error, ErrorKind, Result};

/// What a header says about the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// Names the disk or the session, as the user of the log likes.
    pub disk_id: [u8; 16],
    /// Bytes of the disk.
    pub disk_len: u64,
    /// Which disk it is.
    pub tie: Tie,
}

/// The file of a log that was started.
struct Writer {
    file: File,
    facts: Facts,
    /// The newest header that is durable, and its slot.
    header: Header,
    slot: u64,
    /// Headers that failed may be durable too, and their snapshots in use.
    uncertain: Vec<Range<u64>>,
    /// Regions are logged in this epoch: the header's, or the one after it while a checkpoint is
    /// under way or has failed. A reader of either header finds them.
    log_epoch: u64,
    /// A log page may be torn by a write that failed; it is written again before anything counts.
    is_torn: bool,
}

/// A write-intent log; clones are the same log.
///
/// ```
/// use bds_core::bitmap::HBitmap;
/// use bds_core::bitmap::intent_log::{Facts, Found, IntentLog, Shape, Snapshot};
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # sim.block_on(async {
/// let options = bds_io::OpenOptions { write: true, create: true, ..Default::default() };
/// let file = || sim.fs().open("disk.raw.bds-cbt".as_ref(), &options);
/// let bits = HBitmap::new(1 << 30, 65536)?;
/// let daily = Snapshot { name: "daily".into(), is_enabled: true, bits: bits.into() };
/// let log = IntentLog::new(Shape::for_disk(1 << 30));
/// let facts = Facts { disk_len: 1 << 30, ..Facts::default() };
/// log.protect(true);
/// log.start(file()?, None, facts, &[daily]).await?;
/// assert!(log.needs(&(100..200)));
/// log.log(100..200).await?;                    // before the data is written
/// drop(log);                                   // a crash: the bitmap was not stored
///
/// let found = Found::read(&file()?).await?.unwrap();
/// let bitmaps = found.bitmaps(1 << 30, false)?;
/// assert_eq!(bitmaps[0].bits.areas(0..1 << 30).next(), Some(0..4 << 20));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct IntentLog(Arc<Inner>);

/// What the log shares with its tasks: a write that was begun runs to its end, since a late one
/// would undo what was written after it.
struct Inner {
    shape: Shape,
    /// Writes need their regions in the log.
    protects: AtomicBool,
    /// Regions that are durable in the log.
    logged: Regions,
    /// Regions that requests wait for.
    wanted: Regions,
    is_started: AtomicBool,
    is_given_up: AtomicBool,
    /// When the last checkpoint was, in milliseconds of the clock.
    checkpoint_ms: AtomicU64,
    writer: Mutex<Option<Writer>>,
}

impl fmt::Debug for IntentLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntentLog")
            .field("is_started", &self.is_started())
            .field("regions", &self.0.logged.count())
            .finish_non_exhaustive()
    }
}

impl IntentLog {
    /// A log that is not started and protects nothing. Does no I/O.
    pub fn new(shape: Shape) -> Self {
        Self(Arc::new(Inner {
            shape,
            protects: AtomicBool::new(false),
            logged: Regions::new(shape),
            wanted: Regions::new(shape),
            is_started: AtomicBool::new(false),
            is_given_up: AtomicBool::new(false),
            checkpoint_ms: AtomicU64::new(0),
            writer: Mutex::new(None),
        }))
    }

    /// Whether writes need their regions in the log: there is a bitmap that records.
    pub fn protect(&self, on: bool) {
        self.0.protects.store(on, Ordering::SeqCst);
    }

    /// Whether a write of the range must call [`IntentLog::log`] first. Two loads, for each 64
    /// regions one more.
    #[inline]
    pub fn needs(&self, range: &Range<u64>) -> bool {
        self.0.protects.load(Ordering::SeqCst) && !self.0.logged.covers(range)
    }

    /// As [`IntentLog::needs`] for no range: whether the log must be started before the disk
    /// changes.
    pub fn needs_start(&self) -> bool {
        self.0.protects.load(Ordering::SeqCst) && !self.is_started() && !self.is_given_up()
    }

    /// Whether there is a file that regions are logged in.
    pub fn is_started(&self) -> bool {
        self.0.is_started.load(Ordering::SeqCst)
    }

    /// Whether the log was given up: no write waits for it until the next start.
    pub fn is_given_up(&self) -> bool {
        self.0.is_given_up.load(Ordering::SeqCst)
    }

    /// Bytes of the regions that are logged: what a crash now would add to a bitmap, at most.
    pub fn logged_bytes(&self) -> u64 {
        self.0.logged.count().saturating_mul(self.0.shape.region_len())
    }

    /// True for one caller, if the last checkpoint, or the last attempt, is at least this old.
    pub fn claim_checkpoint(&self, age_ms: u64) -> bool {
        let (now, last) = (now_ms(), self.0.checkpoint_ms.load(Ordering::Relaxed));
        let claim = |last| {
            let (set, fail) = (Ordering::Relaxed, Ordering::Relaxed);
            self.0.checkpoint_ms.compare_exchange(last, now, set, fail).is_ok()
        };
        now.saturating_sub(last) >= age_ms && claim(last)
    }

    /// Makes the regions of the range durable in the log, unless they are. The data may be written
    /// afterwards. Runs to its end even if its future is dropped.
    ///
    /// # Errors
    /// The data must not be written, until [`IntentLog::give_up`] succeeds. Those of the file;
    /// `Io`: the log is not started.
    pub async fn log(&self, range: Range<u64>) -> Result<()> {
        while self.needs(&range) {
            let (inner, range) = (Arc::clone(&self.0), range.clone());
            bds_io::spawn(async move { inner.log(range).await }).detach_on_drop().await?;
        }
        Ok(())
    }

    /// Starts the log in a file with these exact bitmaps. No write that the log protects is under
    /// way. `found`: what [`Found::read`] found in the file, which counts until the new state is
    /// durable; `None`: nothing that counts, the file is made empty.
    ///
    /// # Errors
    /// The log is not started. What was found is in the file as before, or the new state is.
    pub async fn start(
        &self,
        file: File,
        found: Option<Found>,
        facts: Facts,
        bitmaps: &[Snapshot],
    ) -> Result<()> {
        let bytes = bytes_of(bitmaps, facts.disk_len)?;
        let inner = Arc::clone(&self.0);
        bds_io::spawn(async move { inner.start(file, found, facts, bytes).await })
            .detach_on_drop()
            .await
    }

    /// Goes over to the next epoch: nothing counts as logged from now on. No write is under way:
    /// each that was logged has marked the bitmaps, or was not begun. [`IntentLog::checkpoint`]
    /// follows.
    ///
    /// # Errors
    /// `Io`: the log is not started.
    pub async fn begin_epoch(&self) -> Result<()> {
        let mut writer = self.0.writer.lock().await;
        let Some(writer) = &mut *writer else { return Err(not_started()) };
        // After a checkpoint that failed, the log is in the next epoch already.
        if writer.log_epoch == writer.header.epoch {
            writer.log_epoch += 1;
            writer.is_torn = false;
            self.0.logged.clear();
        }
        Ok(())
    }

    /// Stores exact bitmaps, which were copied after [`IntentLog::begin_epoch`]; the disk was
    /// flushed in between: a block that a crash turns back to what it was must not count as copied.
    /// Writes go on meanwhile. Runs to its end even if its future is dropped. One at a time.
    ///
    /// # Errors
    /// What is in the file is right as before. May be tried again.
    pub async fn checkpoint(&self, disk_len: u64, bitmaps: &[Snapshot]) -> Result<()> {
        self.write_header(disk_len, bitmaps, None).await
    }

    /// Stores exact bitmaps and says that the disk was closed; nothing is under way, and the disk
    /// was flushed. The log is not started afterwards.
    ///
    /// # Errors
    /// As [`IntentLog::checkpoint`].
    pub async fn finish(&self, disk_len: u64, bitmaps: &[Snapshot], tie: Tie) -> Result<()> {
        self.begin_epoch().await?;
        self.write_header(disk_len, bitmaps, Some(tie)).await?;
        self.stop().await;
        Ok(())
    }

    async fn write_header(
        &self,
        disk_len: u64,
        bitmaps: &[Snapshot],
        closed: Option<Tie>,
    ) -> Result<()> {
        let bytes = bytes_of(bitmaps, disk_len)?;
        let inner = Arc::clone(&self.0);
        let write = async move { inner.write_snapshot(disk_len, bytes, closed).await };
        bds_io::spawn(write).detach_on_drop().await
    }

    /// Ends the use of the file, as it is. The next write that needs the log needs a start first.
    pub async fn stop(&self) {
        let mut writer = self.0.writer.lock().await;
        self.0.is_started.store(false, Ordering::SeqCst);
        self.0.is_given_up.store(false, Ordering::SeqCst);
        self.0.logged.clear();
        *writer = None;
    }

    /// Makes the file say, durably, that anything may be dirty.
    ///
    /// # Errors
    /// Those of the file.
    pub async fn invalidate(&self) -> Result<()> {
        let inner = Arc::clone(&self.0);
        bds_io::spawn(async move { inner.invalidate().await }).detach_on_drop().await
    }

    /// Lets writes go on without the log. What was stored counts as nothing any more, durably: the
    /// caller has seen to that.
    pub async fn give_up(&self) {
        let mut writer = self.0.writer.lock().await;
        self.0.is_given_up.store(true, Ordering::SeqCst);
        self.0.is_started.store(false, Ordering::SeqCst);
        self.0.logged.set(&(0..u64::MAX));
        *writer = None;
    }
}

impl Inner {
    fn needs(&self, range: &Range<u64>) -> bool {
        self.protects.load(Ordering::SeqCst) && !self.logged.covers(range)
    }

    async fn log(&self, range: Range<u64>) -> Result<()> {
        self.wanted.set(&range);
        let mut writer = self.writer.lock().await;
        if !self.needs(&range) {
            return Ok(());
        }
        let Some(writer) = &mut *writer else { return Err(not_started()) };
        // Another one may have taken it along, and failed.
        self.wanted.set(&range);
        let new = self.wanted.take();
        let all = self.logged.union(&new);
        for number in 0..self.shape.pages() {
            let is_new = words_of(&new, number).iter().any(|word| *word != 0);
            if is_new || writer.is_torn {
                let page = LogPage::to_page(&all, number, writer.log_epoch);
                let at = writer.header.page_at(writer.log_epoch, number);
                let written = write(&writer.file, at, page).await;
                writer.is_torn |= written.is_err();
                written?;
            }
        }
        let synced = sync(&writer.file).await;
        writer.is_torn = synced.is_err();
        synced?;
        self.logged.add(&new);
        Ok(())
    }

    async fn start(
        &self,
        file: File,
        found: Option<Found>,
        facts: Facts,
        bytes: Vec<u8>,
    ) -> Result<()> {
        let mut writer = self.writer.lock().await;
        let template = Header {
            epoch: 1,
            disk_id: facts.disk_id,
            disk_len: facts.disk_len,
            shape: self.shape,
            log_at: HEADERS_LEN,
            snapshot_at: HEADERS_LEN + self.shape.log_len(),
            snapshot_len: bytes.len() as u64,
            snapshot_checksum: checksum(&bytes),
            end_state: EndState::Open,
            tie: facts.tie,
        };
        let (header, slot) = match &found {
            None => {
                file.set_len(0).await.map_err(no_space)?;
                (template, 0)
            }
            Some(found) => (after(&found.header, template), 1 - found.slot),
        };
        if file.len().unwrap_or(0) < header.log_range().end {
            file.set_len(header.log_range().end).await.map_err(no_space)?;
        }
        write(&file, header.snapshot_at, bytes).await?;
        sync(&file).await?;
        write(&file, slot * PAGE_LEN as u64, header.to_page()).await?;
        sync(&file).await?;
        clean_area(&file, &header).await?;
        self.logged.clear();
        let log_epoch = header.epoch;
        *writer = Some(Writer {
            file,
            facts,
            header,
            slot,
            uncertain: Vec::new(),
            log_epoch,
            is_torn: false,
        });
        self.checkpoint_ms.store(now_ms(), Ordering::Relaxed);
        self.is_given_up.store(false, Ordering::SeqCst);
        self.is_started.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn write_snapshot(
        &self,
        disk_len: u64,
        bytes: Vec<u8>,
        closed: Option<Tie>,
    ) -> Result<()> {
        let mut guard = self.writer.lock().await;
        let Some(writer) = &mut *guard else { return Err(not_started()) };
        let old = writer.header;
        let len = bytes.len() as u64;
        let snapshot_at = free_place(&old, &writer.uncertain, len);
        let new = Header {
            epoch: old.epoch + 1,
            disk_len,
            snapshot_at,
            snapshot_len: len,
            snapshot_checksum: checksum(&bytes),
            end_state: if closed.is_some() { EndState::Clean } else { EndState::Open },
            tie: closed.unwrap_or(writer.facts.tie),
            ..old
        };
        let (file, slot) = (writer.file.clone(), 1 - writer.slot);
        // Requests may log meanwhile: checkpoints come one at a time, so no other task writes this.
        drop(guard);
        write(&file, snapshot_at, bytes).await?;
        sync(&file).await?;
        let mut guard = self.writer.lock().await;
        let Some(writer) = &mut *guard else { return Err(not_started()) };
        writer.uncertain.push(new.snapshot_range());
        write(&file, slot * PAGE_LEN as u64, new.to_page()).await?;
        sync(&file).await?;
        (writer.header, writer.slot) = (new, slot);
        writer.uncertain.clear();
        self.checkpoint_ms.store(now_ms(), Ordering::Relaxed);
        Ok(())
    }

    async fn invalidate(&self) -> Result<()> {
        let mut guard = self.writer.lock().await;
        let Some(writer) = &mut *guard else { return Err(not_started()) };
        // Newer than any header that may be there.
        let epoch = writer.header.epoch + 3;
        let header = Header { epoch, end_state: EndState::GivenUp, ..writer.header };
        write(&writer.file, (1 - writer.slot) * PAGE_LEN as u64, header.to_page()).await?;
        sync(&writer.file).await
    }
}

/// The header that follows one that was found. The epoch between them may have been logged in.
fn after(found: &Header, template: Header) -> Header {
    let log_at = match found.shape == template.shape {
        true => found.log_at,
        false => {
            let end = found.log_range().end.max(found.snapshot_range().end);
            end.next_multiple_of(PAGE_LEN as u64)
        }
    };
    let mut header = Header { epoch: found.epoch + 2, log_at, ..template };
    let used = [found.log_range(), found.snapshot_range(), header.log_range()];
    header.snapshot_at = first_gap(&used, header.snapshot_len);
    header
}

/// Where a snapshot of `len` bytes overwrites nothing that counts.
fn free_place(old: &Header, uncertain: &[Range<u64>], len: u64) -> u64 {
    first_gap(&[&[old.log_range(), old.snapshot_range()], uncertain].concat(), len)
}

/// The first place behind the headers, or behind a range in use, that overlaps none of them.
fn first_gap(used: &[Range<u64>], len: u64) -> u64 {
    let is_free = |at: &u64| {
        let wanted = *at..at + len.max(1);
        used.iter().all(|range| !overlap(range, &wanted))
    };
    let mut starts: Vec<u64> = used.iter().map(|range| range.end.max(HEADERS_LEN)).collect();
    starts.push(HEADERS_LEN);
    starts.sort_unstable();
    starts.into_iter().find(is_free).expect("nothing is in use behind the last range")
}

/// Zeroes pages of an area that are not of earlier epochs: torn ones would count for ever.
async fn clean_area(file: &File, header: &Header) -> Result<()> {
    let mut has_changed = false;
    for epoch in [header.epoch, header.epoch + 1] {
        for number in 0..header.shape.pages() {
            let at = header.page_at(epoch, number);
            let page = super::recover::read(file, at, PAGE_LEN as u64).await?;
            if LogPage::parse(&page, number, epoch) != LogPage::Empty {
                write(file, at, vec![0; PAGE_LEN]).await?;
                has_changed = true;
            }
        }
    }
    if has_changed { sync(file).await } else { Ok(()) }
}

fn bytes_of(bitmaps: &[Snapshot], disk_len: u64) -> Result<Vec<u8>> {
    if bitmaps.iter().any(|bitmap| bitmap.bits.len() != disk_len) {
        let text = "a bitmap has another length than the disk";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    snapshots_to_bytes(bitmaps)
}

fn now_ms() -> u64 {
    u64::try_from(bds_io::now().as_millis()).unwrap_or(u64::MAX)
}

fn not_started() -> Error {
    Error::new(ErrorKind::Io, "the log of bitmaps is not in use")
}

fn no_space(error: std::io::Error) -> Error {
    Error::io(error, "cannot allocate the log of bitmaps")
}

async fn sync(file: &File) -> Result<()> {
    file.sync_data().await.map_err(|error| Error::io(error, "cannot flush the log of bitmaps"))
}

pub(super) async fn write(file: &File, offset: u64, bytes: Vec<u8>) -> Result<()> {
    let len = bytes.len();
    let iov = IoVec::from(bytes);
    let mut done = 0;
    while done < len {
        let part = iov.slice(done..len);
        let count = file.write(offset + done as u64, part, false).await;
        match count.map_err(|error| Error::io(error, "cannot write the log of bitmaps"))? {
            0 => return Err(Error::new(ErrorKind::Io, "the log of bitmaps takes no more bytes")),
            count => done += count,
        }
    }
    Ok(())
}
