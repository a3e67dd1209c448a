//! Freed references to clusters, as runs of adjacent clusters on their way to release.

use crate::format::qcow2::layout::space::{Clusters, DataOffset, MetaOffset};

/// Why a reference was freed; decides whether the range is discarded on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FreeReason {
    /// The guest discarded it, or wrote zeros that may unmap.
    Request,
    /// Replaced by an overwrite or never used: it will be reused soon.
    Reuse,
    /// A table moved.
    Metadata,
}

/// Where the clusters of a [`FreedRun`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FreedClusters {
    /// In the image file, where they are counted.
    Image(Clusters<MetaOffset>),
    /// In the external data file, which has no counts.
    DataFile(Clusters<DataOffset>),
}

/// Freed references, one for each of some adjacent clusters.
#[derive(Clone, Debug)]
pub(crate) struct FreedRun {
    pub(super) clusters: FreedClusters,
    pub(super) reason: FreeReason,
    /// The entry of a compressed cluster, to be removed from the cache of decompressed clusters.
    pub(super) compressed_entry: Option<u64>,
}

impl FreedRun {
    /// Clusters of a table that moved.
    pub(crate) fn metadata(clusters: Clusters<MetaOffset>) -> Self {
        Self {
            clusters: FreedClusters::Image(clusters),
            reason: FreeReason::Metadata,
            compressed_entry: None,
        }
    }

    /// Clusters that were allocated and never used.
    pub(crate) fn unused(clusters: Clusters<MetaOffset>) -> Self {
        Self {
            clusters: FreedClusters::Image(clusters),
            reason: FreeReason::Reuse,
            compressed_entry: None,
        }
    }

    /// How many clusters are left to release.
    pub(super) fn count(&self) -> u64 {
        match self.clusters {
            FreedClusters::Image(run) => run.count,
            FreedClusters::DataFile(run) => run.count,
        }
    }

    /// Appends `next` if it begins where this ends, in the same space.
    pub(super) fn join(&mut self, next: &Self, cluster_bits: u32) -> bool {
        let is_same = self.reason == next.reason
            && self.compressed_entry.is_none()
            && next.compressed_entry.is_none();
        match (&mut self.clusters, &next.clusters) {
            (FreedClusters::Image(run), FreedClusters::Image(next)) => {
                is_same && run.join(next, cluster_bits)
            }
            (FreedClusters::DataFile(run), FreedClusters::DataFile(next)) => {
                is_same && run.join(next, cluster_bits)
            }
            _ => false,
        }
    }
}
