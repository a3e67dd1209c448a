//! What fuzz targets call: a file of any bytes is opened as a job opens it. Not part of the
//! library's stable API.
//!
//! Checksums would keep a fuzzer out, so each input is tried as it is and with right ones.

use super::chunks::{ChunkMap, Known};
use super::format::{FileKind, PAGE_CHUNKS, PAGE_LEN, RecordHeader, RecordPage, checksum};
use crate::manifest::Manifest;

/// Pages that are looked at; a header may tell of many more.
const MAX_PAGES: u64 = 64;
const SUM_LEN: usize = 8;

/// The file of a record.
pub fn job_record(bytes: &[u8]) {
    open_record(bytes);
    let mut sealed = bytes.to_vec();
    for (number, page) in sealed.chunks_exact_mut(PAGE_LEN).enumerate() {
        // Headers have it at the end, pages of hashes at the beginning.
        let (at, body) = if number < 2 { (PAGE_LEN - SUM_LEN, 0) } else { (0, SUM_LEN) };
        let sum = checksum(&page[body..body + PAGE_LEN - SUM_LEN]);
        page[at..at + SUM_LEN].copy_from_slice(&sum);
    }
    open_record(&sealed);
}

fn open_record(bytes: &[u8]) {
    let pair = &bytes[..bytes.len().min(2 * PAGE_LEN)];
    let headers = pair.chunks(PAGE_LEN).filter_map(RecordHeader::parse);
    let Some(header) = headers.max_by_key(|header| header.epoch) else {
        let _kind = FileKind::of(bytes);
        return;
    };
    assert_eq!(RecordHeader::parse(&header.to_page()).as_ref(), Some(&header));
    let count = header.chunks().min(MAX_PAGES * PAGE_CHUNKS);
    let Ok(mut chunks) = ChunkMap::new(count) else { return };
    for number in 0..header.pages().min(MAX_PAGES) {
        let start = usize::try_from(RecordPage::pair_at(number)).expect("of a few pages");
        let rest = bytes.get(start..).unwrap_or_default();
        let pair = &rest[..rest.len().min(2 * PAGE_LEN)];
        let Some(page) = RecordPage::newest(pair, &header.id, number) else { continue };
        let again = RecordPage::parse(&page.to_bytes(&header.id), &header.id, number);
        assert_eq!(again.as_ref(), Some(&page));
        chunks.load(&page);
    }
    for index in chunks.inherited() {
        assert!(index < count && chunks.get(index).0 == Known::Inherited);
        chunks.confirm(index);
    }
}

/// The file of a manifest.
pub fn manifest(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), Manifest::with_right_root(bytes)] {
        if let Ok(manifest) = Manifest::parse(&bytes) {
            assert_eq!(Manifest::parse(&manifest.to_bytes()).ok(), Some(manifest));
        }
    }
}
