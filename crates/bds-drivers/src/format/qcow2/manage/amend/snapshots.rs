//! Writes the snapshot table that version 3 demands, beside the old one.
//!
//! Version 3 wants a disk length with every snapshot. A table of version 2 that lacks some is
//! written anew, complete, into new clusters; nothing points there until the switch.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::header::Header;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::manage::snapshot::{
    FIXED_LEN, MAX_TABLE_LEN, MIN_V3_EXTRA_LEN, Snapshot, SnapshotTable,
};
use crate::format::qcow2::state::Image;

/// Where the length of the extra data is, in an entry.
const EXTRA_LEN_AT: usize = 36;

/// A new snapshot table and the one it replaces.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewTable {
    pub new: Clusters<MetaOffset>,
    pub old: Clusters<MetaOffset>,
}

impl Image {
    /// Writes the table durably; `None`: the old one will do.
    pub(super) async fn write_snapshot_table(
        self: &Arc<Self>,
        header: &Header,
    ) -> Result<Option<NewTable>> {
        let (start, count) = (header.snapshots_offset, header.snapshot_count);
        let table = SnapshotTable::read(self.file.port(), start, count).await?;
        if table.entries.iter().all(|one| one.extra_len >= MIN_V3_EXTRA_LEN) {
            return Ok(None);
        }
        let old = read_bytes(self.file.port(), start, mem_len(table.len)).await?;
        let mut bytes = encode(&old, &table.entries, header.size);
        if bytes.len() as u64 > MAX_TABLE_LEN {
            let words = "the snapshot table would be larger than 64 MiB";
            return Err(Error::new(ErrorKind::LimitExceeded, words).at(start));
        }
        let geometry = *self.geometry();
        bytes.resize(bytes.len().next_multiple_of(geometry.cluster_len()), 0);
        let clusters = geometry.clusters(bytes.len() as u64);
        let allocated = self.plan(|image, meta| {
            image.check_dirty_budget(meta, geometry.cluster_len())?;
            image.alloc_metadata(meta, clusters, Class::SNAPSHOT_TABLE)
        });
        let new = allocated.await?.range();
        let old = Clusters { start: MetaOffset(start), count: geometry.clusters(table.len) };
        let this = NewTable { new, old };
        let written = async {
            self.write_file(new.start, bytes).await?;
            self.write_back(true).await?;
            self.flush_meta().await
        };
        match written.await {
            Ok(()) => Ok(Some(this)),
            Err(error) => {
                self.release_unused(&mut self.meta(), new);
                Err(error)
            }
        }
    }

    /// Frees the table that the switch replaced, whose pointer is durably gone.
    pub(super) fn free_old_table(&self, table: NewTable) {
        self.meta().frees_durable.push(FreedRun::metadata(table.old));
    }

    /// Frees a new table that no header points at.
    pub(super) fn give_back_unless_used(&self, table: NewTable) {
        let is_used = self.cluster0.load().header.snapshots_offset == table.new.start.0;
        if !is_used && self.check_usable().is_ok() {
            self.release_unused(&mut self.meta(), table.new);
        }
    }
}

/// The entries of the table `old` with the extra data of version 3.
fn encode(old: &[u8], entries: &[Snapshot], disk_len: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(old.len());
    let mut at = 0;
    for one in entries {
        let extra_at = at + FIXED_LEN;
        let names_at = extra_at + mem_len(one.extra_len.into());
        let end = names_at + one.id.len() + one.name.len();
        out.extend(&old[at..at + EXTRA_LEN_AT]);
        if one.extra_len >= MIN_V3_EXTRA_LEN {
            out.extend(&old[at + EXTRA_LEN_AT..end]);
        } else {
            let extra = [one.vm_state_len, disk_len, u64::MAX].map(u64::to_be_bytes).concat();
            out.extend(u32::try_from(extra.len()).expect("24 bytes").to_be_bytes());
            out.extend(extra);
            out.extend(&old[names_at..end]);
        }
        out.resize(out.len().next_multiple_of(8), 0);
        at = end.next_multiple_of(8);
    }
    out
}
