//! Counts references to each host cluster, and what refers to it: the memory of a check.
//!
//! Sparse by page and bounded by a budget, so neither a huge file nor a lying table takes more
//! memory than the caller allows. Counts saturate at `u32::MAX`.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use bds_core::error::{Error, ErrorKind, Result};

const PAGE_CLUSTERS: usize = 4096;

/// What refers to a cluster. A cluster has one purpose; two different bits are a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Header = 1,
    L1 = 2,
    L2 = 4,
    Data = 8,
    Compressed = 16,
    Refcounts = 32,
    /// Snapshot table, bitmaps, encryption header.
    Other = 64,
}

/// Set with [`Use::Data`] when the active tree refers to the cluster.
const ACTIVE: u8 = 128;

struct Page {
    uses: Box<[u8; PAGE_CLUSTERS]>,
    small: Box<[u8; PAGE_CLUSTERS]>,
    /// Counts of this page once one of them passed 255.
    large: Option<Box<[u32; PAGE_CLUSTERS]>>,
}

impl Page {
    const SMALL_LEN: u64 = 2 * PAGE_CLUSTERS as u64 + 64;
    const LARGE_LEN: u64 = 4 * PAGE_CLUSTERS as u64;

    fn new() -> Self {
        let zeros = || Box::new([0; PAGE_CLUSTERS]);
        Self { uses: zeros(), small: zeros(), large: None }
    }

    fn count(&self, slot: usize) -> u32 {
        match &self.large {
            Some(large) => large[slot],
            None => u32::from(self.small[slot]),
        }
    }
}

/// References counted so far, by cluster number.
pub(crate) struct RefMap {
    pages: BTreeMap<u64, Page>,
    budget_len: u64,
    used_len: u64,
}

/// What adding a reference revealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    /// References now.
    pub count: u64,
    /// The active tree's data was there already.
    pub is_shared_by_active: bool,
}

impl RefMap {
    /// A map that takes at most `budget_len` bytes.
    pub(crate) fn new(budget_len: u64) -> Self {
        Self { pages: BTreeMap::new(), budget_len, used_len: 0 }
    }

    fn charge(&mut self, len: u64) -> Result<()> {
        self.used_len += len;
        if self.used_len > self.budget_len {
            return Err(Error::new(
                ErrorKind::NoMemory,
                "the check needs more memory than its budget: this image has too many clusters",
            )
            .field("check memory budget in bytes", self.budget_len));
        }
        Ok(())
    }

    /// Takes memory for the caller's own tables from the budget.
    pub(crate) fn reserve(&mut self, len: u64) -> Result<()> {
        self.charge(len)
    }

    /// Counts `times` more references to `cluster`.
    pub(crate) fn add(
        &mut self,
        cluster: u64,
        times: u32,
        purpose: Use,
        is_active: bool,
    ) -> Result<Added> {
        let (number, slot) = split(cluster);
        if !self.pages.contains_key(&number) {
            self.charge(Page::SMALL_LEN)?;
        }
        let page = self.pages.entry(number).or_insert_with(Page::new);
        let mark = if is_active && purpose == Use::Data { ACTIVE } else { 0 };
        let is_shared_by_active = page.uses[slot] & mark != 0;
        page.uses[slot] |= purpose as u8 | mark;
        let sum = u32::from(page.small[slot]).saturating_add(times);
        if page.large.is_none() && sum > u32::from(u8::MAX) {
            let mut large = Box::new([0; PAGE_CLUSTERS]);
            for (to, from) in large.iter_mut().zip(page.small.iter()) {
                *to = u32::from(*from);
            }
            page.large = Some(large);
            self.charge(Page::LARGE_LEN)?;
        }
        let page = self.pages.get_mut(&number).expect("made above");
        let count = match &mut page.large {
            Some(large) => {
                large[slot] = large[slot].saturating_add(times);
                u64::from(large[slot])
            }
            None => {
                page.small[slot] = u8::try_from(sum).expect("compared above");
                u64::from(page.small[slot])
            }
        };
        Ok(Added { count, is_shared_by_active })
    }

    /// References to `cluster`.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        let (number, slot) = split(cluster);
        self.pages.get(&number).map_or(0, |page| u64::from(page.count(slot)))
    }

    /// Calls `each` with every cluster of `range` and its references, in order, used or not.
    pub(crate) fn for_each(&self, range: Range<u64>, mut each: impl FnMut(u64, u64)) {
        let mut cluster = range.start;
        while cluster < range.end {
            let (number, _) = split(cluster);
            let page = self.pages.get(&number);
            let end = range.end.min((number + 1) * PAGE_CLUSTERS as u64);
            for cluster in cluster..end {
                each(cluster, page.map_or(0, |p| u64::from(p.count(split(cluster).1))));
            }
            cluster = end;
        }
    }

    /// The number after the last cluster that something refers to.
    pub(crate) fn end(&self) -> u64 {
        let last = self.pages.iter().next_back().and_then(|(number, page)| {
            let slot = (0..PAGE_CLUSTERS).rev().find(|slot| page.count(*slot) > 0)?;
            Some(number * PAGE_CLUSTERS as u64 + slot as u64 + 1)
        });
        last.unwrap_or(0)
    }

    /// True if different kinds of owners refer to `cluster`.
    pub(crate) fn is_conflict(&self, cluster: u64) -> bool {
        let (number, slot) = split(cluster);
        self.pages.get(&number).is_some_and(|page| (page.uses[slot] & !ACTIVE).count_ones() > 1)
    }

    /// The clusters in `range` that something refers to, in order.
    pub(crate) fn used(&self, range: RangeInclusive<u64>) -> impl Iterator<Item = (u64, u64)> {
        let (first, last) = (*range.start(), *range.end());
        self.pages
            .range(first / PAGE_CLUSTERS as u64..=last / PAGE_CLUSTERS as u64)
            .flat_map(|(number, page)| {
                let base = number * PAGE_CLUSTERS as u64;
                (0..PAGE_CLUSTERS)
                    .map(move |slot| (base + slot as u64, u64::from(page.count(slot))))
            })
            .filter(move |(cluster, count)| *count > 0 && (first..=last).contains(cluster))
    }
}

fn split(cluster: u64) -> (u64, usize) {
    let pages = PAGE_CLUSTERS as u64;
    let slot = usize::try_from(cluster % pages).expect("the remainder of a page");
    (cluster / pages, slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_also_past_255() {
        let mut map = RefMap::new(1 << 20);
        for _ in 0..300 {
            map.add(7, 1, Use::Data, false).unwrap();
        }
        map.add(8, 1, Use::Data, false).unwrap();
        map.add(1 << 50, 1, Use::L2, false).unwrap();
        assert_eq!((map.count(7), map.count(8), map.count(9)), (300, 1, 0));
        let all: Vec<_> = map.used(0..=u64::MAX).collect();
        assert_eq!(all, [(7, 300), (8, 1), (1 << 50, 1)]);
        assert_eq!(map.used(8..=9).collect::<Vec<_>>(), [(8, 1)]);
    }

    #[test]
    fn conflicts_and_sharing_are_seen() {
        let mut map = RefMap::new(1 << 20);
        assert!(!map.add(1, 1, Use::Data, true).unwrap().is_shared_by_active);
        assert!(!map.add(1, 1, Use::Data, false).unwrap().is_shared_by_active);
        assert!(map.add(1, 1, Use::Data, true).unwrap().is_shared_by_active);
        assert!(!map.is_conflict(1));
        map.add(1, 1, Use::L2, true).unwrap();
        assert!(map.is_conflict(1));
    }

    #[test]
    fn memory_budget_is_enforced() {
        let mut map = RefMap::new(3 * Page::SMALL_LEN);
        let far = |i: u64| i << 20;
        for i in 0..3 {
            map.add(far(i), 1, Use::Data, false).unwrap();
        }
        assert_eq!(map.add(far(3), 1, Use::Data, false).unwrap_err().kind(), ErrorKind::NoMemory);
    }
}
