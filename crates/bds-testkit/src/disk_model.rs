//! Models a disk as a list of sectors, each with the set of contents that a read may return.
//!
//! A completed write leaves one content. After a failed, cancelled or interrupted request it is one
//! of several; a read decides which. For a power cut every sector also has its content at the last
//! flush and all contents since: any of these may remain afterwards, and nothing else.
//!
//! One exception, which a format may document: bytes of an unflushed write *to a new place* may
//! show the old content of that place. [`DiskModel::expect_stale`] allows it, for sectors that such
//! a write covers and only for these.

use std::sync::Arc;

use crate::workload::{Op, SECTOR};

const LEN: usize = 512;
/// More contents than this for one sector: the workload races too much to be modelled.
const MAX_CONTENTS: usize = 256;

type Content = Arc<[u8; LEN]>;

#[derive(Clone, Debug)]
struct Sector {
    /// Contents that a read may return now; empty: not known.
    visible: Vec<Content>,
    /// Content at the last flush.
    flushed: Vec<Content>,
    /// Contents written since.
    since: Vec<Content>,
    /// A request was interrupted: bytes may be mixed.
    is_mixed: bool,
    /// Written in full as data before the last flush, and only written since: its place in the
    /// image is not freed.
    is_settled: bool,
    /// Written in full as data since the last change of another kind.
    is_data: bool,
    /// An unflushed request may have given it a new place.
    may_be_stale: bool,
}

impl Sector {
    fn holding(content: Content) -> Self {
        Self {
            visible: vec![Arc::clone(&content)],
            flushed: vec![content],
            since: Vec::new(),
            is_mixed: false,
            is_settled: false,
            is_data: false,
            may_be_stale: false,
        }
    }
}

/// A model of a disk and its possible contents.
#[derive(Clone, Debug)]
pub struct DiskModel {
    sectors: Vec<Sector>,
    len: u64,
    /// Length at the last flush.
    flushed_len: u64,
    /// Zero writes of these units need no bytes of data.
    zero_unit: Option<u64>,
    allows_stale: bool,
    stale_seen: u64,
    zero: Content,
}

/// Result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It succeeded.
    Done,
    /// It failed or was dropped: none, all or a part of it may have happened.
    Partly,
}

impl DiskModel {
    /// Makes a model of `len` bytes that may grow to `max_len`, showing `base` and then zeros
    /// (`base` is not shown past `len`).
    pub fn new(len: u64, max_len: u64, base: &[u8]) -> Self {
        let zero: Content = Arc::new([0; LEN]);
        let count = usize::try_from(max_len.max(len).div_ceil(SECTOR)).unwrap_or(usize::MAX);
        let shown = base.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        let mut sectors = vec![Sector::holding(Arc::clone(&zero)); count];
        for (sector, bytes) in sectors.iter_mut().zip(base[..shown].chunks(LEN)) {
            *sector = Sector::holding(content_of(bytes));
        }
        Self {
            sectors,
            len,
            flushed_len: len,
            zero_unit: None,
            allows_stale: false,
            stale_seen: 0,
            zero,
        }
    }

    /// Zero writes of whole units change metadata only; any other zero write may write bytes.
    pub fn zeroes_by(&mut self, unit: u64) {
        self.zero_unit = Some(unit);
    }

    /// After a power cut, sectors that an unflushed write covered may show the old content of their
    /// new place.
    pub fn expect_stale(&mut self) {
        self.allows_stale = true;
    }

    /// Number of sectors that did, so far.
    pub fn stale_seen(&self) -> u64 {
        self.stale_seen
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Starts these requests, together. From now on a power cut may leave any of their effects.
    pub fn begin(&mut self, ops: &[Op]) {
        for index in touched(ops) {
            let mine = ops_on(ops, index);
            let starts = all_of(&self.sectors[index]);
            let reach = self.reachable(&starts, index, &mine);
            let is_new_place = mine.iter().any(|op| self.needs_place(op, index));
            let sector = &mut self.sectors[index];
            reach.into_iter().for_each(|content| add(&mut sector.since, content));
            sector.may_be_stale |= is_new_place;
        }
    }

    /// Ends these requests. The order in which overlapping ones happened is not known.
    pub fn end(&mut self, ops: &[Op], ended: &[Ended]) {
        for index in touched(ops) {
            let mine: Vec<(&Op, Ended)> = ops
                .iter()
                .zip(ended)
                .filter(|(op, _)| touches(op, index))
                .map(|(op, ended)| (op, *ended))
                .collect();
            let mut outcomes = Vec::new();
            for start in self.sectors[index].visible.clone() {
                self.outcomes(start, index, &mine, &mut outcomes);
            }
            let is_whole_data = mine
                .iter()
                .all(|(op, ended)| matches!(op, Op::Write { .. }) && *ended == Ended::Done)
                && mine.iter().any(|(op, _)| covers(op, index));
            let keeps_place =
                mine.iter().all(|(op, _)| matches!(op, Op::Write { .. } | Op::Read { .. }));
            let sector = &mut self.sectors[index];
            sector.visible = outcomes;
            sector.is_mixed |= mine.iter().any(|(_, ended)| *ended == Ended::Partly);
            sector.is_data = is_whole_data || (sector.is_data && keeps_place);
            sector.is_settled &= keeps_place;
        }
        for (op, ended) in ops.iter().zip(ended) {
            let is_fua = matches!(op, Op::Write { fua: true, .. } | Op::Zero { fua: true, .. });
            if is_fua && *ended == Ended::Done {
                self.made_durable(op, ops);
            }
        }
    }

    /// Makes a completed request durable where it wrote.
    fn made_durable(&mut self, op: &Op, all: &[Op]) {
        for index in touched(std::slice::from_ref(op)) {
            // Requests that raced with it may have come first or last.
            if ops_on(all, index).len() > 1 {
                continue;
            }
            let starts = all_of(&self.sectors[index]);
            let mut flushed = Vec::new();
            starts.iter().for_each(|start| add(&mut flushed, self.apply(start, index, op)));
            let sector = &mut self.sectors[index];
            sector.flushed = flushed;
            sector.since.clear();
            if covers(op, index) {
                sector.may_be_stale = false;
                sector.is_settled = sector.is_data;
            }
        }
    }

    /// A flush succeeded that began after everything up to now had completed.
    pub fn flushed(&mut self) {
        self.flushed_len = self.len;
        for sector in &mut self.sectors {
            sector.flushed.clone_from(&sector.visible);
            sector.since.clear();
            sector.may_be_stale = false;
            sector.is_settled = sector.is_data;
            sector.is_mixed &= sector.visible.len() > 1;
        }
    }

    /// Sets the length.
    pub fn set_len(&mut self, len: u64) {
        self.len = len;
    }

    /// Compares the result of a read at `at`, and narrows what was ambiguous.
    ///
    /// # Errors
    /// Names the byte, its value and the expected one.
    pub fn check_read(&mut self, at: u64, bytes: &[u8]) -> Result<(), String> {
        let end = at + bytes.len() as u64;
        for index in range_of(at, bytes.len() as u64) {
            let (first, last) = part(index, at, end);
            let start = index as u64 * SECTOR;
            let found =
                &bytes[to_usize(start + first as u64 - at)..to_usize(start + last as u64 - at)];
            let sector = &mut self.sectors[index];
            let fits = |content: &Content| content[first..last] == *found;
            if sector.visible.is_empty() {
                continue;
            }
            if sector.visible.iter().any(fits) {
                sector.visible.retain(fits);
            } else if sector.is_mixed && is_mix(&sector.visible, first, found) {
                apply_mix(sector, first, found);
            } else {
                return Err(self.mismatch(index, first, found, &self.sectors[index].visible));
            }
        }
        Ok(())
    }

    /// Checks length and content after a power cut, and takes them as durable content from now on.
    /// `None`: that sector could not be read.
    ///
    /// # Errors
    /// Names the byte, its value and the expected one.
    pub fn check_crash(&mut self, len: u64, bytes: &[Option<[u8; LEN]>]) -> Result<(), String> {
        if len < self.flushed_len {
            return Err(format!("the disk is {len} bytes long, {} were flushed", self.flushed_len));
        }
        let shown = to_usize(len.div_ceil(SECTOR));
        if bytes.len() < shown {
            return Err(format!("{} sectors were read of a disk of {len} bytes", bytes.len()));
        }
        for (index, found) in bytes.iter().take(shown).enumerate() {
            self.check_survivor(index, *found)?;
        }
        for sector in self.sectors.iter_mut().skip(shown) {
            *sector = Sector::holding(Arc::clone(&self.zero));
        }
        self.len = len;
        self.flushed_len = len;
        Ok(())
    }

    fn check_survivor(&mut self, index: usize, found: Option<[u8; LEN]>) -> Result<(), String> {
        let sector = &self.sectors[index];
        if sector.visible.is_empty() {
            self.sectors[index] = after_crash(found, &self.zero);
            return Ok(());
        }
        let allowed = all_of(sector);
        let is_allowed = found.is_some_and(|found| {
            allowed.iter().any(|content| **content == found)
                || (sector.is_mixed && is_mix(&allowed, 0, &found))
        });
        if !is_allowed {
            if !(self.allows_stale && sector.may_be_stale) {
                return Err(match found {
                    Some(found) => self.mismatch(index, 0, &found, &allowed),
                    None => {
                        format!("sector {index} (byte {:#x}) cannot be read", index as u64 * SECTOR)
                    }
                });
            }
            self.stale_seen += 1;
        }
        self.sectors[index] = after_crash(found, &self.zero);
        Ok(())
    }

    /// The content of a sector after a request.
    fn apply(&self, content: &Content, index: usize, op: &Op) -> Content {
        let Some((at, len)) = op.range() else { return Arc::clone(content) };
        let (first, last) = part(index, at, at + len);
        let from = to_usize((index as u64 * SECTOR + first as u64).saturating_sub(at));
        match op {
            Op::Write { bytes, .. } | Op::Compressed { bytes, .. } => {
                let mut new = **content;
                new[first..last].copy_from_slice(&bytes[from..from + (last - first)]);
                Arc::new(new)
            }
            Op::Zero { .. } | Op::Discard { .. } => {
                if last - first == LEN {
                    return Arc::clone(&self.zero);
                }
                let mut new = **content;
                new[first..last].fill(0);
                Arc::new(new)
            }
            Op::Read { .. } | Op::Flush | Op::Grow { .. } => Arc::clone(content),
        }
    }

    /// All contents that some of these requests, in some order, can leave in a sector.
    fn reachable(&self, starts: &[Content], index: usize, ops: &[&Op]) -> Vec<Content> {
        let mut found = starts.to_vec();
        let mut next = 0;
        while next < found.len() {
            let content = Arc::clone(&found[next]);
            ops.iter().for_each(|op| add(&mut found, self.apply(&content, index, op)));
            next += 1;
            assert!(found.len() < MAX_CONTENTS, "too many requests race for sector {index}");
        }
        found
    }

    /// Applies every order of the requests; interrupted ones, and discards, may be left out.
    fn outcomes(&self, from: Content, index: usize, ops: &[(&Op, Ended)], out: &mut Vec<Content>) {
        if ops.is_empty() {
            add(out, from);
            return;
        }
        for (i, (op, ended)) in ops.iter().enumerate() {
            let mut rest = ops.to_vec();
            rest.remove(i);
            if *ended == Ended::Partly || matches!(op, Op::Discard { .. }) {
                self.outcomes(Arc::clone(&from), index, &rest, out);
            }
            self.outcomes(self.apply(&from, index, op), index, &rest, out);
            if commute(ops.iter().map(|(op, _)| *op)) {
                break;
            }
        }
    }

    /// Does the request write bytes of this sector to a new place, without a flush in between?
    fn needs_place(&self, op: &Op, index: usize) -> bool {
        match op {
            Op::Write { .. } => !self.sectors[index].is_settled,
            Op::Compressed { .. } => true,
            Op::Zero { at, len, .. } => {
                let Some(unit) = self.zero_unit else { return true };
                let byte = index as u64 * SECTOR;
                let first = byte / unit * unit;
                let end = (first + unit).min(self.len);
                !(*at <= first && at + len >= end)
            }
            Op::Discard { .. } | Op::Read { .. } | Op::Flush | Op::Grow { .. } => false,
        }
    }

    fn mismatch(&self, index: usize, first: usize, found: &[u8], allowed: &[Content]) -> String {
        let wrong =
            |content: &Content| content[first..].iter().zip(found).position(|(a, b)| a != b);
        let at = allowed.iter().filter_map(wrong).max().unwrap_or(0);
        let byte = index as u64 * SECTOR + (first + at) as u64;
        let shown = |bytes: &[u8]| {
            let head: Vec<String> = bytes.iter().take(12).map(|b| format!("{b:02x}")).collect();
            head.join(" ")
        };
        let allowed: Vec<String> = allowed.iter().map(|c| shown(&c[first + at..])).collect();
        format!(
            "byte {byte:#x} (sector {index}): found [{}], allowed [{}]{}",
            shown(&found[at..]),
            allowed.join("] ["),
            if self.sectors[index].may_be_stale { ", touched since the last flush" } else { "" }
        )
    }
}

/// State of a sector after a power cut: its place is not known, and of an unreadable one nothing
/// is.
fn after_crash(found: Option<[u8; LEN]>, zero: &Content) -> Sector {
    match found {
        Some(found) => Sector::holding(Arc::new(found)),
        None => Sector { visible: Vec::new(), ..Sector::holding(Arc::clone(zero)) },
    }
}

fn content_of(bytes: &[u8]) -> Content {
    let mut content = [0; LEN];
    content[..bytes.len()].copy_from_slice(bytes);
    Arc::new(content)
}

fn add(set: &mut Vec<Content>, content: Content) {
    if !set.iter().any(|known| Arc::ptr_eq(known, &content) || **known == *content) {
        set.push(content);
    }
}

/// Contents that a sector may have after a power cut.
fn all_of(sector: &Sector) -> Vec<Content> {
    let mut all = sector.flushed.clone();
    sector.visible.iter().chain(&sector.since).for_each(|c| add(&mut all, Arc::clone(c)));
    all
}

fn range_of(at: u64, len: u64) -> std::ops::Range<usize> {
    to_usize(at / SECTOR)..to_usize((at + len).div_ceil(SECTOR))
}

/// The part of sector `index` inside `at..end`, in bytes of the sector.
fn part(index: usize, at: u64, end: u64) -> (usize, usize) {
    let start = index as u64 * SECTOR;
    (
        to_usize(at.saturating_sub(start).min(SECTOR)),
        to_usize(end.saturating_sub(start).min(SECTOR)),
    )
}

fn changes(op: &Op) -> bool {
    !matches!(op, Op::Read { .. } | Op::Flush | Op::Grow { .. })
}

fn touched(ops: &[Op]) -> Vec<usize> {
    let ranges = ops.iter().filter(|op| changes(op)).filter_map(Op::range);
    let mut all: Vec<usize> =
        ranges.filter(|(_, len)| *len > 0).flat_map(|(at, len)| range_of(at, len)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn touches(op: &Op, index: usize) -> bool {
    changes(op) && op.range().is_some_and(|(at, len)| len > 0 && range_of(at, len).contains(&index))
}

fn covers(op: &Op, index: usize) -> bool {
    op.range().is_some_and(|(at, len)| part(index, at, at + len) == (0, LEN))
}

fn ops_on(ops: &[Op], index: usize) -> Vec<&Op> {
    ops.iter().filter(|op| touches(op, index)).collect()
}

/// Do the requests share no byte, so that their order does not matter?
fn commute<'a>(ops: impl Iterator<Item = &'a Op>) -> bool {
    let mut ranges: Vec<(u64, u64)> = ops.filter_map(Op::range).collect();
    ranges.sort_unstable();
    ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}

/// Is every byte one that some allowed content has there?
fn is_mix(allowed: &[Content], first: usize, found: &[u8]) -> bool {
    let mut bytes = found.iter().enumerate();
    bytes.all(|(i, byte)| allowed.iter().any(|content| content[first + i] == *byte))
}

/// Takes a mix that was read as the content.
fn apply_mix(sector: &mut Sector, first: usize, found: &[u8]) {
    let mut new = Vec::new();
    for content in &sector.visible {
        let mut bytes = **content;
        bytes[first..first + found.len()].copy_from_slice(found);
        add(&mut new, Arc::new(bytes));
    }
    new.iter().for_each(|content| add(&mut sector.since, Arc::clone(content)));
    sector.visible = new;
}

fn to_usize(n: u64) -> usize {
    match usize::try_from(n) {
        Ok(n) => n,
        Err(_) => panic!("{n} does not fit into memory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern;

    fn write(seed: u64, at: u64, len: usize) -> Op {
        Op::Write { at, bytes: pattern(seed, at, len).into(), fua: false }
    }

    fn sectors(bytes: &[u8]) -> Vec<Option<[u8; LEN]>> {
        bytes.chunks(LEN).map(|chunk| Some(*content_of(chunk))).collect()
    }

    fn disk(len: u64) -> DiskModel {
        DiskModel::new(len, len, &[])
    }

    #[test]
    fn a_read_sees_the_last_write_and_nothing_else() {
        let mut disk = disk(2048);
        let op = [write(1, 100, 700)];
        disk.begin(&op);
        disk.end(&op, &[Ended::Done]);
        let mut bytes = vec![0; 2048];
        bytes[100..800].copy_from_slice(&pattern(1, 100, 700));
        assert_eq!(disk.check_read(0, &bytes), Ok(()));
        bytes[799] ^= 1;
        let error = disk.check_read(0, &bytes).expect_err("a byte is wrong");
        assert!(error.contains("byte 0x31f"), "{error}");
    }

    #[test]
    fn a_cut_leaves_a_version_since_the_flush() {
        let versions: Vec<Vec<u8>> = (1..4).map(|seed| pattern(seed, 0, 512)).collect();
        for (version, is_fine) in [(0, false), (1, true), (2, true)] {
            let mut disk = disk(512);
            for seed in 1..4 {
                let op = [write(seed, 0, 512)];
                disk.begin(&op);
                if seed < 3 {
                    disk.end(&op, &[Ended::Done]);
                }
                if seed == 2 {
                    disk.flushed();
                }
            }
            let found = disk.check_crash(512, &sectors(&versions[version]));
            assert_eq!(found.is_ok(), is_fine, "version {version}");
        }
    }

    #[test]
    fn foreign_bytes_are_allowed_only_where_an_unflushed_write_went() {
        for (is_allowed, is_stale_fine) in [(false, false), (true, true)] {
            let mut disk = disk(1024);
            if is_allowed {
                disk.expect_stale();
            }
            let op = [write(1, 0, 512)];
            disk.begin(&op);
            disk.end(&op, &[Ended::Done]);
            let mut bytes = vec![9; 512];
            bytes.resize(1024, 0);
            assert_eq!(disk.clone().check_crash(1024, &sectors(&bytes)).is_ok(), is_stale_fine);
            bytes[600] = 9;
            assert!(disk.check_crash(1024, &sectors(&bytes)).is_err(), "no write went there");
        }
    }

    #[test]
    fn a_failed_write_may_be_mixed_and_a_read_settles_it() {
        let mut disk = disk(512);
        let op = [write(1, 0, 512)];
        disk.begin(&op);
        disk.end(&op, &[Ended::Partly]);
        let mut bytes = pattern(1, 0, 512);
        bytes[300..].fill(0);
        assert_eq!(disk.check_read(0, &bytes), Ok(()));
        assert!(disk.check_read(0, &pattern(1, 0, 512)).is_err(), "it was read otherwise before");
    }

    #[test]
    fn racing_writes_leave_one_of_both() {
        let mut disk = disk(512);
        let ops = [write(1, 0, 512), write(2, 0, 512)];
        disk.begin(&ops);
        disk.end(&ops, &[Ended::Done, Ended::Done]);
        assert!(disk.clone().check_read(0, &pattern(1, 0, 512)).is_ok());
        assert!(disk.clone().check_read(0, &pattern(2, 0, 512)).is_ok());
        assert!(disk.check_read(0, &[0; 512]).is_err());
    }
}
