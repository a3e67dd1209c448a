//! Write-intent log: dirty bitmaps that survive a crash, in a file beside the disk.
//!
//! A bitmap that is stored only when its disk is closed is of no use after a crash. Here what is
//! stored is at any time *at least* what is dirty: before the first write to a clean region, the
//! region's bit is durable in the log.
//!
//! ```text
//! page 0, 1   header, in turns: epoch, shape of the disk, place of the snapshot
//! page 2 …    log: one bit a region; a page counts only if it has the header's epoch
//! behind      snapshot: the exact bitmaps of a moment at which no write was under way
//! ```
//!
//! * **Write**: [`IntentLog::log`] the range, then write the data. Regions that are logged already
//!   cost a load; requests that need new ones share one write and one flush ([`log`]).
//! * **Checkpoint**: a new snapshot beside the old one, flush, a header with the next epoch in the
//!   other slot, flush. The log is empty from then on: its pages have the old epoch.
//! * **After a crash**: the newest valid header; its snapshot; and every region of its epoch's log
//!   is dirty in each bitmap that records. A log page that is torn counts as all regions. So a
//!   bitmap has too much, at most the regions written since the last checkpoint, and never too
//!   little.
//!
//! [`page`] is the layout: parsing by pure functions over bytes. What it does not notice: another
//! program that wrote to the disk meanwhile.

pub mod log;
pub mod page;

pub use log::{IntentLog, Recovered};

#[cfg(test)]
mod tests;
