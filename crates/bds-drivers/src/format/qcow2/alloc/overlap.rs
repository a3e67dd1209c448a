//! The set of host clusters that hold metadata ([`MetadataMap`]), which no data may overwrite.
//!
//! The set is a bitmap in pages, read without a lock by every write and changed under the lock of
//! `Meta`. A hit means that the image's structures contradict each other: writing would make it
//! worse.
//!
//! Invariant: a cluster is in the set from before its first use as metadata until its reference is
//! removed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::layout::units::Geometry;

/// Clusters of one page (4 KiB of bits), pages of one directory, directories.
const PAGE_BITS: u32 = 15;
const DIR_BITS: u32 = 11;
const DIRS: usize = 4096;
/// Memory for pages: metadata scattered over more than this (32 TiB of file at 64 KiB clusters) is
/// refused.
const MAX_PAGES: usize = 16_384;

type Page = Box<[AtomicU64]>;
type Dir = Box<[OnceLock<Page>]>;

bitflags::bitflags! {
    /// Kinds of metadata, as the overlap options name them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Class: u16 {
        const MAIN_HEADER = 1;
        const ACTIVE_L1 = 2;
        const ACTIVE_L2 = 4;
        const REFCOUNT_TABLE = 8;
        const REFCOUNT_BLOCK = 16;
        const SNAPSHOT_TABLE = 32;
        const INACTIVE_L1 = 64;
        const INACTIVE_L2 = 128;
        const BITMAP_DIRECTORY = 256;
    }
}

impl Class {
    /// Classes known without reading anything.
    const CONSTANT: Self = Self::MAIN_HEADER
        .union(Self::ACTIVE_L1)
        .union(Self::REFCOUNT_TABLE)
        .union(Self::SNAPSHOT_TABLE)
        .union(Self::BITMAP_DIRECTORY);
    /// Classes known from tables that are in memory anyway.
    pub(crate) const CACHED: Self =
        Self::CONSTANT.union(Self::ACTIVE_L2).union(Self::REFCOUNT_BLOCK).union(Self::INACTIVE_L1);

    /// From QEMU's name of a template.
    pub(crate) fn template(word: &str) -> Option<Self> {
        Some(match word {
            "none" => Self::empty(),
            "constant" => Self::CONSTANT,
            "cached" => Self::CACHED,
            "all" => Self::all(),
            _ => return None,
        })
    }
}

/// The set of metadata clusters.
pub(crate) struct MetadataMap {
    cluster_bits: u32,
    /// Made with the first entry: readers never need it.
    dirs: OnceLock<Box<[OnceLock<Dir>]>>,
    pages: AtomicUsize,
}

impl std::fmt::Debug for MetadataMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MetadataMap").field("pages", &self.pages).finish_non_exhaustive()
    }
}

/// Why a cluster could not be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is in the set already: two structures share it.
    Taken,
    /// Farther out than any file we manage, or too scattered.
    TooFar,
}

impl MetadataMap {
    /// An empty set; one that is never used costs nothing.
    pub(crate) fn new(geometry: &Geometry) -> Self {
        Self {
            cluster_bits: geometry.cluster_bits(),
            dirs: OnceLock::new(),
            pages: AtomicUsize::new(0),
        }
    }

    fn place(cluster: u64) -> Option<(usize, usize, usize, u64)> {
        let page = cluster >> PAGE_BITS;
        let dir = usize::try_from(page >> DIR_BITS).ok().filter(|s| *s < DIRS)?;
        let in_dir = usize::try_from(page & ((1 << DIR_BITS) - 1)).ok()?;
        let bit = cluster & ((1 << PAGE_BITS) - 1);
        Some((dir, in_dir, usize::try_from(bit / 64).ok()?, 1 << (bit % 64)))
    }

    #[inline]
    fn page(&self, dir: usize, page: usize) -> Option<&Page> {
        self.dirs.get()?[dir].get()?[page].get()
    }

    fn page_or_new(&self, dir: usize, page: usize) -> &Page {
        let dirs = self.dirs.get_or_init(|| (0..DIRS).map(|_| OnceLock::new()).collect());
        let dir =
            dirs[dir].get_or_init(|| (0..1usize << DIR_BITS).map(|_| OnceLock::new()).collect());
        dir[page]
            .get_or_init(|| (0..1usize << (PAGE_BITS - 6)).map(|_| AtomicU64::new(0)).collect())
    }

    /// All pages with their places.
    fn all_pages(&self) -> impl Iterator<Item = (usize, usize, &Page)> {
        let dirs = self.dirs.get().into_iter().flatten().enumerate();
        let dirs = dirs.filter_map(|(number, dir)| Some((number, dir.get()?)));
        dirs.flat_map(|(number, dir)| {
            let pages = dir.iter().enumerate();
            pages.filter_map(move |(page, words)| Some((number, page, words.get()?)))
        })
    }

    /// Becomes a copy of `other`. The caller makes sure that no request looks meanwhile.
    pub(crate) fn adopt(&self, other: &Self) {
        for (_, _, page) in self.all_pages() {
            page.iter().for_each(|word| word.store(0, Ordering::Release));
        }
        for (dir, number, page) in other.all_pages() {
            if self.page(dir, number).is_none() {
                self.pages.fetch_add(1, Ordering::Relaxed);
            }
            for (to, from) in self.page_or_new(dir, number).iter().zip(page) {
                to.store(from.load(Ordering::Acquire), Ordering::Release);
            }
        }
    }

    /// Enters the cluster at `at`.
    pub(crate) fn insert(&self, at: MetaOffset) -> Result<(), Refused> {
        let (dir, page, word, bit) =
            Self::place(at.0 >> self.cluster_bits).ok_or(Refused::TooFar)?;
        if self.page(dir, page).is_none() && self.pages.fetch_add(1, Ordering::Relaxed) >= MAX_PAGES
        {
            return Err(Refused::TooFar);
        }
        let page = self.page_or_new(dir, page);
        match page[word].fetch_or(bit, Ordering::AcqRel) & bit {
            0 => Ok(()),
            _ => Err(Refused::Taken),
        }
    }

    /// Takes the cluster at `at` out.
    pub(crate) fn remove(&self, at: MetaOffset) {
        let Some((dir, page, word, bit)) = Self::place(at.0 >> self.cluster_bits) else {
            return;
        };
        if let Some(page) = self.page(dir, page) {
            page[word].fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// The first metadata cluster that `len` bytes at `at` touch.
    #[inline]
    pub(crate) fn hit(&self, at: MetaOffset, len: u64) -> Option<MetaOffset> {
        let last = at.0.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        let mut cluster = at.0 >> self.cluster_bits;
        while cluster <= last {
            let (dir, page, word, bit) = Self::place(cluster)?;
            let Some(page) = self.page(dir, page) else {
                // The whole page is free of metadata.
                cluster = (cluster | ((1 << PAGE_BITS) - 1)) + 1;
                continue;
            };
            if page[word].load(Ordering::Acquire) & bit != 0 {
                return Some(MetaOffset(cluster << self.cluster_bits));
            }
            cluster += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hit_finds_inserted_clusters_only() {
        let map = MetadataMap::new(&Geometry::new(16, false, 4).unwrap());
        let hit = |at, len| map.hit(MetaOffset(at), len).map(|hit| hit.0);
        assert_eq!(hit(0, 1 << 40), None);
        for cluster in [0u64, 1, 32_767, 32_768, 1 << 30] {
            assert_eq!(map.insert(MetaOffset(cluster << 16)), Ok(()));
            assert_eq!(map.insert(MetaOffset(cluster << 16)), Err(Refused::Taken));
        }
        assert_eq!(hit((2 << 16) - 1, 1), Some(1 << 16));
        assert_eq!(hit(2 << 16, 32_765 << 16), None);
        assert_eq!(hit(2 << 16, (32_765 << 16) + 1), Some(32_767 << 16));
        assert_eq!(hit(40_000 << 16, 1 << 50), Some(1 << 46));
        map.remove(MetaOffset(1 << 46));
        assert_eq!(hit(40_000 << 16, 1 << 46), None);
        assert_eq!(map.insert(MetaOffset(1 << 62)), Err(Refused::TooFar));
    }
}
