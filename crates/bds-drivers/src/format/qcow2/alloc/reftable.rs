//! A new place for the refcount table when it has outgrown the old one.
//!
//! In memory the table simply grows. Before the next write-back it must have room in the file: new clusters, counted by blocks
//! that the new table lists, so that the new structure describes itself. The file learns of it in the order
//! O6, O7: blocks and table, flush, header; the old clusters are given back after that (`write_back.rs`, `release.rs`).

use super::overlap::Class;
use super::release::Freed;
use crate::format::qcow2::layout::space::Offset;
use crate::format::qcow2::state::{Image, Meta, Plan};

impl Image {
    /// Gives the table room. Allocating the room may make the table grow again, hence the loop; half as much again ends it soon.
    pub(crate) fn move_table(&self, meta: &mut Meta) -> Plan<()> {
        while meta.counts.needs_room() {
            let wanted = meta.counts.wanted_room();
            let place = self.alloc_metadata(meta, wanted, Class::REFCOUNT_TABLE)?;
            let old = meta.counts.move_table(place.range());
            let bits = self.geometry().cluster_bits();
            for i in 0..old.count {
                self.metadata.remove(old.start.plus(i << bits));
            }
            meta.frees.push(Freed::metadata(old));
        }
        Ok(())
    }
}
