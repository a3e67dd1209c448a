//! What an operation under the lock of `Meta` returns: its value, or what it needs before it can begin again.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind};

use super::alloc::in_flight::InFlight;
use super::layout::entry::BadEntry;
use super::meta::tables::SliceId;

/// Something an operation found missing in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MetaKey {
    /// A slice of an L2 table.
    Slice(SliceId),
    /// All slices of an L2 table.
    Table(u32),
    /// A refcount block.
    Block(u64),
}

/// Why an operation under the lock could not go on.
#[derive(Debug)]
pub(crate) enum NeedMeta {
    /// Load this, and begin again.
    Load(MetaKey),
    /// An allocation in flight touches the same clusters: wait for it, and begin again.
    Wait(Arc<InFlight>),
    /// Too much metadata is dirty: wait until some is written back, and begin again.
    WriteBack,
    /// It cannot be done.
    Fail(Error),
    /// The image contradicts itself at this byte of the file.
    Corrupt { what: String, at: u64 },
}

/// What operations under the lock return.
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

/// An entry that cannot be followed, found under the lock.
pub(crate) fn corrupt_entry(bad: BadEntry, guest: u64) -> NeedMeta {
    NeedMeta::Corrupt { what: format!("{bad}, for guest offset {guest:#x}"), at: guest }
}
