//! The result of an operation under the lock of `Meta`: a value, or what must be loaded or awaited
//! before it can run again.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind};

use super::alloc::in_flight::InFlight;
use super::layout::entry::BadEntry;
use super::meta::tables::SliceId;

/// Names metadata that must be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MetaKey {
    /// A slice of an L2 table.
    Slice(SliceId),
    /// All slices of an L2 table.
    Table(u32),
    /// A refcount block.
    Block(u64),
}

/// Why an operation under the lock stopped: what it needs, or its error.
#[derive(Debug)]
pub(crate) enum NeedMeta {
    /// Load this, and run it again.
    Load(MetaKey),
    /// An allocation in flight touches the same clusters: wait for it, and run it again.
    Wait(Arc<InFlight>),
    /// Too much metadata is dirty: wait until some is written back, and run it again.
    WriteBack,
    /// It failed.
    Fail(Error),
    /// The image contradicts itself at this byte of the file.
    Corrupt { what: String, at: u64 },
}

/// The result of an operation under the lock.
pub(crate) type MetaResult<T> = std::result::Result<T, NeedMeta>;

impl From<Error> for NeedMeta {
    fn from(error: Error) -> Self {
        Self::Fail(error)
    }
}

impl NeedMeta {
    pub(crate) fn too_large(message: &str) -> Self {
        Self::Fail(Error::new(ErrorKind::LimitExceeded, message))
    }
}

/// The error of an entry that cannot be followed, found under the lock.
pub(crate) fn corrupt_entry(bad: BadEntry, guest: u64) -> NeedMeta {
    NeedMeta::Corrupt { what: format!("{bad}, for guest offset {guest:#x}"), at: guest }
}
