//! Releases freed clusters: from a removed reference to a lowered refcount.
//!
//! ```text
//! frees          the pointer is removed in memory
//! frees_written  a write-back has written that to the file         (write_back.rs)
//! frees_durable  and a flush has made it durable                   rule O2
//! ...            all readers that may know the offset are finished (srcu.rs)
//! ...            the range is discarded on the host, if configured
//! free           the count is lowered: the allocator sees it
//! ```
//!
//! Lowering the count comes last, so no step can race with the cluster's next use. A crash on the
//! way leaves a leak.

use std::sync::Arc;

use bds_core::error::Result;

use super::freed::{FreeReason, FreedClusters, FreedRun};
use crate::format::qcow2::layout::entry::{L2Entry, Place};
use crate::format::qcow2::layout::space::{Clusters, DataOffset, MetaOffset, Offset};
use crate::format::qcow2::meta::lookup::Found;
use crate::format::qcow2::plan::{MetaKey, MetaResult, NeedMeta, corrupt_entry};
use crate::format::qcow2::state::{Image, Meta};

impl Image {
    /// Frees what `old` pointed at: the pointer is removed in memory.
    pub(crate) fn free_entry(&self, meta: &mut Meta, old: L2Entry, reason: FreeReason) {
        let geometry = self.geometry();
        match old.place(&self.rules) {
            Ok(Place::Cluster(host)) => {
                let clusters = match self.space().counted(host) {
                    Some(start) => FreedClusters::Image(Clusters { start, count: 1 }),
                    None => FreedClusters::DataFile(Clusters { start: host, count: 1 }),
                };
                let freed = FreedRun { clusters, reason, compressed_entry: None };
                let bits = geometry.cluster_bits();
                if !meta.frees.last_mut().is_some_and(|last| last.join(&freed, bits)) {
                    meta.frees.push(freed);
                }
            }
            Ok(Place::Compressed(range)) => {
                let start = MetaOffset(geometry.cluster_floor(range.offset.0));
                let count = geometry.clusters(range.offset.0 + range.len - start.0);
                let clusters = FreedClusters::Image(Clusters { start, count });
                meta.frees.push(FreedRun { clusters, reason, compressed_entry: Some(old.word) });
            }
            // What cannot be followed is not freed either: a check will find it.
            Ok(Place::None) | Err(_) => {}
        }
    }

    /// Lowers the count of the cluster at `at`, which is not in use any more. At zero it may be
    /// allocated at once.
    pub(crate) fn lower(&self, meta: &mut Meta, at: MetaOffset) -> MetaResult<()> {
        if meta.counts.lower(self.geometry().cluster_index(at.0))? == 0 {
            self.metadata.remove(at);
            self.end_compressed_run(meta, at);
        }
        Ok(())
    }

    /// Releases clusters that were allocated and never linked. If the count cannot be lowered now,
    /// they are released later.
    pub(crate) fn release_unused(&self, meta: &mut Meta, clusters: Clusters<MetaOffset>) {
        for i in 0..clusters.count {
            let start = clusters.start.plus(i << self.geometry().cluster_bits());
            if self.lower(meta, start).is_err() {
                meta.frees.push(FreedRun::unused(Clusters { start, count: 1 }));
            }
        }
    }

    /// Compressed bytes must not be appended in this cluster.
    fn end_compressed_run(&self, meta: &mut Meta, at: MetaOffset) {
        if self.geometry().cluster_floor(meta.compressed_at) == at.0 {
            meta.compressed_at = 0;
        }
    }

    /// Makes the removals written so far durable and releases the clusters.
    pub(crate) async fn flush_and_release_frees(self: &Arc<Self>) -> Result<()> {
        self.flush_frees().await?;
        self.release().await
    }

    /// Makes the removals written so far durable. True if there is something to release.
    pub(crate) async fn flush_frees(self: &Arc<Self>) -> Result<bool> {
        let frees = {
            let mut meta = self.meta();
            if meta.frees_written.is_empty() && !meta.pending_flush.needs_meta_flush() {
                return Ok(!meta.frees_durable.is_empty());
            }
            std::mem::take(&mut meta.frees_written)
        };
        let flushed = self.flush_meta().await;
        let mut meta = self.meta();
        match flushed {
            Ok(()) => {
                meta.frees_durable.extend(frees);
                Ok(!meta.frees_durable.is_empty())
            }
            Err(error) => {
                meta.frees_written.extend(frees);
                Err(error)
            }
        }
    }

    /// Releases clusters whose removal is durable. Must run to completion.
    pub(crate) async fn release(self: &Arc<Self>) -> Result<()> {
        let _lock = self.release_lock.lock().await;
        let mut frees = std::mem::take(&mut self.meta().frees_durable);
        if frees.is_empty() {
            return Ok(());
        }
        self.srcu.synchronize().await;
        for word in frees.iter().filter_map(|freed| freed.compressed_entry) {
            self.decompressed.forget(word);
        }
        let result = self.release_all(&mut frees).await;
        if result.is_err() {
            // What is left is tried again after the next flush.
            self.meta().frees_durable.extend(frees);
        }
        result
    }

    async fn release_all(self: &Arc<Self>, frees: &mut Vec<FreedRun>) -> Result<()> {
        let mut last = Vec::new();
        while let Some(freed) = frees.last_mut() {
            let discards = self.discards_on_host(freed.reason);
            let result = match &mut freed.clusters {
                FreedClusters::DataFile(run) => self.release_in_data_file(run, discards).await,
                FreedClusters::Image(run) => self.lower_some(run, discards, &mut last).await,
            };
            if freed.count() == 0 {
                frees.pop();
            }
            if let Err(error) = result {
                let requeue = |run: &Clusters<MetaOffset>| FreedRun {
                    reason: FreeReason::Request,
                    ..FreedRun::unused(*run)
                };
                frees.extend(last.iter().map(requeue));
                return Err(error);
            }
        }
        self.discard_and_lower(last, frees).await
    }

    /// A data file has no counts: a cluster keeps its offset whether it is used or not. It may have
    /// data again by now, so each is looked up once more, and writes to it wait until the host
    /// discard is over.
    async fn release_in_data_file(
        self: &Arc<Self>,
        freed: &mut Clusters<DataOffset>,
        discards: bool,
    ) -> Result<()> {
        let bits = self.geometry().cluster_bits();
        if !discards {
            freed.count = 0;
        }
        while freed.count > 0 {
            // In a data file a cluster lies at its guest offset.
            let (guest, max) = (freed.start.0, freed.count << bits);
            let (len, item) = self
                .plan(|image, meta| {
                    let max = image.before_in_flight(meta, guest, max)?;
                    let run = match image.lookup(guest, max).map_err(|b| corrupt_entry(b, guest))? {
                        Found::Run(run) => run,
                        Found::Missing(id) => return Err(NeedMeta::Load(MetaKey::Slice(id))),
                    };
                    let clusters = image.geometry().clusters(run.len);
                    let is_unused = !run.kind.has_place();
                    let item =
                        is_unused.then(|| image.begin_allocation(meta, guest, clusters, None));
                    Ok((clusters, item))
                })
                .await?;
            let count = len.min(freed.count);
            if let Some(item) = item {
                self.note_discard(self.data().discard(freed.start, count << bits).await);
                self.meta().end_allocation(&item);
            }
            freed.start = freed.start.plus(count << bits);
            freed.count -= count;
        }
        Ok(())
    }

    /// Lowers counts, but puts those that would reach zero and are to be discarded on the host into
    /// `last`.
    async fn lower_some(
        self: &Arc<Self>,
        freed: &mut Clusters<MetaOffset>,
        discards: bool,
        last: &mut Vec<Clusters<MetaOffset>>,
    ) -> Result<()> {
        /// Clusters handled before the lock is released.
        const AT_ONCE: u64 = 1024;
        let geometry = *self.geometry();
        self.plan(|image, meta| {
            for _ in 0..AT_ONCE.min(freed.count) {
                let at = freed.start;
                let cluster = geometry.cluster_index(at.0);
                image.check_dirty_budget(meta, meta.counts.bytes_to_pin(cluster))?;
                if discards && meta.counts.count(cluster)? == 1 {
                    image.end_compressed_run(meta, at);
                    push_discard(last, at, geometry.cluster_bits());
                } else {
                    image.lower(meta, at)?;
                }
                freed.start = at.plus(geometry.cluster_size());
                freed.count -= 1;
            }
            Ok(())
        })
        .await
    }

    /// The last references: discards the clusters on the host, and only then lowers the counts.
    async fn discard_and_lower(
        self: &Arc<Self>,
        last: Vec<Clusters<MetaOffset>>,
        left: &mut Vec<FreedRun>,
    ) -> Result<()> {
        let geometry = *self.geometry();
        let mut last = last.into_iter();
        while let Some(mut run) = last.next() {
            let len = run.count << geometry.cluster_bits();
            self.note_discard(self.file.discard(run.start, len).await);
            let lowered = self
                .plan(|image, meta| {
                    while run.count > 0 {
                        let cluster = geometry.cluster_index(run.start.0);
                        image.check_dirty_budget(meta, meta.counts.bytes_to_pin(cluster))?;
                        image.lower(meta, run.start)?;
                        run.start = run.start.plus(geometry.cluster_size());
                        run.count -= 1;
                    }
                    Ok(())
                })
                .await;
            if let Err(error) = lowered {
                left.push(FreedRun::unused(run));
                left.extend(last.map(FreedRun::unused));
                return Err(error);
            }
        }
        Ok(())
    }

    fn discards_on_host(&self, reason: FreeReason) -> bool {
        match reason {
            FreeReason::Request => self.config.load().pass_request,
            FreeReason::Metadata => self.config.load().pass_other,
            FreeReason::Reuse => false,
        }
    }

    /// A discard is advisory: a failure costs space only.
    fn note_discard(&self, discarded: Result<()>) {
        if let Err(error) = discarded {
            tracing::debug!(node = self.node_name, %error, "qcow2: host discard failed");
        }
    }
}

fn push_discard(runs: &mut Vec<Clusters<MetaOffset>>, at: MetaOffset, cluster_bits: u32) {
    let one = Clusters { start: at, count: 1 };
    if !runs.last_mut().is_some_and(|run| run.join(&one, cluster_bits)) {
        runs.push(one);
    }
}
