//! Guest offsets and the arithmetic of clusters ([`Geometry`]).
//!
//! A guest offset and a host offset are both byte counts and must never be mixed: each is its own
//! type (host offsets: `space.rs`). A [`Geometry`] holds the three numbers of a header that decide
//! every index; it exists only with values the format allows, so its shifts cannot overflow.
//! Nothing here does I/O.
//!
//! ```text
//! guest offset   | l1_index | l2_index | subcluster | byte |
//!                           ^ l2 span  ^ cluster    ^ subcluster (extended L2: cluster / 32)
//! ```

use std::fmt;

use bds_io::IoVec;

/// Host offsets of tables and data must stay below this (an entry has bits 9 to 55 for them).
pub(crate) const HOST_OFFSET_END: u64 = 1 << 56;
/// Smallest and largest `cluster_bits`.
pub(crate) const MIN_CLUSTER_BITS: u32 = 9;
/// QEMU's largest cluster is 2 MiB.
pub(crate) const MAX_CLUSTER_BITS: u32 = 21;
/// Extended L2 needs subclusters of at least 512 bytes.
pub(crate) const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Subclusters of a cluster with extended L2.
pub(crate) const SUBCLUSTERS: u32 = 32;
/// Largest `refcount_order` (64-bit refcounts).
pub(crate) const MAX_REFCOUNT_ORDER: u32 = 6;

/// A byte of the virtual disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GuestOffset(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest offset {:#x}", self.0)
    }
}

/// The numbers that decide every index: cluster size, width of an L2 entry, width of a refcount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
    refcount_order: u32,
}

impl Geometry {
    /// `None` if the format does not allow the combination.
    pub(crate) fn new(cluster_bits: u32, extended_l2: bool, refcount_order: u32) -> Option<Self> {
        let min = if extended_l2 { MIN_EXTENDED_CLUSTER_BITS } else { MIN_CLUSTER_BITS };
        let fits = (min..=MAX_CLUSTER_BITS).contains(&cluster_bits);
        (fits && refcount_order <= MAX_REFCOUNT_ORDER).then_some(Self {
            cluster_bits,
            extended_l2,
            refcount_order,
        })
    }

    #[inline]
    pub(crate) fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    #[inline]
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The cluster size as a length in memory.
    #[inline]
    pub(crate) fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    #[inline]
    pub(crate) fn has_extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Bytes of one L2 entry.
    #[inline]
    pub(crate) fn l2_entry_len(&self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the entries of an L2 table.
    #[inline]
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries of an L2 table.
    #[inline]
    pub(crate) fn l2_entries(&self) -> usize {
        1 << self.l2_bits()
    }

    /// log2 of the guest bytes one L2 table maps.
    #[inline]
    pub(crate) fn l2_span_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Guest bytes one L2 table maps.
    #[inline]
    pub(crate) fn l2_span(&self) -> u64 {
        1 << self.l2_span_bits()
    }

    #[inline]
    pub(crate) fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.0 >> self.l2_span_bits()
    }

    #[inline]
    pub(crate) fn l2_index(&self, guest: GuestOffset) -> usize {
        let index = (guest.0 >> self.cluster_bits) & ((1 << self.l2_bits()) - 1);
        usize::try_from(index).expect("an L2 table has at most 2^18 entries")
    }

    /// The first guest byte that entry `l2_index` of table `l1_index` maps; saturates for tables no
    /// disk has.
    pub(crate) fn guest_offset(&self, l1_index: u64, l2_index: usize) -> GuestOffset {
        let table = l1_index.saturating_mul(self.l2_span());
        let entry = u64::try_from(l2_index).unwrap_or(u64::MAX) << self.cluster_bits;
        GuestOffset(table.saturating_add(entry))
    }

    /// log2 of the unit that an entry can describe by itself: the subcluster, or the cluster
    /// without extended L2.
    #[inline]
    pub(crate) fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 5 } else { 0 }
    }

    #[inline]
    pub(crate) fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Subclusters of a cluster: 32, or 1 without extended L2.
    #[inline]
    pub(crate) fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Which subcluster of its cluster holds `guest`; 0 without extended L2.
    #[inline]
    pub(crate) fn subcluster_index(&self, guest: GuestOffset) -> u32 {
        let index = (guest.0 >> self.subcluster_bits()) & u64::from(self.subclusters() - 1);
        u32::try_from(index).expect("there are at most 32 subclusters")
    }

    /// Bytes between the start of the cluster and `offset`.
    #[inline]
    pub(crate) fn offset_in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    #[inline]
    pub(crate) fn is_cluster_aligned(&self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    /// Start of the cluster that holds `offset`.
    #[inline]
    pub(crate) fn cluster_floor(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The next cluster boundary at or after `offset`; `None` past the end of the number line.
    #[inline]
    pub(crate) fn cluster_ceil(&self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.cluster_size())
    }

    /// Number of the cluster that holds `offset`.
    #[inline]
    pub(crate) fn cluster_index(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Clusters needed for `len` bytes.
    #[inline]
    pub(crate) fn clusters(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// L1 entries needed for a disk of `size` bytes.
    #[inline]
    pub(crate) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    #[inline]
    pub(crate) fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// The same with refcounts `2^order` bits wide, `order` at most 6.
    pub(crate) fn with_refcount_order(&self, order: u32) -> Self {
        assert!(order <= MAX_REFCOUNT_ORDER, "refcounts have 1 to 64 bits");
        Self { refcount_order: order, ..*self }
    }

    /// Bits of one refcount.
    #[inline]
    pub(crate) fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that can be stored.
    #[inline]
    pub(crate) fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// log2 of the refcounts of a refcount block.
    #[inline]
    pub(crate) fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Counts of a refcount block.
    #[inline]
    pub(crate) fn refblock_entries(&self) -> u64 {
        1 << self.refblock_bits()
    }

    /// Slot of the refcount table whose block counts cluster number `cluster`.
    #[inline]
    pub(crate) fn reftable_index(&self, cluster: u64) -> u64 {
        cluster >> self.refblock_bits()
    }

    /// Index of cluster number `cluster` in its refcount block.
    #[inline]
    pub(crate) fn refblock_index(&self, cluster: u64) -> usize {
        let index = cluster & (self.refblock_entries() - 1);
        usize::try_from(index).expect("a refcount block has at most 2^24 entries")
    }

    /// Bits of a compressed descriptor that hold the host offset (qcow2.txt, "Compressed Clusters
    /// Descriptor").
    #[inline]
    pub(crate) fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The largest host offset a compressed cluster can begin at.
    #[inline]
    pub(crate) fn max_compressed_offset(&self) -> u64 {
        ((1 << self.compressed_offset_bits()) - 1).min(HOST_OFFSET_END - 1)
    }
}

/// Converts a length of a request to `usize`.
pub(crate) fn mem_len(len: u64) -> usize {
    usize::try_from(len).expect("requests fit memory")
}

/// The part `at..at + len` of a list, without copying the list if that is all of it.
pub(crate) fn part_of(iov: &IoVec, at: u64, len: u64) -> IoVec {
    let range = mem_len(at)..mem_len(at + len);
    if range == (0..iov.len()) { iov.clone() } else { iov.slice(range) }
}

/// Runs of set bits as (first, count).
pub(crate) fn joined_bits(mut bits: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let skip = bits.trailing_zeros();
        bits >>= skip;
        let count = bits.trailing_ones();
        bits = bits.checked_shr(count).unwrap_or(0);
        let first = at + skip as usize;
        at = first + count as usize;
        Some((first, count as usize))
    })
}

/// A mask of the first `count` (1 to 64) bits.
pub(crate) fn all_pieces(count: usize) -> u64 {
    u64::MAX >> (64 - count.clamp(1, 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_exists_only_within_the_formats_limits() {
        for (bits, ext, order, ok) in [
            (8, false, 4, false),
            (9, false, 4, true),
            (21, false, 4, true),
            (22, false, 4, false),
            (13, true, 4, false),
            (14, true, 4, true),
            (16, false, 6, true),
            (16, false, 7, false),
            (u32::MAX, false, 4, false),
        ] {
            assert_eq!(Geometry::new(bits, ext, order).is_some(), ok, "{bits} {ext} {order}");
        }
    }

    #[test]
    fn indexes_round_trip() {
        for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            for ext in [false, true] {
                let Some(g) = Geometry::new(bits, ext, 4) else { continue };
                for offset in
                    [0, 1, g.cluster_size(), g.l2_span() - 1, g.l2_span(), 1 << 40, 1 << 62]
                {
                    let at = GuestOffset(offset);
                    let start = g.guest_offset(g.l1_index(at), g.l2_index(at));
                    assert_eq!(start.0, g.cluster_floor(offset));
                    let sub = u64::from(g.subcluster_index(at)) << g.subcluster_bits();
                    assert!(offset - start.0 - sub < g.subcluster_size());
                }
            }
        }
    }

    #[test]
    fn default_image_geometry() {
        let g = Geometry::new(16, false, 4).unwrap();
        assert_eq!((g.l2_entries(), g.l2_span()), (8192, 512 << 20));
        assert_eq!((g.refblock_entries(), g.refcount_max()), (32768, 65535));
        assert_eq!((g.l1_entries(0), g.l1_entries(1), g.l1_entries((512 << 20) + 1)), (0, 1, 2));
        assert_eq!(g.compressed_offset_bits(), 54);
        let wide = Geometry::new(21, true, 6).unwrap();
        assert_eq!((wide.subcluster_size(), wide.refcount_max()), (65536, u64::MAX));
        assert_eq!(
            Geometry::new(9, false, 0).unwrap().max_compressed_offset(),
            HOST_OFFSET_END - 1
        );
    }
}
