//! The moment that a point shows: one change gives all of its disks the bitmaps that record what
//! changes after it, or none of them.

use std::time::Duration;

use bds_core::Result;
use bds_core::graph::{BitmapOptions, Graph, NodeRef};
use bds_jobs::{Checkpoint, JobManager};

use crate::cmd::job;

/// What the change did for one disk.
#[derive(Debug)]
pub(super) struct Begun {
    /// The disk's new bitmap; `None` if it keeps none.
    pub(super) bitmap: Option<String>,
    /// How long writes of the disk had to wait for the change.
    pub(super) hold: Duration,
}

/// What the change does for one disk.
#[derive(Debug)]
pub(super) struct Edit<'a> {
    pub(super) disk: &'a NodeRef,
    /// The name of its new bitmap.
    pub(super) bitmap: Option<String>,
    /// Bitmaps that are removed: of points that were not made, or are not needed any more.
    pub(super) removed: Vec<String>,
}

/// Begins to record what changes after the point, in new bitmaps of these names, on all disks at
/// once.
pub(super) async fn take(graph: &Graph, edits: Vec<Edit<'_>>) -> Result<Vec<Begun>> {
    let mut checkpoint = Checkpoint::new(&JobManager::new(graph));
    // The copy takes long: a run that is killed meanwhile leaves the bitmap of the last point
    // valid, because all are stored at once.
    let mut stored = graph.change();
    let mut begun = Vec::with_capacity(edits.len());
    for Edit { disk, bitmap, removed } in edits {
        checkpoint = removed.iter().fold(checkpoint, |all, name| all.remove_bitmap(disk, name));
        if let Some(name) = &bitmap {
            let options = BitmapOptions { persistent: true, ..BitmapOptions::named(name) };
            checkpoint = checkpoint.add_bitmap(disk, options);
            stored = stored.store_bitmaps(disk);
        }
        begun.push(Begun { bitmap, hold: Duration::ZERO });
    }
    if begun.iter().all(|disk| disk.bitmap.is_none()) {
        return Ok(begun);
    }
    let taken = checkpoint.take().await?;
    job::warn_of_left_over(&taken.left_over);
    stored.commit().await?;
    // The report has the disks that were named, in that order.
    let named = begun.iter_mut().filter(|disk| disk.bitmap.is_some());
    for (disk, held) in named.zip(&taken.holds) {
        disk.hold = held.held;
    }
    Ok(begun)
}

/// The longest of the holds, in nanoseconds.
pub(super) fn longest_ns(begun: &[Begun]) -> u128 {
    begun.iter().map(|disk| disk.hold.as_nanos()).max().unwrap_or_default()
}
