//! Provides the L2 table that a change of entries needs: allocates it, or copies it if a snapshot
//! shares it, and returns the slice to change.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind};

use super::tables::{Slice, SliceId};
use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::layout::entry::L1Entry;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::plan::{MetaKey, MetaResult, NeedMeta, corrupt_entry};
use crate::format::qcow2::state::{Image, Meta};

impl Image {
    /// The slice that maps `guest`, in a table that is not shared: allocated or copied if needed.
    pub(crate) fn slice_to_write(
        &self,
        meta: &mut Meta,
        guest: u64,
    ) -> MetaResult<(SliceId, Arc<Slice>)> {
        let id = self.tables.slice_id(guest).filter(|id| id.table < meta.l1.entries);
        let Some(id) = id else {
            return Err(NeedMeta::Fail(
                Error::new(ErrorKind::OutOfRange, "a write beyond the L1 table").at(guest),
            ));
        };
        let l1 = self.tables.l1(id.table);
        match l1.table(self.geometry()).map_err(|b| corrupt_entry(b, guest))? {
            None => {
                self.check_dirty_budget(meta, meta.slices.bytes_to_pin(id))?;
                let got = self.alloc_metadata(meta, 1, Class::ACTIVE_L2)?;
                meta.slices.add_unlinked(id.table, !got.is_fresh);
                self.set_table(meta, id.table, got.offset);
            }
            Some(old) if !l1.is_copied() => self.copy_table(meta, id.table, old)?,
            Some(_) => {}
        }
        if let Some(slice) = self.tables.hold(id) {
            slice.touch();
            return Ok((id, slice));
        }
        if meta.slices.is_unlinked(id.table) {
            // The file does not have this table: what is not in memory is empty.
            let is_extended = self.geometry().has_extended_l2();
            let slice = Arc::new(Slice::empty(self.config.load().slice_len, is_extended));
            return Ok((id, meta.slices.add(&self.tables, id, slice)));
        }
        Err(NeedMeta::Load(MetaKey::Slice(id)))
    }

    fn set_table(&self, meta: &mut Meta, table: u32, place: MetaOffset) {
        self.tables.set_l1(table, L1Entry::new(place, true));
        meta.l1.mark(table);
    }

    /// Replaces a table that a snapshot shares by a copy. All of it is in memory, so only its host
    /// offset changes.
    fn copy_table(&self, meta: &mut Meta, table: u32, old: MetaOffset) -> MetaResult<()> {
        let pieces = u32::try_from(self.tables.slices_per_table()).expect("at most 4096");
        let ids = (0..pieces).map(|piece| SliceId { table, piece });
        if ids.clone().any(|id| self.tables.hold(id).is_none()) {
            return Err(NeedMeta::Load(MetaKey::Table(table)));
        }
        self.check_dirty_budget(meta, self.geometry().cluster_len())?;
        let got = self.alloc_metadata(meta, 1, Class::ACTIVE_L2)?;
        meta.slices.add_unlinked(table, false);
        for id in ids {
            meta.slices.mark_all(id);
        }
        self.set_table(meta, table, got.offset);
        meta.frees.push(FreedRun::metadata(Clusters { start: old, count: 1 }));
        Ok(())
    }

    pub(crate) fn index_in_slice(&self, guest: u64) -> usize {
        mem_len((guest & (self.tables.slice_span() - 1)) >> self.geometry().cluster_bits())
    }
}
