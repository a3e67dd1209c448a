//! Layout of a record's file: two headers and pages of hashes. Pure functions over bytes; whatever
//! the bytes are, they do not panic and allocate a small multiple of what they are given at most.
//!
//! ```text
//! page 0, 1   header, in turns: magic 8 · epoch 8 · record id 16 · image length 8 · chunk size, log2 4
//!             · flags 4 (1: identity, 2: must be checked) · device 8 · inode 8 · dirty bytes of the bitmap 8
//!             · four texts { length 2 · bytes }: job, source, target, bitmap · zeros … · checksum 8
//! page 2 …    two for each page of hashes, in turns: checksum 8 · record id 16 · page number 8
//!             · known 16 (bit n: chunk n) · sequence 8 · zeros 8 · 126 hashes of 32 bytes
//! ```
//! Numbers are little-endian. A hash of zeros stands for a chunk of zeros. A checksum is the
//! beginning of the BLAKE3 hash of the rest of its page. Of two pages the one with the higher
//! sequence counts; one that is torn, is of another record, or was never written says nothing.

use crate::manifest::ContentHash;

/// Bytes of a page.
pub const PAGE_LEN: usize = 4096;
/// Hashes of a page.
pub const PAGE_HASHES: usize = 126;
/// Chunks of a page.
pub const PAGE_CHUNKS: u64 = PAGE_HASHES as u64;
/// Log2 of the bytes of a chunk, the size of a manifest's.
pub const CHUNK_BITS: u32 = 16;
/// Headers.
const HEADERS: u64 = 2;
/// Longest text in a header, in bytes: what is longer is shortened, with a hash.
const MAX_TEXT: usize = 980;
const HASH_LEN: usize = 32;
const HASHES_AT: usize = 64;
const TEXTS_AT: usize = 72;
const SUM_LEN: usize = 8;
const HAS_IDENTITY: u32 = 1;
const MUST_CHECK: u32 = 2;
/// The first seven bytes name the kind of file, the last one its version.
const MAGIC: [u8; 8] = *b"bds-job\x01";

/// What a record is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Which header is newer; 1 or more.
    pub epoch: u64,
    /// Names the record.
    pub id: [u8; 16],
    /// Bytes of the image.
    pub len: u64,
    /// (device, inode) of the target's file.
    pub identity: Option<(u64, u64)>,
    /// Something else may have written to the target since: it is read, whatever the options say.
    pub must_check: bool,
    /// Dirty bytes of the source's bitmap when the header was written.
    pub bitmap_bytes: u64,
    /// Type and id of the job.
    pub job: String,
    /// File or node of the source.
    pub source: String,
    /// File or node of the target.
    pub target: String,
    /// The source's bitmap that has recorded since the record began; empty: none.
    pub bitmap: String,
}

/// What the first page of a file says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A record of this version.
    Record,
    /// A record of another version.
    OtherVersion(u8),
    /// Something else.
    Foreign,
}

impl FileKind {
    /// Looks at the beginning of either header.
    pub fn of(page: &[u8]) -> Self {
        match page.get(..8) {
            Some(start) if start == MAGIC => Self::Record,
            Some(start) if start[..7] == MAGIC[..7] => Self::OtherVersion(start[7]),
            _ => Self::Foreign,
        }
    }
}

impl RecordHeader {
    /// Its place in the file.
    pub fn slot(&self) -> u64 {
        self.epoch % HEADERS * PAGE_LEN as u64
    }

    /// The header as a page.
    pub fn to_page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_LEN);
        let (device, inode) = self.identity.unwrap_or_default();
        page.extend(MAGIC);
        page.extend(self.epoch.to_le_bytes());
        page.extend(self.id);
        page.extend(self.len.to_le_bytes());
        page.extend(CHUNK_BITS.to_le_bytes());
        let identity = if self.identity.is_some() { HAS_IDENTITY } else { 0 };
        let check = if self.must_check { MUST_CHECK } else { 0 };
        page.extend((identity | check).to_le_bytes());
        [device, inode, self.bitmap_bytes].iter().for_each(|n| page.extend(n.to_le_bytes()));
        for text in [&self.job, &self.source, &self.target, &self.bitmap] {
            let text = shortened(text);
            page.extend(u16::try_from(text.len()).expect("at most MAX_TEXT").to_le_bytes());
            page.extend(text.bytes());
        }
        page.resize(PAGE_LEN - SUM_LEN, 0);
        let sum = checksum(&page);
        page.extend(sum);
        page
    }

    /// Reads a header. `None`: it is torn, was never written, or has values that none has.
    pub fn parse(page: &[u8]) -> Option<Self> {
        let (body, sum) = page.get(..PAGE_LEN)?.split_at(PAGE_LEN - SUM_LEN);
        if FileKind::of(body) != FileKind::Record || checksum(body) != *sum {
            return None;
        }
        let flags = le32(body, 44)?;
        let mut texts = Texts { rest: body.get(TEXTS_AT..)? };
        let header = Self {
            epoch: le64(body, 8)?,
            id: body.get(16..32)?.try_into().ok()?,
            len: le64(body, 32)?,
            identity: match flags & HAS_IDENTITY {
                0 => None,
                _ => Some((le64(body, 48)?, le64(body, 56)?)),
            },
            must_check: flags & MUST_CHECK != 0,
            bitmap_bytes: le64(body, 64)?,
            job: texts.next()?,
            source: texts.next()?,
            target: texts.next()?,
            bitmap: texts.next()?,
        };
        let is_sane = (1..u64::MAX / 2).contains(&header.epoch)
            && le32(body, 40)? == CHUNK_BITS
            && header.len <= i64::MAX.unsigned_abs();
        is_sane.then_some(header)
    }

    /// Chunks of the image.
    pub fn chunks(&self) -> u64 {
        self.len.div_ceil(1 << CHUNK_BITS)
    }

    /// Pages of hashes.
    pub fn pages(&self) -> u64 {
        self.chunks().div_ceil(PAGE_CHUNKS)
    }
}

/// The texts of a header.
struct Texts<'a> {
    rest: &'a [u8],
}

impl Texts<'_> {
    fn next(&mut self) -> Option<String> {
        let (len, rest) = self.rest.split_at_checked(2)?;
        let len = usize::from(u16::from_le_bytes(len.try_into().ok()?));
        let (text, rest) = rest.split_at_checked(len)?;
        self.rest = rest;
        (len <= MAX_TEXT).then(|| String::from_utf8_lossy(text).into_owned())
    }
}

/// A text as it is stored: one that is too long keeps its end, and a hash of all of it.
pub fn shortened(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let mut start = text.len() - (MAX_TEXT - 80);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    format!("{}…{}", blake3::hash(text.as_bytes()).to_hex(), &text[start..])
}

/// What a page of hashes says: at most [`PAGE_CHUNKS`] chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPage {
    /// Number of the page, from 0.
    pub number: u64,
    /// Which version of the page is newer.
    pub sequence: u64,
    /// What each chunk holds. `None`: that is not known.
    pub hashes: Vec<Option<ContentHash>>,
}

impl RecordPage {
    /// Where both versions of page `number` are in the file.
    pub fn pair_at(number: u64) -> u64 {
        (HEADERS + 2 * number) * PAGE_LEN as u64
    }

    /// Its place in the file.
    pub fn at(&self) -> u64 {
        Self::pair_at(self.number) + self.sequence % 2 * PAGE_LEN as u64
    }

    /// One bit a chunk that is known.
    pub fn known_bits(&self) -> u128 {
        let known = (0..PAGE_CHUNKS).zip(&self.hashes).filter(|(_, hash)| hash.is_some());
        known.fold(0, |bits, (at, _)| bits | 1 << at)
    }

    /// The page as bytes, in the record `id`.
    pub fn to_bytes(&self, id: &[u8; 16]) -> Vec<u8> {
        let mut page = vec![0; PAGE_LEN];
        page[8..24].copy_from_slice(id);
        page[24..32].copy_from_slice(&self.number.to_le_bytes());
        page[32..48].copy_from_slice(&self.known_bits().to_le_bytes());
        page[48..56].copy_from_slice(&self.sequence.to_le_bytes());
        for (at, hash) in self.hashes.iter().take(PAGE_HASHES).enumerate() {
            let hash = hash.unwrap_or(ContentHash::ZERO);
            let start = HASHES_AT + at * HASH_LEN;
            page[start..start + HASH_LEN].copy_from_slice(&hash.0);
        }
        let sum = checksum(&page[SUM_LEN..]);
        page[..SUM_LEN].copy_from_slice(&sum);
        page
    }

    /// The newer of the two versions of page `number` of the record `id`. `None`: neither is valid.
    pub fn newest(pair: &[u8], id: &[u8; 16], number: u64) -> Option<Self> {
        let versions = pair.chunks(PAGE_LEN).filter_map(|page| Self::parse(page, id, number));
        versions.max_by_key(|page| page.sequence)
    }

    /// Reads page `number` of the record `id`. `None`: it says nothing.
    pub fn parse(bytes: &[u8], id: &[u8; 16], number: u64) -> Option<Self> {
        let (sum, body) = bytes.get(..PAGE_LEN)?.split_at(SUM_LEN);
        if checksum(body) != *sum || bytes[8..24] != *id || le64(bytes, 24)? != number {
            return None;
        }
        let sequence = le64(bytes, 48).filter(|sequence| *sequence < u64::MAX / 2)?;
        let known = u128::from_le_bytes(bytes.get(32..48)?.try_into().ok()?);
        let hash = |at: usize| {
            let start = HASHES_AT + at * HASH_LEN;
            let bytes = bytes.get(start..start + HASH_LEN)?;
            (known & (1 << at) != 0).then_some(ContentHash(bytes.try_into().ok()?))
        };
        Some(Self { number, sequence, hashes: (0..PAGE_HASHES).map(hash).collect() })
    }
}

pub(super) fn checksum(bytes: &[u8]) -> [u8; SUM_LEN] {
    let hash = blake3::hash(bytes);
    hash.as_bytes()[..SUM_LEN].try_into().expect("a hash is longer")
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    fn header() -> RecordHeader {
        RecordHeader {
            epoch: 3,
            id: [7; 16],
            len: 1_000_000,
            identity: Some((5, 6)),
            must_check: true,
            bitmap_bytes: 65_536,
            job: "mirror 'job0'".into(),
            source: "/a".into(),
            target: "/b".into(),
            bitmap: "since".into(),
        }
    }

    fn page() -> RecordPage {
        let hash = |at: usize| {
            let byte = u8::try_from(at).expect("small");
            (!at.is_multiple_of(3)).then_some(ContentHash([byte; 32]))
        };
        RecordPage { number: 2, sequence: 5, hashes: (0..PAGE_HASHES).map(hash).collect() }
    }

    #[test]
    fn headers_and_pages_come_back_from_their_bytes() {
        for header in [
            header(),
            RecordHeader { must_check: false, ..header() },
            RecordHeader { identity: None, bitmap: String::new(), ..header() },
        ] {
            assert_eq!(RecordHeader::parse(&header.to_page()), Some(header));
        }
        let bytes = page().to_bytes(&[7; 16]);
        assert_eq!(RecordPage::parse(&bytes, &[7; 16], 2), Some(page()));
    }

    #[test]
    fn a_changed_bit_anywhere_makes_a_page_say_nothing() {
        let (first, second) = (header().to_page(), page().to_bytes(&[7; 16]));
        assert_eq!((first.len(), second.len()), (PAGE_LEN, PAGE_LEN));
        for at in 0..PAGE_LEN {
            let change = |page: &[u8]| {
                let mut page = page.to_vec();
                page[at] ^= 0x20;
                page
            };
            assert_eq!(RecordHeader::parse(&change(&first)), None, "byte {at}");
            assert_eq!(RecordPage::parse(&change(&second), &[7; 16], 2), None, "byte {at}");
            assert_eq!(RecordPage::parse(&second[..at], &[7; 16], 2), None, "cut at {at}");
            assert_eq!(RecordHeader::parse(&first[..at]), None, "cut at {at}");
        }
    }

    #[test]
    fn pages_of_another_record_or_place_say_nothing() {
        let bytes = page().to_bytes(&[7; 16]);
        assert_eq!(RecordPage::parse(&bytes, &[8; 16], 2), None);
        assert_eq!(RecordPage::parse(&bytes, &[7; 16], 3), None);
    }

    #[test]
    fn the_newer_valid_version_of_a_page_counts() {
        let newer = RecordPage { sequence: 6, ..page() };
        let mut pair = [newer.to_bytes(&[7; 16]), page().to_bytes(&[7; 16])].concat();
        assert_eq!(RecordPage::newest(&pair, &[7; 16], 2), Some(newer.clone()));
        assert_ne!(newer.at(), page().at());
        pair[100] ^= 1;
        assert_eq!(RecordPage::newest(&pair, &[7; 16], 2), Some(page()));
        pair[PAGE_LEN + 100] ^= 1;
        assert_eq!(RecordPage::newest(&pair, &[7; 16], 2), None);
    }

    #[test]
    fn a_text_that_is_too_long_keeps_its_end_and_stays_distinct() {
        let long = |byte: &str| format!("{byte}{}/disk", "ä".repeat(2000));
        let (a, b) = (shortened(&long("a")), shortened(&long("b")));
        assert!(a.len() <= MAX_TEXT && a.ends_with("/disk") && a != b);
        assert_eq!(shortened(&a), a);
        let texts = [&a, &b, &a, &b].map(Clone::clone);
        let [job, source, target, bitmap] = texts;
        let header = RecordHeader { job, source, target, bitmap, ..header() };
        assert_eq!(header.to_page().len(), PAGE_LEN);
        assert_eq!(RecordHeader::parse(&header.to_page()), Some(header));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..9000),
            len in 0..=PAGE_LEN,
        ) {
            let mut valid = header().to_page();
            let part = &bytes[..len.min(bytes.len())];
            valid[PAGE_LEN - part.len()..].copy_from_slice(part);
            super::super::fuzzing::job_record(&bytes);
            super::super::fuzzing::job_record(&valid);
        }
    }
}
