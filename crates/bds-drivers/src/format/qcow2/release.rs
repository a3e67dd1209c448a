//! Giving up references: the way of a cluster from "no longer pointed at" to "free".
//!
//! ```text
//! frees          the pointer is gone in memory
//! frees_written  a write-back has put that into the file          (cache.rs)
//! frees_durable  and a flush has made it durable                   rule O2
//! ...            everybody who may still know the place has left   (grace.rs)
//! ...            the host was told, if it wants to know, and is done
//! free           the count is lowered: the allocator sees it
//! ```
//!
//! Lowering the count comes last, so no step can race with the cluster's next use. A crash on the way leaves a leak.

use std::sync::Arc;

use bds_core::error::Result;

use super::entry::{L2Entry, Place};
use super::lookup::Found;
use super::state::{Image, Meta, Plan, Stop, What};
use super::write::bad;

/// Why a reference was given up; decides whether the host is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The guest discarded it, or wrote zeros that may unmap.
    Request,
    /// Replaced by an overwrite or never used: it will be used again soon.
    Reuse,
    /// A table moved.
    Metadata,
}

/// References that were given up, one for each of some adjacent clusters.
#[derive(Clone, Debug)]
pub(crate) struct Freed {
    pub cluster: u64,
    pub clusters: u64,
    why: Why,
    /// The entry of a compressed cluster, whose decompressed form must be forgotten.
    inflated: Option<u64>,
    /// In the external data file, which has no counts.
    in_data_file: bool,
}

impl Freed {
    pub(crate) fn metadata(cluster: u64, clusters: u64) -> Self {
        Self { cluster, clusters, why: Why::Metadata, inflated: None, in_data_file: false }
    }

    pub(crate) fn unused(cluster: u64, clusters: u64) -> Self {
        Self { cluster, clusters, why: Why::Reuse, inflated: None, in_data_file: false }
    }

    /// Takes `next` in if it goes on where this ends.
    fn join(&mut self, next: &Self) -> bool {
        let goes_on = self.cluster + self.clusters == next.cluster
            && self.why == next.why
            && self.in_data_file == next.in_data_file
            && self.inflated.is_none()
            && next.inflated.is_none();
        if goes_on {
            self.clusters += next.clusters;
        }
        goes_on
    }
}

/// A run of clusters to tell the host about.
struct Discard {
    cluster: u64,
    clusters: u64,
}

impl Discard {
    fn as_freed(&self) -> Freed {
        Freed { why: Why::Request, ..Freed::unused(self.cluster, self.clusters) }
    }
}

impl Image {
    /// Nothing points where `old` pointed any more, in memory.
    pub(crate) fn free_entry(&self, meta: &mut Meta, old: L2Entry, why: Why) {
        let geometry = self.geometry();
        match old.place(&self.rules) {
            Ok(Place::Cluster(host)) => {
                let freed = Freed {
                    cluster: geometry.cluster_index(host.0),
                    clusters: 1,
                    why,
                    inflated: None,
                    in_data_file: self.data_file.is_some(),
                };
                if !meta.frees.last_mut().is_some_and(|last| last.join(&freed)) {
                    meta.frees.push(freed);
                }
            }
            Ok(Place::Compressed(range)) => {
                let first = geometry.cluster_index(range.offset.0);
                let last = geometry.cluster_index(range.offset.0 + range.len - 1);
                meta.frees.push(Freed {
                    cluster: first,
                    clusters: last - first + 1,
                    why,
                    inflated: Some(old.word),
                    in_data_file: false,
                });
            }
            // What cannot be followed is not freed either: a check will find it.
            Ok(Place::None) | Err(_) => {}
        }
    }

    /// Lowers the count of a cluster that nobody uses any more. At zero it may be handed out at once.
    pub(crate) fn lower(&self, meta: &mut Meta, cluster: u64) -> Plan<()> {
        let geometry = self.geometry();
        if meta.counts.lower(cluster)? == 0 {
            self.metadata.remove(cluster << geometry.cluster_bits());
            self.leave_bytes(meta, cluster);
        }
        Ok(())
    }

    /// Compressed bytes must not go on in this cluster.
    fn leave_bytes(&self, meta: &mut Meta, cluster: u64) {
        if self.geometry().cluster_index(meta.compressed_at) == cluster {
            meta.compressed_at = 0;
        }
    }

    /// Makes the removals written so far durable and gives the clusters back.
    pub(crate) async fn settle_frees(self: &Arc<Self>) -> Result<()> {
        self.flush_frees().await?;
        self.release().await
    }

    /// Makes the removals written so far durable. True if there is something to release.
    pub(crate) async fn flush_frees(self: &Arc<Self>) -> Result<bool> {
        let frees = {
            let mut meta = self.meta();
            if meta.frees_written.is_empty() && !meta.owed.owes_meta_flush() {
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

    /// Gives back clusters whose removal is durable. Must run to its end.
    pub(crate) async fn release(self: &Arc<Self>) -> Result<()> {
        let _turn = self.releasing.lock().await;
        let mut frees = std::mem::take(&mut self.meta().frees_durable);
        if frees.is_empty() {
            return Ok(());
        }
        self.grace.wait().await;
        for word in frees.iter().filter_map(|freed| freed.inflated) {
            self.inflated.forget(word);
        }
        let result = self.release_all(&mut frees).await;
        if result.is_err() {
            // What is left is tried again after the next flush.
            self.meta().frees_durable.extend(frees);
        }
        result
    }

    async fn release_all(self: &Arc<Self>, frees: &mut Vec<Freed>) -> Result<()> {
        let mut last = Vec::new();
        while let Some(freed) = frees.last_mut() {
            let tells = self.tells_host(freed.why);
            let result = if freed.in_data_file {
                self.release_in_data_file(freed, tells).await
            } else {
                self.lower_some(freed, tells, &mut last).await
            };
            if freed.clusters == 0 {
                frees.pop();
            }
            if let Err(error) = result {
                frees.extend(last.iter().map(Discard::as_freed));
                return Err(error);
            }
        }
        self.discard_and_lower(last, frees).await
    }

    /// A data file has no counts: a cluster's place is its own whether it is used or not. It may have data again by now, so each is looked
    /// at once more, and kept from getting data until the host has let go of it.
    async fn release_in_data_file(self: &Arc<Self>, freed: &mut Freed, tells: bool) -> Result<()> {
        let bits = self.geometry().cluster_bits();
        if !tells {
            freed.clusters = 0;
        }
        while freed.clusters > 0 {
            let (guest, max) = (freed.cluster << bits, freed.clusters << bits);
            let (len, item) = self
                .plan(|image, meta| {
                    let max = image.before_others(meta, guest, max)?;
                    let run = match image.lookup(guest, max).map_err(|b| bad(b, guest))? {
                        Found::Run(run) => run,
                        Found::Missing(id) => return Err(Stop::Load(What::Slice(id))),
                    };
                    let clusters = image.geometry().clusters(run.len);
                    let is_unused = !run.kind.has_place();
                    let item = is_unused.then(|| image.enter_flight(meta, guest, clusters, None));
                    Ok((clusters, item))
                })
                .await?;
            let run = Discard { cluster: freed.cluster, clusters: len.min(freed.clusters) };
            if let Some(item) = item {
                self.discard_host(&run).await;
                item.leave(&mut self.meta());
            }
            freed.cluster += run.clusters;
            freed.clusters -= run.clusters;
        }
        Ok(())
    }

    /// Lowers counts, but leaves those that would reach zero and that the host wants to know about in `last`.
    async fn lower_some(
        self: &Arc<Self>,
        freed: &mut Freed,
        tells: bool,
        last: &mut Vec<Discard>,
    ) -> Result<()> {
        /// Clusters handled before others may have the lock.
        const AT_ONCE: u64 = 1024;
        self.plan(|image, meta| {
            for _ in 0..AT_ONCE.min(freed.clusters) {
                image.check_room(meta, meta.counts.bytes_to_pin(freed.cluster))?;
                if tells && meta.counts.count(freed.cluster)? == 1 {
                    image.leave_bytes(meta, freed.cluster);
                    push_discard(last, freed.cluster);
                } else {
                    image.lower(meta, freed.cluster)?;
                }
                freed.cluster += 1;
                freed.clusters -= 1;
            }
            Ok(())
        })
        .await
    }

    /// The last references: tells the host, and only then lowers the counts.
    async fn discard_and_lower(
        self: &Arc<Self>,
        last: Vec<Discard>,
        left: &mut Vec<Freed>,
    ) -> Result<()> {
        let mut last = last.into_iter();
        while let Some(mut run) = last.next() {
            self.discard_host(&run).await;
            let lowered = self
                .plan(|image, meta| {
                    while run.clusters > 0 {
                        image.check_room(meta, meta.counts.bytes_to_pin(run.cluster))?;
                        image.lower(meta, run.cluster)?;
                        run.cluster += 1;
                        run.clusters -= 1;
                    }
                    Ok(())
                })
                .await;
            if let Err(error) = lowered {
                left.push(Freed::unused(run.cluster, run.clusters));
                left.extend(last.map(|run| Freed::unused(run.cluster, run.clusters)));
                return Err(error);
            }
        }
        Ok(())
    }

    fn tells_host(&self, why: Why) -> bool {
        match why {
            Why::Request => self.config.load().pass_request,
            Why::Metadata => self.config.load().pass_other,
            Why::Reuse => false,
        }
    }

    /// Tells the host. Advisory: a failure costs space only.
    async fn discard_host(&self, run: &Discard) {
        let bits = self.geometry().cluster_bits();
        let discarded = self.data().discard(run.cluster << bits, run.clusters << bits).await;
        if let Err(error) = discarded {
            tracing::debug!(node = self.node_name, %error, "qcow2: host discard failed");
        }
    }
}

fn push_discard(runs: &mut Vec<Discard>, cluster: u64) {
    match runs.last_mut() {
        Some(run) if run.cluster + run.clusters == cluster => run.clusters += 1,
        _ => runs.push(Discard { cluster, clusters: 1 }),
    }
}
