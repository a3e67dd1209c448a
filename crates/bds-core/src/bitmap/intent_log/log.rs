//! The log in use: which regions are durable, requests that wait for new ones, checkpoints.
//!
//! Group commit: a request that needs regions adds them to `wanted` and takes its turn at the file.
//! The first one writes the pages of all that are wanted by then, and flushes once; the others find
//! their regions durable when their turn comes. A region counts as logged only after the flush.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bds_io::sync::Mutex;
use bds_io::{Buf, File, IoVec};

use super::page::{
    FIRST_LOG_PAGE, Header, LogPage, PAGE_LEN, REGIONS, Snapshot, checksum, parse_snapshots,
    snapshots_to_bytes,
};
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};

/// What a log file held.
#[derive(Debug)]
pub struct Recovered {
    /// The bitmaps: those that record have the logged regions too.
    pub bitmaps: Vec<Snapshot>,
    /// Bytes of the disk in logged regions: what was added at most. 0 after a checkpoint without
    /// later writes, as at a clean end.
    pub logged_bytes: u64,
}

/// State that changes with writes to the file.
struct Writer {
    /// The newest header that is durable.
    header: Header,
    /// Another one may be durable too: no epoch is safe to log in.
    is_broken: bool,
    /// Nothing of the file behind this is in use.
    end: u64,
}

/// A write-intent log.
///
/// ```
/// use bds_core::bitmap::intent_log::IntentLog;
/// use bds_core::bitmap::intent_log::page::Snapshot;
/// use bds_core::bitmap::HBitmap;
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # sim.block_on(async {
/// let options = bds_io::OpenOptions { write: true, create: true, ..Default::default() };
/// let file = || sim.fs().open("disk.raw.bds-cbt".as_ref(), &options);
/// let bits = HBitmap::new(1 << 30, 65536)?;
/// let daily = Snapshot { name: "daily".into(), is_enabled: true, bits: bits.into() };
/// let log = IntentLog::create(file()?, [7; 16], 1 << 30, 4 << 20, &[daily]).await?;
/// log.log(100..200).await?;                    // before the data is written
/// drop(log);                                   // a crash: the bitmap was not stored
///
/// let (_log, found) = IntentLog::open(file()?, [7; 16], 1 << 30).await?;
/// assert_eq!(found.bitmaps[0].bits.areas(0..1 << 30).next(), Some(0..4 << 20));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct IntentLog(Arc<Inner>);

/// What the log shares with its tasks: a write that was begun runs to its end, since a late one
/// would undo what was written after it.
struct Inner {
    file: File,
    /// Regions that are durable in the log: granules are regions.
    logged: HBitmap,
    /// Regions that requests wait for.
    wanted: HBitmap,
    writer: Mutex<Writer>,
}

impl fmt::Debug for IntentLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntentLog").field("logged", &self.0.logged).finish_non_exhaustive()
    }
}

impl IntentLog {
    /// Makes a log file for a disk of `disk_len` bytes, durably. `region_len` is a power of two
    /// from 64 KiB: 4 MiB costs one flush for each 4 MiB that are written for the first time since
    /// a checkpoint.
    ///
    /// # Errors
    /// `InvalidInput`: the region's length, a bitmap of another length; those of the file.
    pub async fn create(
        file: File,
        disk_id: [u8; 16],
        disk_len: u64,
        region_len: u64,
        bitmaps: &[Snapshot],
    ) -> Result<Self> {
        let mut header = Header {
            epoch: 0,
            disk_id,
            disk_len,
            region_len,
            snapshot_at: u64::MAX,
            snapshot_len: 0,
            snapshot_checksum: 0,
        };
        let shape = u32::try_from(region_len).ok().map(|len| HBitmap::new(disk_len, len));
        let (Some(Ok(logged)), true) = (shape, region_len >= super::page::MIN_REGION_LEN) else {
            let text = "a region is a power of two from 64 KiB, and there are at most 2^32 of them";
            return Err(Error::new(ErrorKind::InvalidInput, text).field("region_len", region_len));
        };
        header.snapshot_at = header.log_end();
        file.set_len(0).await.map_err(no_space)?;
        file.set_len(header.log_end()).await.map_err(no_space)?;
        let writer = Writer { header, is_broken: true, end: header.log_end() };
        let wanted = HBitmap::new(disk_len, logged.granularity())?;
        let writer = Mutex::new(writer);
        let log = Self(Arc::new(Inner { file, logged, wanted, writer }));
        log.checkpoint(bitmaps).await?;
        Ok(log)
    }

    /// Opens a log file and reads what it holds; writes nothing.
    ///
    /// # Errors
    /// `InvalidImage`: it is no log file, belongs to another disk or to one of another length, or
    /// is damaged beyond what a crash does.
    pub async fn open(file: File, disk_id: [u8; 16], disk_len: u64) -> Result<(Self, Recovered)> {
        let mut headers = Vec::new();
        for slot in 0..2 {
            headers.extend(Header::parse(&read(&file, slot * PAGE_LEN as u64, PAGE_LEN).await?));
        }
        let refuse = |text: &str| Err(Error::new(ErrorKind::InvalidImage, text));
        let Some(header) = headers.into_iter().max_by_key(|header| header.epoch) else {
            return refuse("it is no log of bitmaps, or was not finished");
        };
        if header.disk_id != disk_id || header.disk_len != disk_len {
            return refuse("the log of bitmaps belongs to another disk, or its length has changed");
        }
        let file_len = file.len().map_err(|error| Error::io(error, "cannot read the log"))?;
        if header.snapshot_at + header.snapshot_len > file_len {
            return refuse("the log of bitmaps is cut short");
        }
        let snapshot_len = usize::try_from(header.snapshot_len).unwrap_or(usize::MAX);
        let bytes = read(&file, header.snapshot_at, snapshot_len).await?;
        if checksum(&bytes) != header.snapshot_checksum {
            return refuse("the snapshot of the bitmaps is damaged");
        }
        let bitmaps = parse_snapshots(&bytes, disk_len)?;
        let region_len = u32::try_from(header.region_len).expect("the parser has checked it");
        let logged = HBitmap::new(disk_len, region_len)?;
        for number in 0..header.regions().div_ceil(REGIONS) {
            let page = read(&file, page_at(number), PAGE_LEN).await?;
            LogPage::parse(&page, number, header.epoch).mark(number, &logged);
        }
        for bitmap in bitmaps.iter().filter(|bitmap| bitmap.is_enabled) {
            logged.areas(0..disk_len).for_each(|area| bitmap.bits.set(area));
        }
        let logged_bytes = logged.areas(0..disk_len).map(|area| area.end - area.start).sum();
        let end = header.snapshot_at + header.snapshot_len;
        let writer = Mutex::new(Writer { header, is_broken: false, end });
        let wanted = HBitmap::new(disk_len, region_len)?;
        let log = Self(Arc::new(Inner { file, logged, wanted, writer }));
        Ok((log, Recovered { bitmaps, logged_bytes }))
    }

    /// Whether all regions of the range are durable in the log: then the data may be written.
    #[inline]
    pub fn is_logged(&self, range: &Range<u64>) -> bool {
        self.0.is_logged(range)
    }

    /// Makes the regions of the range durable in the log, unless they are. The data may be written
    /// afterwards.
    ///
    /// # Errors
    /// The data must not be written. Those of the file; `Io`: an earlier checkpoint failed, and
    /// none succeeded since.
    pub async fn log(&self, range: Range<u64>) -> Result<()> {
        while !self.is_logged(&range) {
            let (inner, range) = (Arc::clone(&self.0), range.clone());
            bds_io::spawn(async move { inner.log(range).await }).detach_on_drop().await?;
        }
        Ok(())
    }

    /// Stores exact bitmaps, and empties the log. No write to the disk is under way, each completed
    /// one is in the bitmaps that record, and the disk was flushed after the last one: a block that
    /// a crash turns back to what it was must not count as copied. Every change of the bitmaps but
    /// the recording of writes (a clear, a new one, enabling one) takes effect in the log with the
    /// next checkpoint. Runs to its end even if its future is dropped.
    ///
    /// # Errors
    /// What is on the medium is right as before. [`IntentLog::log`] may fail, for all regions,
    /// until a checkpoint succeeds.
    pub async fn checkpoint(&self, bitmaps: &[Snapshot]) -> Result<()> {
        let bytes = snapshots_to_bytes(bitmaps)?;
        let has_len = |bitmap: &Snapshot| bitmap.bits.len() == self.0.logged.len();
        if !bitmaps.iter().all(has_len) {
            let text = "a bitmap has another length than the disk";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let inner = Arc::clone(&self.0);
        bds_io::spawn(async move { inner.checkpoint(bytes).await }).detach_on_drop().await
    }
}

impl Inner {
    fn is_logged(&self, range: &Range<u64>) -> bool {
        self.logged.next_clean(range.clone()).is_none()
    }

    async fn log(&self, range: Range<u64>) -> Result<()> {
        self.wanted.set(range.clone());
        let writer = self.writer.lock().await;
        match self.is_logged(&range) {
            true => Ok(()),
            false => self.write_wanted(&writer).await,
        }
    }

    /// Writes and flushes the pages of all regions that are wanted.
    async fn write_wanted(&self, writer: &Writer) -> Result<()> {
        if writer.is_broken {
            let text = "the log of bitmaps cannot be written: its last checkpoint failed";
            return Err(Error::new(ErrorKind::Io, text));
        }
        let len = self.wanted.len();
        let new = HBitmap::new(len, self.wanted.granularity())?;
        while let Some(area) = self.wanted.claim(0..len, u64::MAX) {
            new.set(area);
        }
        let all = new.resized(len)?;
        all.take_over(&self.logged);
        let page_len = REGIONS * u64::from(new.granularity());
        let mut at = 0;
        while let Some(dirty) = new.next_dirty(at..len) {
            let number = dirty / page_len;
            let bits = LogPage::bits_of(number, &all);
            let page = LogPage::to_page(&bits, number, writer.header.epoch);
            write(&self.file, page_at(number), page).await?;
            at = (number + 1).saturating_mul(page_len);
        }
        self.sync().await?;
        self.logged.take_over(&new);
        Ok(())
    }

    async fn checkpoint(&self, bytes: Vec<u8>) -> Result<()> {
        let mut writer = self.writer.lock().await;
        let (old, len) = (writer.header, bytes.len() as u64);
        // In front of what may be in use if it fits, else behind it.
        let start = old.log_end();
        let is_free = !writer.is_broken && start + len <= old.snapshot_at;
        let snapshot_at = if is_free { start } else { writer.end.max(start) };
        // After a failure the same slot again: the other one has the header that is right.
        let header = Header {
            epoch: old.epoch + 1,
            snapshot_at,
            snapshot_len: len,
            snapshot_checksum: checksum(&bytes),
            ..old
        };
        writer.end = writer.end.max(snapshot_at + len);
        write(&self.file, snapshot_at, bytes).await?;
        self.sync().await?;
        // From here on either header may be found after a crash, until this one is durable. So
        // nothing counts as logged, neither in the old epoch nor in the new one.
        writer.is_broken = true;
        self.logged.clear(0..u64::MAX);
        write(&self.file, header.epoch % 2 * PAGE_LEN as u64, header.to_page()).await?;
        self.sync().await?;
        *writer = Writer { header, is_broken: false, end: snapshot_at + len };
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data().await;
        synced.map_err(|error| Error::io(error, "cannot flush the log of bitmaps"))
    }
}

/// Where log page `number` is.
fn page_at(number: u64) -> u64 {
    (FIRST_LOG_PAGE + number) * PAGE_LEN as u64
}

fn no_space(error: std::io::Error) -> Error {
    Error::io(error, "cannot allocate the log of bitmaps")
}

/// Reads `len` bytes; those behind the end are zeros.
pub(super) async fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let buf = Buf::zeroed(len, PAGE_LEN).iov();
    let mut done = 0;
    while done < len {
        let part = buf.slice(done..len);
        let count = file.read(offset + done as u64, part).await;
        match count.map_err(|error| Error::io(error, "cannot read the log of bitmaps"))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(buf.to_vec(0..len))
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
