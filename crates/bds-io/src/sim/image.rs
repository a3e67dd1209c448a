//! `Image`: the bytes of one simulated file, as sparse pages and a length.
//!
//! Arithmetic over a map only; no time, no randomness, no durability (that is [`super::journal`]).
//! A clone shares its pages until one side writes.
//!
//! Invariant: no page begins at or past the length unless a fallocate reserved it there on purpose;
//! bytes between the length and the end of its page are zero.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::file::Extent;

/// Unit of allocation, in bytes.
pub(super) const PAGE_LEN: u64 = 4096;
const PAGE_BYTES: usize = 4096;

#[derive(Clone)]
enum Page {
    Data(Arc<[u8; PAGE_BYTES]>),
    /// Allocated but unwritten: reads as zeros, looks like a hole, counts as used space.
    Reserved,
}

/// Sparse content.
#[derive(Clone, Default)]
pub(super) struct Image {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

/// A part of one page: its number, and the bytes of it that a range covers.
struct Part {
    page: u64,
    bytes: Range<usize>,
}

impl Part {
    fn is_whole(&self) -> bool {
        self.bytes.len() == PAGE_BYTES
    }
}

/// Cuts `range` at page borders.
fn parts(range: Range<u64>) -> impl Iterator<Item = Part> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let page = at / PAGE_LEN;
        let stop = range.end.min((page + 1).saturating_mul(PAGE_LEN));
        let part = Part { page, bytes: in_page(at)..in_page(at) + small(stop - at) };
        at = stop;
        Some(part)
    })
}

fn in_page(offset: u64) -> usize {
    small(offset % PAGE_LEN)
}

fn small(len: u64) -> usize {
    usize::try_from(len).expect("at most one page")
}

impl Image {
    /// A file with this content; pages of zeros become holes.
    pub(super) fn from_bytes(bytes: &[u8]) -> Image {
        let mut image = Image { pages: BTreeMap::new(), len: bytes.len() as u64 };
        for (number, chunk) in (0u64..).zip(bytes.chunks(PAGE_BYTES)) {
            if chunk.iter().any(|byte| *byte != 0) {
                let mut page = [0; PAGE_BYTES];
                page[..chunk.len()].copy_from_slice(chunk);
                image.pages.insert(number, Page::Data(Arc::new(page)));
            }
        }
        image
    }

    /// The whole content. Panics if it does not fit memory (a test's mistake).
    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("a test image fits memory")];
        self.scan(0..self.len, |at, data, _| {
            if let Some(data) = data {
                bytes[at..at + data.len()].copy_from_slice(data);
            }
        });
        bytes
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of allocated pages.
    pub(super) fn allocated_len(&self) -> u64 {
        self.pages.len() as u64 * PAGE_LEN
    }

    /// Calls `see` with each piece of `range` in order: its position from the start of the range,
    /// its bytes (`None`: zeros) and its length.
    pub(super) fn scan(&self, range: Range<u64>, mut see: impl FnMut(usize, Option<&[u8]>, usize)) {
        let mut at = 0;
        for part in parts(range) {
            let len = part.bytes.len();
            match self.pages.get(&part.page) {
                Some(Page::Data(data)) => see(at, Some(&data[part.bytes]), len),
                _ => see(at, None, len),
            }
            at += len;
        }
    }

    /// Fills `out` with the bytes at `offset`; zeros past the end.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        self.scan(offset..offset + out.len() as u64, |at, data, _| {
            if let Some(data) = data {
                out[at..at + data.len()].copy_from_slice(data);
            }
        });
    }

    /// Replaces bytes, extending the file where needed.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let mut rest = data;
        for part in parts(offset..end) {
            let (now, later) = rest.split_at(part.bytes.len());
            rest = later;
            self.page_mut(part.page)[part.bytes].copy_from_slice(now);
        }
        self.len = self.len.max(end);
    }

    /// Zeros a range and allocates it (`FALLOC_FL_ZERO_RANGE`), extending the file where needed.
    pub(super) fn zero_allocate(&mut self, range: Range<u64>) {
        self.len = self.len.max(range.end);
        for part in parts(range) {
            if part.is_whole() {
                self.pages.insert(part.page, Page::Reserved);
            } else {
                self.clear(part);
            }
        }
    }

    /// Allocates what is missing in a range (`fallocate` mode 0), extending the file where needed.
    pub(super) fn allocate(&mut self, range: Range<u64>) {
        self.len = self.len.max(range.end);
        for part in parts(range) {
            self.pages.entry(part.page).or_insert(Page::Reserved);
        }
    }

    /// Makes holes of whole pages and zeros of the rest; the length stays.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        let first_whole = range.start.div_ceil(PAGE_LEN);
        let end_whole = range.end / PAGE_LEN;
        if first_whole >= end_whole {
            parts(range).for_each(|part| self.clear(part));
            return;
        }
        parts(range.start..first_whole * PAGE_LEN).for_each(|part| self.clear(part));
        parts(end_whole * PAGE_LEN..range.end).for_each(|part| self.clear(part));
        let punched: Vec<u64> =
            self.pages.range(first_whole..end_whole).map(|(at, _)| *at).collect();
        for page in punched {
            self.pages.remove(&page);
        }
    }

    /// Cuts or extends the file; what is cut off is gone, what is added is a hole.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.cut(len);
        }
        self.len = len;
    }

    /// Drops all content from `offset` on but keeps the length.
    pub(super) fn cut(&mut self, offset: u64) {
        let _cut_off = self.pages.split_off(&offset.div_ceil(PAGE_LEN));
        let tail = in_page(offset);
        if tail != 0 {
            self.clear(Part { page: offset / PAGE_LEN, bytes: tail..PAGE_BYTES });
        }
    }

    /// Bytes a write or allocation of `range` may cover, from its start, before more than `free`
    /// bytes of new pages are needed.
    pub(super) fn fits(&self, range: Range<u64>, free: u64) -> u64 {
        let mut pages_left = free / PAGE_LEN;
        let mut covered = 0;
        for part in parts(range) {
            if !self.pages.contains_key(&part.page) {
                if pages_left == 0 {
                    break;
                }
                pages_left -= 1;
            }
            covered += part.bytes.len() as u64;
        }
        covered
    }

    /// What begins at `offset` and how long it is; `None` at or past the end.
    pub(super) fn extent(&self, offset: u64) -> Option<Extent> {
        if offset >= self.len {
            return None;
        }
        let first = offset / PAGE_LEN;
        let is_data = matches!(self.pages.get(&first), Some(Page::Data(_)));
        let mut end = first + 1;
        if is_data {
            while matches!(self.pages.get(&end), Some(Page::Data(_))) {
                end += 1;
            }
        } else {
            let next = self.pages.range(end..).find(|(_, page)| matches!(page, Page::Data(_)));
            end = next.map_or(u64::MAX / PAGE_LEN, |(at, _)| *at);
        }
        Some(Extent { is_data, len: (end * PAGE_LEN).min(self.len) - offset })
    }

    /// Writes of data pages for an export: offset and bytes, cut at the length.
    pub(super) fn data(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().filter_map(|(number, page)| match page {
            Page::Data(data) if number * PAGE_LEN < self.len => {
                let offset = number * PAGE_LEN;
                Some((offset, &data[..small((self.len - offset).min(PAGE_LEN))]))
            }
            _ => None,
        })
    }

    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE_BYTES] {
        let page = self.pages.entry(number).or_insert(Page::Reserved);
        if let Page::Reserved = page {
            *page = Page::Data(Arc::new([0; PAGE_BYTES]));
        }
        match page {
            Page::Data(data) => Arc::make_mut(data),
            Page::Reserved => unreachable!("made data just above"),
        }
    }

    fn clear(&mut self, part: Part) {
        if let Some(Page::Data(data)) = self.pages.get_mut(&part.page) {
            Arc::make_mut(data)[part.bytes].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_assert_eq, prop_oneof, proptest};

    use super::super::world::to_index;
    use super::{Image, PAGE_LEN};

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, Vec<u8>),
        Zero(u64, u64),
        Punch(u64, u64),
        Allocate(u64, u64),
        SetLen(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let at = || 0..20_000u64;
        prop_oneof![
            (at(), vec(any::<u8>(), 1..6000)).prop_map(|(at, data)| Step::Write(at, data)),
            (at(), at()).prop_map(|(at, len)| Step::Zero(at, len)),
            (at(), at()).prop_map(|(at, len)| Step::Punch(at, len)),
            (at(), at()).prop_map(|(at, len)| Step::Allocate(at, len)),
            at().prop_map(Step::SetLen),
        ]
    }

    fn fill(model: &mut [u8], at: u64, len: u64) {
        let end = (at + len).min(model.len() as u64);
        if at < end {
            model[to_index(at)..to_index(end)].fill(0);
        }
    }

    proptest! {
        /// Content as in a vector, extents that cover the file, data only where pages are.
        #[test]
        fn an_image_is_a_vector_with_holes(steps in vec(step(), 1..24)) {
            let mut image = Image::default();
            let mut model: Vec<u8> = Vec::new();
            let grow = |model: &mut Vec<u8>, end: u64| {
                let end = to_index(end);
                if model.len() < end {
                    model.resize(end, 0);
                }
            };
            for step in steps {
                match step {
                    Step::Write(at, data) => {
                        image.write(at, &data);
                        grow(&mut model, at + data.len() as u64);
                        let start = to_index(at);
                        model[start..start + data.len()].copy_from_slice(&data);
                    }
                    Step::Zero(at, len) => {
                        image.zero_allocate(at..at + len);
                        grow(&mut model, at + len);
                        fill(&mut model, at, len);
                    }
                    Step::Punch(at, len) => {
                        image.punch(at..at + len);
                        fill(&mut model, at, len);
                    }
                    Step::Allocate(at, len) => {
                        image.allocate(at..at + len);
                        grow(&mut model, at + len);
                    }
                    Step::SetLen(len) => {
                        image.set_len(len);
                        model.resize(to_index(len), 0);
                    }
                }
                prop_assert_eq!(image.len(), model.len() as u64);
                prop_assert_eq!(&image.to_vec(), &model);
                let mut at = 0;
                while let Some(extent) = image.extent(at) {
                    let range = to_index(at)
                        ..to_index(at + extent.len);
                    if !extent.is_data {
                        prop_assert_eq!(model[range].iter().find(|byte| **byte != 0), None);
                    }
                    at += extent.len;
                }
                prop_assert_eq!(at, image.len());
                prop_assert_eq!(image.fits(0..1 << 20, 0) % PAGE_LEN, 0);
            }
            prop_assert_eq!(&Image::from_bytes(&model).to_vec(), &model);
        }
    }
}
