//! Computes where the parts of a new image are placed, before any file is touched. Used by create
//! and measure.

use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::layout::header::{MAX_L1_LEN, MAX_REFTABLE_LEN};
use crate::format::qcow2::layout::units::{Geometry, HOST_OFFSET_END};

/// Offsets of the parts of a new image, in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub refblocks_offset: u64,
    pub refblocks: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
    /// Tables that exist from the start.
    pub l2_offset: u64,
    pub l2_tables: u64,
    /// Data clusters that exist from the start, in this file.
    pub data_offset: u64,
    pub data_clusters: u64,
    /// Clusters in use, from the first on.
    pub clusters: u64,
}

impl Layout {
    /// Plans an image of `size` bytes. `mapped`: L2 tables exist. `with_data`: so do the clusters
    /// they point at, in this file.
    pub(crate) fn plan(
        geometry: &Geometry,
        size: u64,
        mapped: bool,
        with_data: bool,
    ) -> Result<Self> {
        let too_large = || {
            Error::new(
                ErrorKind::LimitExceeded,
                "the image size is too large for file format 'qcow2' \
                 (try using a larger cluster size)",
            )
            .field("size", size)
        };
        let l1_entries = geometry.l1_entries(size);
        let l1_len =
            l1_entries.checked_mul(8).filter(|l| *l <= MAX_L1_LEN).ok_or_else(too_large)?;
        let l2_tables = if mapped { l1_entries } else { 0 };
        let data_clusters = if with_data { geometry.clusters(size) } else { 0 };
        let fixed = 1 + geometry.clusters(l1_len) + l2_tables + data_clusters;
        let (reftable_clusters, refblocks) = refcount_clusters(geometry, fixed);
        let cluster = geometry.cluster_size();
        let clusters = fixed + reftable_clusters + refblocks;
        if clusters.checked_mul(cluster).is_none_or(|end| end > HOST_OFFSET_END)
            || reftable_clusters * cluster > MAX_REFTABLE_LEN
        {
            return Err(too_large());
        }
        let refblocks_offset = (1 + reftable_clusters) * cluster;
        let l1_offset = refblocks_offset + refblocks * cluster;
        let l2_offset = l1_offset + geometry.clusters(l1_len) * cluster;
        Ok(Self {
            reftable_offset: cluster,
            reftable_clusters: u32::try_from(reftable_clusters).expect("at most 8 MiB"),
            refblocks_offset,
            refblocks,
            l1_offset,
            l1_entries: u32::try_from(l1_entries).expect("at most 32 MiB"),
            l2_offset,
            l2_tables,
            data_offset: l2_offset + l2_tables * cluster,
            data_clusters,
            clusters,
        })
    }

    /// First byte behind the L1 table, which need not fill its cluster.
    pub(super) fn l1_end(&self) -> u64 {
        self.l1_offset + u64::from(self.l1_entries) * 8
    }
}

/// Clusters of refcount table and refcount blocks that count `others` clusters and themselves.
pub(crate) fn refcount_clusters(geometry: &Geometry, others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        // Both only grow, by less than a cluster in 64, so this ends.
        let need_blocks = (others + table + blocks).div_ceil(geometry.refblock_entries());
        let need_table = (need_blocks * 8).div_ceil(geometry.cluster_size());
        if need_blocks <= blocks && need_table <= table {
            return (table, blocks);
        }
        (table, blocks) = (table.max(need_table), blocks.max(need_blocks));
    }
}
