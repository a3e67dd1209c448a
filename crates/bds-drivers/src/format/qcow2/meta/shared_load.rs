//! A load of metadata that several tasks wait for, and its result: what keeps the loaded metadata in memory.

use std::sync::{Arc, OnceLock};

use bds_core::error::Result;

use super::tables::Slice;
use crate::format::qcow2::task::Done;

/// Keeps something in memory.
#[derive(Clone, Debug)]
pub(crate) enum Hold {
    Slice(Arc<Slice>),
    Slices(#[expect(dead_code, reason = "held, not looked at")] Vec<Arc<Slice>>),
    Block(#[expect(dead_code, reason = "held, not looked at")] Arc<()>),
    /// It was not there to be loaded any more: look again.
    Nothing,
}

/// A load under way.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(super) done: Done,
    pub(super) result: OnceLock<Result<Hold>>,
}
