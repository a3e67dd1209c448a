//! Reads the table of internal snapshots.
//!
//! Entries are shown by `info` and counted by `check`; nothing here applies, makes or deletes a
//! snapshot.

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::format::qcow2::file_read::Window;
use crate::format::qcow2::layout::extension::{be32, be64};

/// Bytes of an entry before its extra data.
pub(super) const FIXED_LEN: usize = 40;
/// Known extra data: state length, disk length, instruction count.
const KNOWN_EXTRA_LEN: usize = 24;
/// Most extra data of one entry.
pub(crate) const MAX_EXTRA_LEN: u32 = 1024;
/// Extra data that version 3 demands.
pub(crate) const MIN_V3_EXTRA_LEN: u32 = 16;
/// Largest table in bytes.
pub(crate) const MAX_TABLE_LEN: u64 = 64 << 20;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub l1_offset: u64,
    pub l1_size: u32,
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub date_sec: u32,
    pub date_nsec: u32,
    pub vm_clock_nsec: u64,
    pub vm_state_len: u64,
    pub disk_size: Option<u64>,
    pub icount: Option<u64>,
    pub extra_len: u32,
}

/// Entries of a table, and its length in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    pub entries: Vec<Snapshot>,
    pub len: u64,
}

impl SnapshotTable {
    /// Reads `count` entries at `offset`. Extra data longer than allowed is skipped; callers that
    /// refuse it look at `extra_len`.
    pub(crate) async fn read(file: &dyn ChildPort, offset: u64, count: u32) -> Result<Self> {
        let mut table = Self::default();
        let mut window = Window::new(file);
        for _ in 0..count {
            let at = place(offset, table.len)?;
            let fixed = window.get(at, FIXED_LEN).await?;
            let mut entry = Snapshot {
                l1_offset: be64(fixed, 0),
                l1_size: be32(fixed, 8),
                id: Vec::new(),
                name: Vec::new(),
                date_sec: be32(fixed, 16),
                date_nsec: be32(fixed, 20),
                vm_clock_nsec: be64(fixed, 24),
                vm_state_len: u64::from(be32(fixed, 32)),
                disk_size: None,
                icount: None,
                extra_len: be32(fixed, 36),
            };
            let lens = be32(fixed, 12);
            let (id_len, name_len) = (lens >> 16, lens & 0xffff);
            let len = |n: u32| usize::try_from(n).expect("u32 fits usize");
            let known = len(entry.extra_len).min(KNOWN_EXTRA_LEN);
            let extra = window.get(at + FIXED_LEN as u64, known).await?;
            if extra.len() >= 8 {
                entry.vm_state_len = be64(extra, 0);
            }
            entry.disk_size = (extra.len() >= 16).then(|| be64(extra, 8));
            entry.icount = (extra.len() >= 24).then(|| be64(extra, 16)).filter(|n| *n != u64::MAX);

            let names_at = at + FIXED_LEN as u64 + u64::from(entry.extra_len);
            let names = window.get(names_at, len(id_len) + len(name_len)).await?;
            let (id, name) = names.split_at(len(id_len));
            (entry.id, entry.name) = (id.to_vec(), name.to_vec());
            let end = names_at + u64::from(id_len) + u64::from(name_len);
            table.len = (end - offset).next_multiple_of(8);
            if table.len > MAX_TABLE_LEN {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    "the snapshot table is larger than 64 MiB",
                )
                .field("snapshots_offset", offset));
            }
            table.entries.push(entry);
        }
        Ok(table)
    }
}

fn place(offset: u64, len: u64) -> Result<u64> {
    // Space for the largest entry keeps later sums in range.
    offset.checked_add(len).filter(|at| *at < i64::MAX as u64 - (1 << 33)).ok_or_else(|| {
        Error::new(ErrorKind::InvalidImage, "the snapshot table lies beyond any file")
            .field("snapshots_offset", offset)
    })
}

impl Snapshot {
    /// As QEMU shows it in `info`.
    pub(crate) fn to_json(&self) -> Value {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut value = json!({
            "vm-clock-nsec": self.vm_clock_nsec % 1_000_000_000,
            "name": text(&self.name),
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec / 1_000_000_000,
            "id": text(&self.id),
            "vm-state-size": self.vm_state_len,
        });
        if let (Some(icount), Some(map)) = (self.icount, value.as_object_mut()) {
            map.shift_insert(0, "icount".to_owned(), icount.into());
        }
        value
    }
}
