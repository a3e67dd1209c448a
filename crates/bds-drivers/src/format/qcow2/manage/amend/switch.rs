//! Lets amended options take effect: cluster 0 is rewritten, in the file and then in memory.
//!
//! All fields that change lie in the first sector, or are extensions that `layout/rewrite.rs` moves
//! safely: after a crash the header has the old options or the new ones. What the new ones point
//! at is durable before.
//!
//! A failed write of the header may have happened. Then the file is flushed and read again: what it
//! says holds. If that fails too, it is unknown which header a crash would leave, and space that
//! only one of them has in use must not be written: the image is out of use until it is opened
//! anew.

use std::sync::Arc;

use bds_core::driver::Amendment;
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::sync::MutexGuard;

use super::options::AmendPlan;
use super::snapshots::NewTable;
use super::steps::Steps;
use super::widths::NewCounts;
use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::rewrite::{self, Write};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::meta::refcounts::Refcounts;
use crate::format::qcow2::state::{Image, Meta};

/// Keeps counts and header as they are in the file. In the order of locking.
pub(super) struct Frozen<'a> {
    _prepare: MutexGuard<'a, ()>,
    _release: MutexGuard<'a, ()>,
    _write_back: MutexGuard<'a, ()>,
}

impl Image {
    /// The writes that turn cluster 0 from `old` into `new`. A table of feature names that has no
    /// space is left out.
    pub(super) async fn plan_switch(&self, plan: &mut AmendPlan) -> Result<Vec<Write>> {
        let bytes = read_bytes(self.file.port(), 0, self.geometry().cluster_len()).await?;
        let mut planned = rewrite::plan(&bytes, &plan.old, &plan.new);
        let is_full = |e: &Error| e.kind() == ErrorKind::NoSpace;
        if planned.as_ref().is_err_and(is_full) && plan.is_upgrade() {
            plan.new.extensions.feature_names = None;
            planned = rewrite::plan(&bytes, &plan.old, &plan.new);
        }
        planned.map_err(|error| error.context("cannot change the header"))
    }

    /// Writes what still has to be written, and switches. `table`: a new snapshot table.
    ///
    /// # Errors
    /// The old options hold, or the new ones if it failed at the very end.
    pub(super) async fn switch_options(
        self: &Arc<Self>,
        amendment: &Amendment,
        table: Option<NewTable>,
        steps: &mut Steps,
    ) -> Result<()> {
        let frozen = self.freeze().await?;
        // Tables may have moved since it was first looked at.
        let old = read_cluster0(self.file.port(), Strictness::Use).await?;
        let mut plan = AmendPlan::new(amendment, &old)?;
        if let Some(table) = table {
            plan.new.header.snapshots_offset = table.new.start.0;
        }
        let counts = match plan.changes_width() {
            true => {
                let new = plan.new.header.geometry;
                let counts = self.write_counts(&plan.old.header, &new, steps).await?;
                plan.new.header.reftable_offset = counts.place.start.0;
                plan.new.header.reftable_clusters =
                    u32::try_from(counts.place.count).expect("at most 16384");
                self.protect_new_counts(&counts).await?;
                Some(counts)
            }
            false => None,
        };
        let switched = self.switch(&mut plan, counts, steps).await;
        drop(frozen);
        if let Some(table) = table.filter(|_| switched.is_ok()) {
            self.free_old_table(table);
        }
        switched
    }

    async fn switch(
        &self,
        plan: &mut AmendPlan,
        counts: Option<NewCounts>,
        steps: &mut Steps,
    ) -> Result<()> {
        let prepared = async {
            let writes = self.plan_switch(plan).await?;
            self.file.flush().await?;
            steps.advance(0)?;
            Ok(writes)
        };
        let writes = match prepared.await {
            Ok(writes) => writes,
            Err(error) => {
                if let Some(counts) = &counts {
                    self.unprotect_counts(counts, false);
                }
                return Err(error);
            }
        };
        // From here on it is not cancelled.
        let written = self.write_switch(writes).await;
        let now = match &written {
            Ok(()) => plan.new.clone(),
            Err(error) => self.settle_header(error).await?,
        };
        self.adopt(now, counts)?;
        written
    }

    async fn write_switch(&self, writes: Vec<Write>) -> Result<()> {
        for Write { offset, bytes } in writes {
            self.write_file(MetaOffset(offset as u64), bytes).await?;
            self.flush_meta().await?;
        }
        Ok(())
    }

    /// After a failed write: what the header is, durably.
    async fn settle_header(&self, failed: &Error) -> Result<Cluster0> {
        let settled = async {
            self.flush_meta().await?;
            read_cluster0(self.file.port(), Strictness::Use).await
        };
        let now = settled.await;
        if now.is_err() {
            let words = "the header could not be written, and what it says is not known: open the image anew";
            let error = Error::new(ErrorKind::Io, words).node(&self.node_name);
            // The first one counts.
            let _ = self.broken.set(error);
        }
        now.map_err(|_| failed.duplicate())
    }

    /// Takes over what the file says now. The file and the memory agree in everything else.
    fn adopt(&self, now: Cluster0, counts: Option<NewCounts>) -> Result<()> {
        let header = &now.header;
        let config = self.config_for(&now)?;
        if let Some(counts) = counts {
            let has_switched = header.reftable_offset == counts.place.start.0;
            self.unprotect_counts(&counts, has_switched);
            if has_switched {
                let NewCounts { table, place, .. } = counts;
                let budget = config.refcount_cache_bytes;
                self.meta().counts =
                    Refcounts::new(header.geometry, table, place.start, place.count, budget);
            }
        }
        {
            let mut meta = self.meta();
            meta.header.incompatible = header.incompatible;
            meta.header.autoclear = header.autoclear;
        }
        self.rules.set(header);
        self.use_config(config);
        self.cluster0.store(Arc::new(now));
        Ok(())
    }

    /// Waits until the file has everything that is in memory, and keeps it so.
    pub(super) async fn freeze(self: &Arc<Self>) -> Result<Frozen<'_>> {
        /// Flushes and bitmaps may go on meanwhile, guest writes do not.
        const ATTEMPTS: usize = 64;
        for _ in 0..ATTEMPTS {
            self.write_back_all().await?;
            let frozen = Frozen {
                _prepare: self.prepare_lock.lock().await,
                _release: self.release_lock.lock().await,
                _write_back: self.write_back_lock.lock().await,
            };
            let (is_done, load) = {
                let meta = self.meta();
                (self.has_all_in_file(&meta), meta.loads.values().next().cloned())
            };
            if is_done {
                self.flush_meta().await?;
                return Ok(frozen);
            }
            drop(frozen);
            if let Some(load) = load {
                load.done.wait().await;
            }
        }
        let words = "the image's metadata changes faster than it can be written";
        Err(Error::new(ErrorKind::InUse, words))
    }

    /// Nothing is in memory that the file does not have, and nothing is being loaded.
    fn has_all_in_file(&self, meta: &Meta) -> bool {
        !self.has_unwritten(meta)
            && !meta.counts.has_dirty()
            && !meta.header.is_dirty_marked
            && meta.frees_written.is_empty()
            && meta.frees_durable.is_empty()
            && meta.loads.is_empty()
    }
}
