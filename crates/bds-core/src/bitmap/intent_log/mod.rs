//! Write-intent log: dirty bitmaps that survive a crash, in a file beside the disk.
//!
//! A bitmap that is stored only when its disk is closed is of no use after a crash. Here what is
//! stored is at any time *at least* what is dirty: before the first write to a clean region, the
//! region's bit is durable in the log.
//!
//! ```text
//! page 0, 1   header, in turns: epoch, shape of the disk, places of the log and of the snapshot
//! log         two areas of pages, for even and odd epochs: one bit a region
//! snapshot    the exact bitmaps of a moment
//! ```
//!
//! * **Write**: [`IntentLog::log`] the range, then write the data. Regions that are logged already
//!   cost a load; requests that need new ones share one write and one flush ([`log`]).
//! * **Checkpoint**: at a moment without writes the log goes over to the next epoch's area, and
//!   writes go on at once. Then a new snapshot beside the old one, flush, a header of the next
//!   epoch in the other slot, flush.
//! * **After a crash**: the newest valid header; its snapshot; and every region in the area of its
//!   epoch, or in the other area with the epoch after it, is dirty in each bitmap that records. A
//!   page that is torn counts as all its regions. So a bitmap has too much, at most the regions
//!   written since the last checkpoint but one, and never too little.
//!
//! Why nothing is missing: take a write whose bytes may be on the medium. If it was logged in the
//! epoch of the header that is found, or the one after it, its region is found. Else it was logged
//! in an earlier epoch; it had ended, and marked the bitmaps in memory, when the log left that
//! epoch, and the snapshot was copied from them after that.
//!
//! [`page`] is the layout: parsing by pure functions over bytes. [`recover`] reads a file,
//! [`regions`] are the bits in memory. What the log does not notice itself: another program that
//! wrote to the disk meanwhile. Its users tie it to the disk (`Header::disk_id`, `Header::tie`).

pub mod log;
pub mod page;
pub mod recover;
pub mod regions;

pub use log::{Facts, IntentLog};
pub use page::{EndState, Header, Shape, Snapshot, Tie};
pub use recover::{Found, RecoveredBitmap};

#[cfg(test)]
mod tests;
