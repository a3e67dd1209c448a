//! A load of metadata that several requests wait for ([`Load`]), and its result, which keeps the
//! metadata in memory ([`Pinned`]).

use std::sync::{Arc, OnceLock};

use bds_core::error::Result;

use super::tables::Slice;
use crate::format::qcow2::task::Completion;

/// Keeps loaded metadata in memory.
#[derive(Clone, Debug)]
pub(crate) enum Pinned {
    Slice(Arc<Slice>),
    Slices(#[expect(dead_code, reason = "held, not looked at")] Vec<Arc<Slice>>),
    Block(#[expect(dead_code, reason = "held, not looked at")] Arc<()>),
    /// It does not exist any more: look again.
    Gone,
}

/// A load in progress.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) done: Completion,
    pub(super) result: OnceLock<Result<Pinned>>,
}
