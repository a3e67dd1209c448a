//! Walks the L2 tables of an image and of its internal snapshots, each once.
//!
//! A table that several L1 entries point at is found by the first of them, those of the active L1
//! table before all others. Only so many are remembered; beyond that one may be found again, which
//! costs time and changes nothing.

use std::collections::HashSet;

use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::entry::{L1Entry, read_u64};
use crate::format::qcow2::layout::header::{Header, MAX_L1_LEN};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::manage::snapshot::SnapshotTable;
use crate::format::qcow2::state::Image;

/// Tables that are remembered: some 64 MiB of memory.
const MAX_REMEMBERED: usize = 1 << 22;

/// An L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct L2Table {
    pub place: MetaOffset,
    /// Its number in the active L1 table; `None`: only snapshots have it.
    pub active: Option<u32>,
}

/// An L1 table that was not read yet.
struct L1Table {
    offset: u64,
    entries: u32,
    is_active: bool,
}

/// The L2 tables that were not visited yet.
pub(super) struct L2Tables {
    /// The last one is next.
    left: Vec<L1Table>,
    /// Entries of the L1 table being read, and the next of them.
    words: Vec<u8>,
    next: usize,
    is_active: bool,
    seen: HashSet<u64>,
    passed: u64,
}

impl L2Tables {
    /// # Errors
    /// The snapshot table cannot be read or contradicts itself.
    pub(super) async fn new(image: &Image, header: &Header) -> Result<Self> {
        let (at, count) = (header.snapshots_offset, header.snapshot_count);
        let snapshots = SnapshotTable::read(image.file.port(), at, count).await?;
        let mut left = Vec::with_capacity(snapshots.entries.len() + 1);
        for one in &snapshots.entries {
            let (offset, entries) = (one.l1_offset, one.l1_size);
            if !header.geometry.is_cluster_aligned(offset) || u64::from(entries) * 8 > MAX_L1_LEN {
                let words = "a snapshot's L1 table is longer than 32 MiB or does not begin at a \
                             cluster; repair the image with a check";
                return Err(Error::new(ErrorKind::InvalidImage, words).at(offset));
            }
            left.push(L1Table { offset, entries, is_active: false });
        }
        left.push(L1Table { offset: header.l1_offset, entries: header.l1_size, is_active: true });
        let (words, seen) = (Vec::new(), HashSet::new());
        Ok(Self { left, words, next: 0, is_active: false, seen, passed: 0 })
    }

    /// Entries of all L1 tables that were not read yet.
    pub(super) fn entries_left(&self) -> u64 {
        self.left.iter().map(|table| u64::from(table.entries)).sum()
    }

    /// L1 entries passed since the last call.
    pub(super) fn take_passed(&mut self) -> u64 {
        std::mem::take(&mut self.passed)
    }

    /// The next table; `None` behind the last one.
    ///
    /// # Errors
    /// An L1 table cannot be read, or an entry cannot be followed.
    pub(super) async fn next(&mut self, image: &Image) -> Result<Option<L2Table>> {
        loop {
            while let Some(word) = read_u64(&self.words, self.next) {
                let number = u32::try_from(self.next).expect("at most 2^22 entries");
                self.next += 1;
                self.passed += 1;
                let place = L1Entry(word).table(image.geometry()).map_err(|bad| {
                    let words = format!("{bad}; repair the image with a check");
                    Error::new(ErrorKind::InvalidImage, words)
                })?;
                if let Some(place) = place.filter(|place| self.is_new(place.0)) {
                    let active = self.is_active.then_some(number);
                    return Ok(Some(L2Table { place, active }));
                }
            }
            let Some(L1Table { offset, entries, is_active }) = self.left.pop() else {
                return Ok(None);
            };
            let len = usize::try_from(u64::from(entries) * 8).expect("at most 32 MiB");
            self.words = read_bytes(image.file.port(), offset, len).await?;
            self.next = 0;
            self.is_active = is_active;
        }
    }

    fn is_new(&mut self, place: u64) -> bool {
        if self.seen.len() < MAX_REMEMBERED {
            self.seen.insert(place)
        } else {
            !self.seen.contains(&place)
        }
    }
}
