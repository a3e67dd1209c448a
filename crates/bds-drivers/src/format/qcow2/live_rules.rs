//! The rules by which the entries of an open image are read ([`LiveRules`]): they change when its
//! version or the width of its refcounts is amended.
//!
//! Every lookup uses them without a lock, so all that an amendment can lead to are made at open,
//! and an index says which hold: one load more than if they never changed.

use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};

use super::layout::entry::EntryRules;
use super::layout::header::Header;
use super::layout::units::MAX_REFCOUNT_ORDER;

/// Refcount orders in the low bits of the index, the version above.
const ORDERS: usize = 8;

/// The rules of an open image.
#[derive(Debug)]
pub(crate) struct LiveRules {
    all: [EntryRules; 2 * ORDERS],
    now: AtomicU8,
}

impl LiveRules {
    pub(crate) fn new(header: &Header, has_data_file: bool) -> Self {
        let all = std::array::from_fn(|index| {
            let order = u32::try_from(index % ORDERS).unwrap_or(0).min(MAX_REFCOUNT_ORDER);
            EntryRules {
                geometry: header.geometry.with_refcount_order(order),
                has_zero_flag: index >= ORDERS,
                has_data_file,
            }
        });
        let this = Self { all, now: AtomicU8::new(0) };
        this.set(header);
        this
    }

    /// Lets those of `header` hold, whose version and refcount width alone may differ from before.
    /// No request that reads or writes is in flight.
    pub(crate) fn set(&self, header: &Header) {
        let order = u8::try_from(header.geometry.refcount_order()).expect("at most 6");
        let version = if header.version >= 3 { 8 } else { 0 };
        debug_assert_eq!(self.geometry.cluster_bits(), header.geometry.cluster_bits());
        self.now.store(version | order, Ordering::Release);
    }
}

impl Deref for LiveRules {
    type Target = EntryRules;

    #[inline]
    fn deref(&self) -> &EntryRules {
        &self.all[usize::from(self.now.load(Ordering::Acquire)) % (2 * ORDERS)]
    }
}
