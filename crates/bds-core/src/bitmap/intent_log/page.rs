//! Layout of the log file: headers, log pages, snapshots. Pure functions over bytes; whatever the
//! bytes are, they do not panic, and allocate no more than a small multiple of what they are given.
//!
//! ```text
//! header    magic 8 · epoch 8 · disk id 16 · disk length 8 · region length 8 · snapshot at 8 · length 8
//!           · snapshot checksum 8 · zeros … · checksum 8
//! log page  epoch 8 · page number 8 · bits 4072 (bit n of byte m: region 8 m + n of the page) · checksum 8
//! snapshot  count 4 · { flags 1 (bit 0: records) · log2 granularity 1 · name length 2 · name · stream length 8 · stream }
//! ```
//! Numbers are little-endian; a checksum covers all bytes of its page before it.

use std::sync::Arc;

use crate::bitmap::{HBitmap, MAX_GRANULARITY, MIN_GRANULARITY};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page.
pub const PAGE_LEN: usize = 4096;
/// Bytes of bits in a log page.
const BITS_LEN: usize = PAGE_LEN - 24;
/// Regions of a log page.
pub const REGIONS: u64 = BITS_LEN as u64 * 8;
/// First log page.
pub const FIRST_LOG_PAGE: u64 = 2;
/// Shortest region, in bytes.
pub const MIN_REGION_LEN: u64 = 64 << 10;
/// Longest snapshot, in bytes.
const MAX_SNAPSHOT_LEN: u64 = 1 << 30;
/// Most regions.
const MAX_REGIONS: u64 = 1 << 32;

const MAGIC: [u8; 8] = *b"bds-cbt\x01";

/// A header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which header is newer; 1 or more.
    pub epoch: u64,
    /// Names the disk, as its user likes.
    pub disk_id: [u8; 16],
    /// Bytes of the disk.
    pub disk_len: u64,
    /// Bytes of a region: a power of two.
    pub region_len: u64,
    /// Place of the snapshot in the file.
    pub snapshot_at: u64,
    /// Its length in bytes.
    pub snapshot_len: u64,
    /// Its checksum.
    pub snapshot_checksum: u64,
}

impl Header {
    /// Regions of the disk.
    pub fn regions(&self) -> u64 {
        self.disk_len.div_ceil(self.region_len)
    }

    /// The first byte behind the log pages.
    pub fn log_end(&self) -> u64 {
        (FIRST_LOG_PAGE + self.regions().div_ceil(REGIONS)) * PAGE_LEN as u64
    }

    /// The header as a page.
    pub fn to_page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_LEN);
        page.extend(MAGIC);
        page.extend(self.epoch.to_le_bytes());
        page.extend(self.disk_id);
        let numbers = [
            self.disk_len,
            self.region_len,
            self.snapshot_at,
            self.snapshot_len,
            self.snapshot_checksum,
        ];
        numbers.iter().for_each(|number| page.extend(number.to_le_bytes()));
        sealed(page)
    }

    /// Reads a header. `None`: it is torn, or was never written.
    pub fn parse(page: &[u8]) -> Option<Self> {
        let body = checked(page)?;
        let header = Self {
            epoch: number(body, 8)?,
            disk_id: body.get(16..32)?.try_into().ok()?,
            disk_len: number(body, 32)?,
            region_len: number(body, 40)?,
            snapshot_at: number(body, 48)?,
            snapshot_len: number(body, 56)?,
            snapshot_checksum: number(body, 64)?,
        };
        let is_sane = body.starts_with(&MAGIC)
            && header.epoch > 0
            && header.disk_len <= 1 << 63
            && header.region_len.is_power_of_two()
            && (MIN_REGION_LEN..=u64::from(MAX_GRANULARITY)).contains(&header.region_len)
            && header.regions() <= MAX_REGIONS
            && header.snapshot_len <= MAX_SNAPSHOT_LEN
            && (header.log_end()..1 << 62).contains(&header.snapshot_at);
        is_sane.then_some(header)
    }
}

/// A log page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogPage {
    /// It belongs to another epoch, or was never written: no region.
    Empty,
    /// Its bits.
    Regions(Vec<u8>),
    /// It is torn: any of its regions may be dirty.
    Damaged,
}

impl LogPage {
    /// Reads log page `page_number` (counted from the first log page) in this epoch.
    pub fn parse(page: &[u8], page_number: u64, epoch: u64) -> Self {
        if page.len() == PAGE_LEN && page.iter().all(|byte| *byte == 0) {
            return Self::Empty;
        }
        let body = checked(page).filter(|body| number(body, 8) == Some(page_number));
        let Some(body) = body else { return Self::Damaged };
        match number(body, 0) {
            Some(found) if found == epoch => Self::Regions(body[16..].to_vec()),
            // Pages of the future would be a header that was lost: too much is right.
            Some(found) if found < epoch => Self::Empty,
            _ => Self::Damaged,
        }
    }

    /// The page of these bits, of which there are as many as a page holds.
    pub fn to_page(bits: &[u8], page_number: u64, epoch: u64) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_LEN);
        page.extend(epoch.to_le_bytes());
        page.extend(page_number.to_le_bytes());
        page.extend(&bits[..bits.len().min(BITS_LEN)]);
        sealed(page)
    }

    /// Marks the regions of this page in `regions`, whose granules are regions.
    pub fn mark(&self, page_number: u64, regions: &HBitmap) {
        let first_byte = page_number.saturating_mul(BITS_LEN as u64);
        match self {
            Self::Empty => {}
            Self::Regions(bits) => regions.merge_stream(first_byte, bits),
            Self::Damaged => regions.merge_stream(first_byte, &[0xff; BITS_LEN]),
        }
    }

    /// The bits of this page as `regions` has them.
    pub fn bits_of(page_number: u64, regions: &HBitmap) -> Vec<u8> {
        let mut bits = vec![0; BITS_LEN];
        regions.read_stream(page_number * BITS_LEN as u64, &mut bits);
        bits
    }
}

/// A bitmap in a snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it records writes.
    pub is_enabled: bool,
    /// Its dirty granules.
    pub bits: Arc<HBitmap>,
}

/// The snapshots as bytes.
///
/// # Errors
/// `LimitExceeded`: too many, too long.
pub fn snapshots_to_bytes(all: &[Snapshot]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let too_long = |_| Error::new(ErrorKind::LimitExceeded, "too many bitmaps, or too long a name");
    bytes.extend(u32::try_from(all.len()).map_err(too_long)?.to_le_bytes());
    for Snapshot { name, is_enabled, bits } in all {
        let shift = bits.granularity().trailing_zeros().to_le_bytes()[0];
        bytes.extend([u8::from(*is_enabled), shift]);
        bytes.extend(u16::try_from(name.len()).map_err(too_long)?.to_le_bytes());
        bytes.extend(name.as_bytes());
        let len = usize::try_from(bits.stream_len()).unwrap_or(usize::MAX);
        bytes.extend(bits.stream_len().to_le_bytes());
        let start = bytes.len();
        if (start as u64).saturating_add(bits.stream_len()) > MAX_SNAPSHOT_LEN {
            let text = "the bitmaps take more than 1 GiB; use larger granularities";
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        bytes.resize(start + len, 0);
        bits.read_stream(0, &mut bytes[start..]);
    }
    Ok(bytes)
}

/// Reads snapshots of a disk of this length.
///
/// # Errors
/// `InvalidImage`.
pub fn parse_snapshots(bytes: &[u8], disk_len: u64) -> Result<Vec<Snapshot>> {
    let mut reader = Reader(bytes);
    let read = |reader: &mut Reader<'_>| -> Option<Vec<Snapshot>> {
        let count = u32::from_le_bytes(reader.take(4)?.try_into().ok()?);
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(reader.snapshot(disk_len)?);
        }
        Some(all)
    };
    let all = read(&mut reader).filter(|_| reader.0.is_empty());
    all.ok_or_else(|| Error::new(ErrorKind::InvalidImage, "the snapshot of the bitmaps is broken"))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn snapshot(&mut self, disk_len: u64) -> Option<Snapshot> {
        let &[flags, shift] = self.take(2)? else { return None };
        let granularity = 1_u32.checked_shl(shift.into()).filter(|it| *it >= MIN_GRANULARITY)?;
        if granularity > MAX_GRANULARITY || flags > 1 {
            return None;
        }
        let name_len = u16::from_le_bytes(self.take(2)?.try_into().ok()?);
        let name = std::str::from_utf8(self.take(name_len.into())?).ok()?.into();
        let stream_len = u64::from_le_bytes(self.take(8)?.try_into().ok()?);
        // Before anything is allocated: the stream is there.
        let stream = self.take(usize::try_from(stream_len).ok()?)?;
        if disk_len.div_ceil(granularity.into()).div_ceil(8) != stream_len {
            return None;
        }
        let bits = HBitmap::new(disk_len, granularity).ok()?;
        bits.merge_stream(0, stream);
        Some(Snapshot { name, is_enabled: flags & 1 != 0, bits: Arc::new(bits) })
    }
}

/// Fills a page with zeros and puts the checksum behind.
fn sealed(mut page: Vec<u8>) -> Vec<u8> {
    page.resize(PAGE_LEN - 8, 0);
    page.extend(checksum(&page).to_le_bytes());
    page
}

/// The bytes before the checksum, if it is right.
fn checked(page: &[u8]) -> Option<&[u8]> {
    let body = page.get(..PAGE_LEN - 8).filter(|_| page.len() == PAGE_LEN)?;
    (number(page, PAGE_LEN - 8)? == checksum(body)).then_some(body)
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// FNV-1a over words, mixed at the end: it detects torn and lost sectors, not forgeries.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for word in bytes.chunks(8) {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        sum = (sum ^ u64::from_le_bytes(padded)).wrapping_mul(0x0000_0100_0000_01b3);
        // Without this, the highest bits of a word would reach no others.
        sum ^= sum >> 29;
    }
    sum ^ bytes.len() as u64
}
