//! Host offsets as one type for each address space: the image file, and the node that holds data
//! clusters.
//!
//! ```text
//! MetaOffset   a byte of the image file: header, tables, compressed bytes. Its clusters have refcounts.
//! DataOffset   a byte of the node that holds data clusters. Without an external data file that is the image file too, and a
//!              data cluster has a refcount; with one, a cluster lies at its guest offset there and has none.
//! ```
//!
//! A number in one space means nothing in the other, so each is a type. The nodes that take them:
//! `nodes.rs`.

use std::fmt;

/// A byte of the image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MetaOffset(pub u64);

/// A byte of the node that holds data clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataOffset(pub u64);

/// What both kinds of places can do.
pub(crate) trait Offset: Copy + Eq {
    /// The place `len` bytes behind this one.
    #[must_use]
    fn plus(self, len: u64) -> Self;
}

impl Offset for MetaOffset {
    #[inline]
    fn plus(self, len: u64) -> Self {
        Self(self.0 + len)
    }
}

impl Offset for DataOffset {
    #[inline]
    fn plus(self, len: u64) -> Self {
        Self(self.0 + len)
    }
}

impl fmt::Display for MetaOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host offset {:#x}", self.0)
    }
}

impl fmt::Display for DataOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host offset {:#x}", self.0)
    }
}

/// Adjacent clusters of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Clusters<P> {
    pub start: P,
    pub count: u64,
}

impl<P: Offset> Clusters<P> {
    /// Appends `next` if it begins where this ends.
    pub(crate) fn join(&mut self, next: &Self, cluster_bits: u32) -> bool {
        let goes_on = self.start.plus(self.count << cluster_bits) == next.start;
        if goes_on {
            self.count += next.count;
        }
        goes_on
    }
}

/// Where the data clusters of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// In the image file, allocated and counted.
    Image,
    /// In an external data file, at their guest offsets, without refcounts.
    External,
}

impl Space {
    /// Returns the place in the image file of a data cluster; `None` in an external data file.
    #[inline]
    pub(crate) fn counted(self, place: DataOffset) -> Option<MetaOffset> {
        match self {
            Self::Image => Some(MetaOffset(place.0)),
            Self::External => None,
        }
    }

    /// Returns the data place that a cluster allocated in the image file is.
    pub(crate) fn allocated(self, place: MetaOffset) -> DataOffset {
        assert_eq!(self, Self::Image, "data of an external data file is not allocated");
        DataOffset(place.0)
    }

    /// Returns the data place of a guest offset in an external data file; `None` in the image file.
    pub(crate) fn at_guest(self, guest: u64) -> Option<DataOffset> {
        (self == Self::External).then_some(DataOffset(guest))
    }
}
