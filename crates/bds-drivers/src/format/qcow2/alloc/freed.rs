//! References to clusters that were given up, as runs of adjacent clusters.

use crate::format::qcow2::layout::space::{Clusters, DataOffset, MetaOffset};

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

/// Where the clusters of a [`Freed`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// In the image file, where they are counted.
    Image(Clusters<MetaOffset>),
    /// In the external data file, which has no counts.
    DataFile(Clusters<DataOffset>),
}

/// References that were given up, one for each of some adjacent clusters.
#[derive(Clone, Debug)]
pub(crate) struct Freed {
    pub(super) which: Which,
    pub(super) why: Why,
    /// The entry of a compressed cluster, whose decompressed form must be forgotten.
    pub(super) inflated: Option<u64>,
}

impl Freed {
    /// Clusters of a table that moved.
    pub(crate) fn metadata(clusters: Clusters<MetaOffset>) -> Self {
        Self { which: Which::Image(clusters), why: Why::Metadata, inflated: None }
    }

    /// Clusters that were allocated and never used.
    pub(crate) fn unused(clusters: Clusters<MetaOffset>) -> Self {
        Self { which: Which::Image(clusters), why: Why::Reuse, inflated: None }
    }

    /// How many clusters are left to give back.
    pub(super) fn count(&self) -> u64 {
        match self.which {
            Which::Image(run) => run.count,
            Which::DataFile(run) => run.count,
        }
    }

    /// Takes `next` in if it goes on where this ends, in the same space.
    pub(super) fn join(&mut self, next: &Self, cluster_bits: u32) -> bool {
        let is_same = self.why == next.why && self.inflated.is_none() && next.inflated.is_none();
        match (&mut self.which, &next.which) {
            (Which::Image(run), Which::Image(next)) => is_same && run.join(next, cluster_bits),
            (Which::DataFile(run), Which::DataFile(next)) => {
                is_same && run.join(next, cluster_bits)
            }
            _ => false,
        }
    }
}
