//! Reads a log file: what a clean end or a crash left in it. Writes nothing.

use std::sync::Arc;

use bds_io::{Buf, File};

use super::page::{
    EndState, HEADERS_LEN, Header, LogPage, MAGIC, MAX_SNAPSHOT_LEN, PAGE_LEN, Snapshot, checksum,
    parse_snapshots,
};
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};

/// What a log file holds.
#[derive(Debug)]
pub struct Found {
    /// The newest header, and the slot that it is in.
    pub header: Header,
    pub(super) slot: u64,
    /// The exact bitmaps of the last checkpoint.
    pub snapshots: Vec<Snapshot>,
    /// Regions of the log, ascending: written since then, at most.
    pub regions: Vec<u64>,
}

/// A bitmap as it has to be used after a crash.
#[derive(Debug)]
pub struct RecoveredBitmap {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it records writes.
    pub is_enabled: bool,
    /// Its dirty granules: at least what is dirty.
    pub bits: HBitmap,
    /// Bytes that are dirty beyond those of the last checkpoint: how much too much it has, at most.
    pub added_bytes: u64,
}

impl Found {
    /// Reads a log file. `None`: it is empty, or its maker did not finish it.
    ///
    /// # Errors
    /// `InvalidImage`: it is no log file, is cut short, or is damaged beyond what a crash does.
    /// Those of the file.
    pub async fn read(file: &File) -> Result<Option<Self>> {
        let file_len = file.len().map_err(|error| Error::io(error, "cannot read the log"))?;
        let head = read(file, 0, HEADERS_LEN).await?;
        let refuse = |text: &str| Err(Error::new(ErrorKind::InvalidImage, text));
        let slots = head.chunks(PAGE_LEN).map(Header::parse).zip(0_u64..);
        let newest = slots
            .filter_map(|(header, slot)| Some((header?, slot)))
            .max_by_key(|(header, _)| header.epoch);
        let Some((header, slot)) = newest else {
            return match head.iter().all(|byte| *byte == 0) || is_marked(&head) {
                true => Ok(None),
                false => refuse("it is no log of bitmaps"),
            };
        };
        if header.snapshot_range().end > file_len {
            return refuse("the log of bitmaps is cut short");
        }
        let bytes = read(file, header.snapshot_at, header.snapshot_len).await?;
        if checksum(&bytes) != header.snapshot_checksum {
            return refuse("the snapshot of the bitmaps is damaged");
        }
        let snapshots = parse_snapshots(&bytes, header.disk_len)?;
        // Also of one that was closed: if closing failed on the way, its user may have gone on.
        let regions = read_log(file, &header).await?;
        Ok(Some(Self { header, slot, snapshots, regions }))
    }

    /// Whether the bitmaps are exact: the file was closed.
    pub fn is_clean(&self) -> bool {
        self.header.end_state == EndState::Clean && self.regions.is_empty()
    }

    /// The bitmaps for a disk of `disk_len` bytes. `is_foreign`: the disk may have been changed by
    /// others, so each that records is dirty as a whole, as after a log that was given up.
    ///
    /// # Errors
    /// `LimitExceeded`: a bitmap would have more than 2^32 granules, or all together would need
    /// more than 1 GiB.
    pub fn bitmaps(&self, disk_len: u64, is_foreign: bool) -> Result<Vec<RecoveredBitmap>> {
        // The file was written for another length, perhaps, or by an attacker.
        let bytes =
            |stored: &Snapshot| disk_len.div_ceil(u64::from(stored.bits.granularity())).div_ceil(8);
        if self.snapshots.iter().map(bytes).fold(0, u64::saturating_add) > MAX_SNAPSHOT_LEN {
            let text = "the bitmaps of the log need more than 1 GiB for a disk of this length";
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        let is_all = is_foreign || self.header.end_state == EndState::GivenUp;
        let recover = |stored: &Snapshot| {
            let bits = stored.bits.resized(disk_len)?;
            let exact = bits.dirty_bytes();
            if stored.is_enabled {
                // What is longer than it was has grown since, or is not known.
                bits.set(self.header.disk_len.min(disk_len)..disk_len);
                for region in &self.regions {
                    bits.set(self.header.shape.bytes_of(*region));
                }
                if is_all {
                    bits.set_all();
                }
            }
            let added_bytes = bits.dirty_bytes() - exact;
            let (name, is_enabled) = (Arc::clone(&stored.name), stored.is_enabled);
            Ok(RecoveredBitmap { name, is_enabled, bits, added_bytes })
        };
        self.snapshots.iter().map(recover).collect()
    }
}

/// Whether bytes begin as a log file does.
fn is_marked(head: &[u8]) -> bool {
    head.chunks(PAGE_LEN).any(|page| page.starts_with(&MAGIC))
}

/// The regions in the area of the header's epoch, and those of the epoch after it, which began
/// before its header was durable.
async fn read_log(file: &File, header: &Header) -> Result<Vec<u64>> {
    let mut regions = Vec::new();
    for epoch in [header.epoch, header.epoch + 1] {
        for number in 0..header.shape.pages() {
            let page = read(file, header.page_at(epoch, number), PAGE_LEN as u64).await?;
            regions.extend(LogPage::parse(&page, number, epoch).regions(number));
        }
    }
    regions.sort_unstable();
    regions.dedup();
    Ok(regions)
}

/// Reads `len` bytes; those behind the end are zeros.
pub(super) async fn read(file: &File, offset: u64, len: u64) -> Result<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
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
