//! Plans how to rewrite cluster 0 so that a crash at any time leaves the old contents or the new.
//!
//! A sector is old or new after a crash, but header, extensions and the backing file's name may lie
//! in several. Two kinds of writes are safe, each followed by a flush:
//!
//! ```text
//! fill     changes only bytes that the header in the file does not use
//! switch   changes used bytes in one sector only: the first, which points at the rest
//! ```
//!
//! Usually one fill (the name goes where nothing is used) and one switch suffice. If extensions in
//! later sectors have to move, there are two rounds: first all of them go behind what is used, and
//! the switch puts a *padding extension* of a type that no reader knows in front, which covers the
//! old ones; then the usual place is unused, is filled, and a second switch goes back to it. A
//! crash between the rounds leaves an image that is complete but has that extension; the next
//! rewrite drops it.
//!
//! Bytes only, no I/O.

use std::ops::Range;

use bds_core::error::{Error, ErrorKind, Result};

use super::cluster0::Cluster0;
use super::extension::{PADDING, end_of_list, padding};
use super::header::{MAX_BACKING_NAME_LEN, put};
use super::units::mem_len;

const SECTOR_LEN: usize = 512;

/// One write to cluster 0, to be made durable before the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub offset: usize,
    pub bytes: Vec<u8>,
}

/// Cluster 0 as bytes, and which of them are used.
struct Layout {
    bytes: Vec<u8>,
    /// End of the header and the extensions that follow it, the end mark included.
    head_end: usize,
    /// Behind that: the backing file's name, or all that padding moved there. May be empty.
    tail: Range<usize>,
}

/// The writes that turn cluster 0, which has these `bytes` now, into `new`. None if nothing
/// differs.
///
/// # Errors
/// `InvalidInput`: the backing file's name is too long; `NoSpace`: there is no space for a safe
/// rewrite.
pub(crate) fn plan(bytes: &[u8], old: &Cluster0, new: &Cluster0) -> Result<Vec<Write>> {
    let name_len = new.backing_name.as_ref().map_or(0, Vec::len);
    if name_len > mem_len(MAX_BACKING_NAME_LEN.into()) {
        let words = format!("the backing file's name is longer than {MAX_BACKING_NAME_LEN} bytes");
        return Err(Error::new(ErrorKind::InvalidInput, words).field("length", name_len));
    }
    let mut new = new.clone();
    new.extensions.unknown.retain(|extension| extension.kind != PADDING);
    if *old == new {
        return Ok(Vec::new());
    }
    let now = Layout::of_file(bytes, old);
    if let Some(writes) = direct(&now, &new) {
        return Ok(writes);
    }
    if let Some(writes) = aside(&now, &new) {
        return Ok(writes);
    }
    if new.backing_name.is_none() {
        // A format without a name says nothing: it may stay where removing it would need space.
        new.extensions.backing_format.clone_from(&old.extensions.backing_format);
        if let Some(writes) = direct(&now, &new) {
            return Ok(writes);
        }
    }
    let words = "cluster 0 has no space to change the backing file's name safely: use larger clusters or a shorter name";
    Err(Error::new(ErrorKind::NoSpace, words).field("cluster size", bytes.len()))
}

/// One fill and one switch, if some arrangement of the new contents allows that.
fn direct(now: &Layout, new: &Cluster0) -> Option<Vec<Write>> {
    let behind = now.used_end();
    let formats_last = [false, true];
    let arrangements = formats_last.iter().flat_map(|last| [(*last, 0), (*last, behind)]);
    arrangements.filter_map(|(last, name_from)| now.arrange(new, last, name_from)).find_map(
        |wanted| {
            let is_safe = now.changed_used_sectors(&wanted).all(|sector| sector == 0);
            is_safe.then(|| now.fill_and_switch(&wanted))
        },
    )
}

/// Two rounds: everything goes behind what is used, then to its usual place.
fn aside(now: &Layout, new: &Cluster0) -> Option<Vec<Write>> {
    let usual = now.arrange(new, false, 0)?;
    let list_at = mem_len(new.header.header_len.into());
    let from = now.used_end().max(usual.used_end()).next_multiple_of(8);
    let list = usual.bytes.get(list_at..usual.head_end)?;
    let name = new.backing_name.as_deref().unwrap_or_default();
    let name_at = from + list.len();
    let pad_end = list_at + padding(0).len();
    if pad_end > SECTOR_LEN || name_at + name.len() > now.bytes.len() {
        return None;
    }
    let mut bytes = now.bytes.clone();
    put(&mut bytes, 0, &usual.bytes[..list_at]);
    put(&mut bytes, list_at, &padding(from - pad_end));
    put(&mut bytes, from, list);
    if !name.is_empty() {
        put(&mut bytes, name_at, name);
        put(&mut bytes, 8, &(name_at as u64).to_be_bytes());
    }
    let between = Layout { bytes, head_end: pad_end, tail: from..name_at + name.len() };
    let mut writes = now.fill_and_switch(&between);
    // What the second round leaves unchanged is now what lies in the file.
    let wanted = between.arrange(new, false, 0)?;
    debug_assert!(between.changed_used_sectors(&wanted).all(|sector| sector == 0));
    writes.extend(between.fill_and_switch(&wanted));
    Some(writes)
}

impl Layout {
    fn of_file(bytes: &[u8], cluster0: &Cluster0) -> Self {
        let name = cluster0.name_range(bytes);
        let list_at = mem_len(cluster0.header.header_len.into());
        let area_end = name.as_ref().map_or(bytes.len(), |name| name.start);
        let head_end = end_of_list(bytes, list_at, area_end);
        Self { bytes: bytes.to_vec(), head_end, tail: name.unwrap_or(0..0) }
    }

    /// `new` as it would lie in this cluster, the name not before `name_from`. What it does not use
    /// stays as it is here. `None`: it does not fit.
    fn arrange(&self, new: &Cluster0, format_last: bool, name_from: usize) -> Option<Self> {
        let mut head = new.header.encode();
        new.extensions.encode_ordered(&mut head, format_last);
        let mut tail = 0..0;
        let mut bytes = self.bytes.clone();
        if let Some(name) = &new.backing_name {
            let at = head.len().max(name_from);
            tail = at..at + name.len();
            put(&mut head, 8, &(at as u64).to_be_bytes());
            put(&mut head, 16, &u32::try_from(name.len()).ok()?.to_be_bytes());
            bytes.get_mut(tail.clone())?.copy_from_slice(name);
        }
        bytes.get_mut(..head.len())?.copy_from_slice(&head);
        Some(Self { bytes, head_end: head.len(), tail })
    }

    fn used_end(&self) -> usize {
        self.head_end.max(self.tail.end)
    }

    /// Sectors in which bytes that are used now would change.
    fn changed_used_sectors<'a>(&'a self, wanted: &'a Self) -> impl Iterator<Item = usize> + 'a {
        let at = (0..self.head_end).chain(self.tail.clone());
        at.filter(|at| self.bytes[*at] != wanted.bytes[*at]).map(|at| at / SECTOR_LEN)
    }

    fn fill_and_switch(&self, wanted: &Self) -> Vec<Write> {
        let mut writes = Vec::new();
        let sectors = self.bytes.chunks(SECTOR_LEN).zip(wanted.bytes.chunks(SECTOR_LEN));
        let mut changed = sectors
            .enumerate()
            .skip(1)
            .filter(|(_, (old, new))| old != new)
            .map(|(sector, _)| sector);
        if let Some(first) = changed.next() {
            let last = changed.next_back().unwrap_or(first);
            let range = first * SECTOR_LEN..(last + 1) * SECTOR_LEN;
            writes.push(Write { offset: range.start, bytes: wanted.bytes[range].to_vec() });
        }
        writes.push(Write { offset: 0, bytes: wanted.bytes[..SECTOR_LEN].to_vec() });
        writes
    }
}

#[cfg(test)]
#[path = "tests/rewrite.rs"]
mod tests;
