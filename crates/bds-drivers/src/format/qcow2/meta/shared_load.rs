//! A load of metadata that several tasks wait for, and its result: what keeps the loaded metadata in memory.

use std::sync::{Arc, OnceLock};

use bds_core::error::Result;

use super::tables::Slice;
use crate::format::qcow2::task::Completion;

/// Keeps something in memory.
#[derive(Clone, Debug)]
pub(crate) enum Pinned {
    Slice(Arc<Slice>),
    Slices(#[expect(dead_code, reason = "held, not looked at")] Vec<Arc<Slice>>),
    Block(#[expect(dead_code, reason = "held, not looked at")] Arc<()>),
    /// It was not there to be loaded any more: look again.
    Gone,
}

/// A load under way.
#[derive(Debug)]
pub(crate) struct Load {
    pub(super) done: Completion,
    pub(super) result: OnceLock<Result<Pinned>>,
}
