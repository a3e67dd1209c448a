//! Layout of the log file: headers, log pages, snapshots. Pure functions over bytes; whatever the
//! bytes are, they do not panic, and allocate no more than a small multiple of what they are given.
//!
//! ```text
//! header    magic 8 · epoch 8 · disk id 16 · disk length 8 · region length 8 · pages of an area 8
//!           · log at 8 · snapshot at 8 · length 8 · checksum 8 · end state 8 · inode 8 · modified 8
//!           · zeros … · checksum 8
//! log page  epoch 8 · page number 8 · bits 4072 (bit n of byte m: region 8 m + n of the page) · checksum 8
//! snapshot  count 4 · { flags 1 (bit 0: records) · log2 granularity 1 · name length 2 · name · stream length 8 · stream }
//! ```
//! Numbers are little-endian; a checksum covers all bytes of its page before it.

use std::ops::Range;
use std::sync::Arc;

use crate::bitmap::{HBitmap, MAX_GRANULARITY, MIN_GRANULARITY};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page.
pub const PAGE_LEN: usize = 4096;
/// Bytes of bits in a log page.
pub const BITS_LEN: usize = PAGE_LEN - 24;
/// Regions of a log page.
pub const REGIONS: u64 = BITS_LEN as u64 * 8;
/// First byte behind the headers.
pub const HEADERS_LEN: u64 = 2 * PAGE_LEN as u64;
/// Shortest region, in bytes.
pub const MIN_REGION_LEN: u64 = 64 << 10;
/// Most pages of one area.
pub const MAX_PAGES: u64 = 64;
/// Longest snapshot, in bytes.
pub const MAX_SNAPSHOT_LEN: u64 = 1 << 30;

/// The first bytes of a log file.
pub const MAGIC: [u8; 8] = *b"bds-cbt\x02";

/// Length and number of the regions of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    region_len: u64,
    pages: u64,
}

impl Shape {
    /// For a disk of `disk_len` bytes: regions of 4 MiB, longer for disks above 512 GiB, and space
    /// to grow to twice the length before the last region stands for the rest.
    pub fn for_disk(disk_len: u64) -> Self {
        let wanted = (disk_len >> 17).max(4 << 20).min(u64::from(MAX_GRANULARITY));
        let region_len = wanted.next_power_of_two();
        let regions = disk_len.div_ceil(region_len).saturating_mul(2);
        Self { region_len, pages: regions.div_ceil(REGIONS).clamp(1, MAX_PAGES) }
    }

    /// `None`: the region's length is no power of two from 64 KiB to 2 GiB, or there are no pages,
    /// or more than [`MAX_PAGES`].
    pub fn new(region_len: u64, pages: u64) -> Option<Self> {
        let is_len = region_len.is_power_of_two()
            && (MIN_REGION_LEN..=u64::from(MAX_GRANULARITY)).contains(&region_len);
        (is_len && (1..=MAX_PAGES).contains(&pages)).then_some(Self { region_len, pages })
    }

    /// Bytes of a region: a power of two.
    pub fn region_len(self) -> u64 {
        self.region_len
    }

    /// Log pages of an area.
    pub fn pages(self) -> u64 {
        self.pages
    }

    /// Number of regions: a multiple of 64.
    pub fn regions(self) -> u64 {
        self.pages * REGIONS
    }

    /// Bytes of both areas.
    pub fn log_len(self) -> u64 {
        2 * self.pages * PAGE_LEN as u64
    }

    /// The bytes of a disk that a region stands for.
    pub fn bytes_of(self, region: u64) -> Range<u64> {
        let start = region.saturating_mul(self.region_len);
        let is_last = region + 1 >= self.regions();
        start..if is_last { u64::MAX } else { start.saturating_add(self.region_len) }
    }
}

/// How the last user of the file left it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndState {
    /// It is in use, or its user crashed: the log counts.
    Open,
    /// It was closed: the snapshot is exact.
    Clean,
    /// The log could not be kept: everything may be dirty.
    GivenUp,
}

/// What ties a file to a disk that has no place for an id of its own. Zero: not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tie {
    /// The disk's inode.
    pub inode: u64,
    /// When the disk was last changed, in nanoseconds since 1970, at a clean close.
    pub modified_ns: u64,
}

/// A header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which header is newer; 1 or more.
    pub epoch: u64,
    /// Names the disk or the session, as its user likes.
    pub disk_id: [u8; 16],
    /// Bytes of the disk.
    pub disk_len: u64,
    /// Its regions.
    pub shape: Shape,
    /// Place of the log in the file.
    pub log_at: u64,
    /// Place of the snapshot in the file.
    pub snapshot_at: u64,
    /// Its length in bytes.
    pub snapshot_len: u64,
    /// Its checksum.
    pub snapshot_checksum: u64,
    /// How the file was left.
    pub end_state: EndState,
    /// Which disk it belongs to.
    pub tie: Tie,
}

impl Header {
    /// Where log page `number` of an epoch is.
    pub fn page_at(&self, epoch: u64, number: u64) -> u64 {
        self.log_at + (epoch % 2 * self.shape.pages + number) * PAGE_LEN as u64
    }

    /// The bytes of the log.
    pub fn log_range(&self) -> Range<u64> {
        self.log_at..self.log_at + self.shape.log_len()
    }

    /// The bytes of the snapshot.
    pub fn snapshot_range(&self) -> Range<u64> {
        self.snapshot_at..self.snapshot_at + self.snapshot_len
    }

    /// The header as a page.
    pub fn to_page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_LEN);
        page.extend(MAGIC);
        page.extend(self.epoch.to_le_bytes());
        page.extend(self.disk_id);
        let end_state = match self.end_state {
            EndState::Open => 0,
            EndState::Clean => 1,
            EndState::GivenUp => 2,
        };
        let numbers = [
            self.disk_len,
            self.shape.region_len,
            self.shape.pages,
            self.log_at,
            self.snapshot_at,
            self.snapshot_len,
            self.snapshot_checksum,
            end_state,
            self.tie.inode,
            self.tie.modified_ns,
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
            shape: Shape::new(number(body, 40)?, number(body, 48)?)?,
            log_at: number(body, 56)?,
            snapshot_at: number(body, 64)?,
            snapshot_len: number(body, 72)?,
            snapshot_checksum: number(body, 80)?,
            end_state: match number(body, 88)? {
                0 => EndState::Open,
                1 => EndState::Clean,
                2 => EndState::GivenUp,
                _ => return None,
            },
            tie: Tie { inode: number(body, 96)?, modified_ns: number(body, 104)? },
        };
        let places = HEADERS_LEN..1 << 62;
        let is_sane = body.starts_with(&MAGIC)
            && (1..1 << 62).contains(&header.epoch)
            && header.disk_len <= 1 << 63
            && header.snapshot_len <= MAX_SNAPSHOT_LEN
            && places.contains(&header.log_at)
            && places.contains(&header.snapshot_at)
            && !overlap(&header.log_range(), &header.snapshot_range());
        is_sane.then_some(header)
    }
}

/// Whether two ranges of bytes have a byte in common.
pub fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// A log page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogPage {
    /// It belongs to an earlier epoch, or was never written: no region.
    Empty,
    /// Its bits.
    Regions(Vec<u8>),
    /// It is torn: any of its regions may be dirty.
    Damaged,
}

impl LogPage {
    /// Reads log page `page_number` (counted from the area's first page) of this epoch.
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

    /// Page `page_number` of a log whose regions are these words.
    pub fn to_page(words: &[u64], page_number: u64, epoch: u64) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_LEN);
        page.extend(epoch.to_le_bytes());
        page.extend(page_number.to_le_bytes());
        let bits = words_of(words, page_number).iter().flat_map(|word| word.to_le_bytes());
        page.extend(bits);
        sealed(page)
    }

    /// The regions of this page, as numbers.
    pub fn regions(&self, page_number: u64) -> impl Iterator<Item = u64> + use<'_> {
        let bits = match self {
            Self::Empty => &[][..],
            Self::Regions(bits) => bits,
            Self::Damaged => &[0xff; BITS_LEN],
        };
        (0_u64..).zip(bits).flat_map(move |(at, byte)| {
            let first = page_number * REGIONS + at * 8;
            (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| first + bit)
        })
    }
}

/// The words of one page.
pub fn words_of(words: &[u64], page_number: u64) -> &[u64] {
    let len = BITS_LEN / 8;
    let start = usize::try_from(page_number).unwrap_or(usize::MAX).saturating_mul(len);
    words.get(start..start.saturating_add(len)).unwrap_or_default()
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

/// Puts the right checksum behind a whole page: for tests and fuzzers.
#[doc(hidden)]
pub fn reseal(page: &mut [u8]) {
    if page.len() == PAGE_LEN {
        let sum = checksum(&page[..PAGE_LEN - 8]);
        page[PAGE_LEN - 8..].copy_from_slice(&sum.to_le_bytes());
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
