//! Defines where the benches run, and the results of one contestant.

use std::path::PathBuf;

use super::measure::Cost;
use crate::run::{target_dir, which};

/// Results of one contestant.
pub(crate) struct Runs {
    pub(crate) name: String,
    pub(crate) costs: Vec<Cost>,
    /// Runs that did not come to their end: qemu-img bench can overflow its stack when requests
    /// complete at once.
    pub(crate) failed: usize,
    /// Flushes of one more run, if the case asks for them and they can be counted.
    pub(crate) syncs: Option<u64>,
}

/// Where the benches run and with what.
pub(crate) struct Stage {
    pub(crate) dir: PathBuf,
    pub(crate) bds: String,
    pub(crate) has_qemu: bool,
    pub(crate) quick: bool,
}

impl Stage {
    pub(super) fn new(quick: bool) -> Result<Self, String> {
        let dir = target_dir().join("bench");
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let bds = target_dir().join("release/bds").display().to_string();
        Ok(Self { dir, bds, has_qemu: which("qemu-img").is_some(), quick })
    }
}
