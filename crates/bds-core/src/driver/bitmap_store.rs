//! Persistent bitmaps: the contract between the graph, which owns a node's dirty bitmaps, and a
//! driver whose image can store them.
//!
//! ```text
//!             valid in the image ──────── first change of data, or mark_in_use ───────► marked in use
//!  load ────► (or inconsistent)  ◄─────────────────── store ──────────────────────────  (stale)
//! ```
//!
//! A stored bitmap is valid, or marked "in use": then a program changed the disk after it was
//! stored, and what is stored is of no use. The rule that makes a valid one right at any time is
//! the driver's: **before the first write, zero write, discard or resize after `load` or `store`
//! reaches the image, every bitmap in it is marked in use, durably.** The graph calls
//! [`BitmapStore::mark_in_use`] only before it changes a bitmap itself (clear, merge, enable …).
//!
//! When the graph calls:
//!
//! | call | when |
//! |---|---|
//! | `load` | after the driver has opened (before the node can be found), and after `Driver::activate` |
//! | `can_store` | before a bitmap becomes persistent; nothing is written |
//! | `mark_in_use` | before a persistent bitmap is added or edited |
//! | `store` | before `Driver::close`, before `Driver::inactivate`, before a reopen as read-only takes effect, and on request |
//! | `remove` | when a persistent bitmap is removed |
//!
//! A store may keep a write-intent log ([`IntentStore`]): then its bitmaps survive a crash as a
//! superset of what is dirty, and `load` returns them with [`StoredBitmap::recovered_bytes`].
//!
//! `load` is called on read-only images too; the others only while the node is writable and active.
//! Calls do not overlap, except that `can_store`, which only answers, may come at any time. No
//! request of the node is in flight during `load` and `store`; there may be some during
//! `mark_in_use` and `remove`, with which the driver synchronises.

use std::fmt;
use std::sync::Arc;

use super::BoxFuture;
use crate::bitmap::HBitmap;
use crate::bitmap::intent_log::IntentLog;
use crate::error::Result;

/// Facts that decide whether a bitmap can be stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapSpec {
    /// Its name: 1 to 1023 bytes.
    pub name: Arc<str>,
    /// Bytes that share a bit: a power of two from 512.
    pub granularity: u32,
    /// Bytes that it covers.
    pub len: u64,
}

/// A bitmap as [`BitmapStore::load`] found it.
pub struct StoredBitmap {
    /// Its name. The graph refuses an image that has two of one name.
    pub name: String,
    /// Bytes that share a bit.
    pub granularity: u32,
    /// True if it records writes from now on (the flag `auto` of qcow2).
    pub is_enabled: bool,
    /// The dirty granules, for the present length of the disk. `None`: it was marked in use, so it
    /// is inconsistent.
    pub bits: Option<HBitmap>,
    /// `Some` if the last user of the image crashed and the bitmap was recovered: bytes that are
    /// dirty because it cannot be known whether they are, at most.
    pub recovered_bytes: Option<u64>,
}

impl fmt::Debug for StoredBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, granularity, is_enabled, bits, recovered_bytes } = self;
        let mut out = f.debug_struct("StoredBitmap");
        out.field("name", name).field("granularity", granularity).field("is_enabled", is_enabled);
        out.field("bits", bits).field("recovered_bytes", recovered_bytes).finish()
    }
}

/// A bitmap that is to be in the image after [`BitmapStore::store`].
#[derive(Clone, Debug)]
pub struct BitmapToStore {
    /// Its name.
    pub name: Arc<str>,
    /// Bytes that share a bit.
    pub granularity: u32,
    /// Whether it records writes once it is loaded again.
    pub is_enabled: bool,
    /// The dirty granules. `None`: it was inconsistent when it was loaded and stays as it is
    /// stored, marked in use.
    pub bits: Option<Arc<HBitmap>>,
}

/// Stores dirty bitmaps in an image. Implemented by drivers, see [`super::Driver::bitmap_store`];
/// the module says when each method is called.
pub trait BitmapStore: Send + Sync {
    /// All bitmaps in the image. Changes nothing.
    ///
    /// # Errors
    /// The image's list of bitmaps is broken or cannot be read: the node is not opened, or stays
    /// inactive.
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredBitmap>>>;

    /// Checks that one more bitmap can be stored beside `others`, which are all that are persistent
    /// now.
    ///
    /// # Errors
    /// The format's limits, with QEMU's texts where it has one ("Too much space will be occupied
    /// by the bitmap. Use larger granularity").
    fn can_store(&self, new: &BitmapSpec, others: &[BitmapSpec]) -> Result<()>;

    /// Makes the bitmaps in the image exactly these, valid (except inconsistent ones) and durable.
    /// A crash on the way leaves the old ones, the new ones, or none that is valid. If nothing was
    /// marked in use since the last `load` or `store`, the image is right already.
    ///
    /// # Errors
    /// As after a crash on the way. It may be tried again.
    fn store<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>>;

    /// Removes one bitmap from the image, durably; from a log that is started, the graph removes it
    /// by a checkpoint. One that is not in the image is no error: it may
    /// never have been stored.
    ///
    /// # Errors
    /// It is still in the image.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;

    /// Marks every bitmap in the image as in use, durably, unless that was done since the last
    /// `load` or `store`.
    ///
    /// # Errors
    /// The caller's change does not happen.
    fn mark_in_use(&self) -> BoxFuture<'_, Result<()>>;

    /// The write-intent log of the bitmaps, if the store keeps one. The answer never changes.
    fn intent(&self) -> Option<&dyn IntentStore> {
        None
    }
}

/// A write-intent log for the bitmaps of a [`BitmapStore`]: before the first write to a region, the
/// region is durable in the log. The graph decides when; the driver has the file, and ties it to
/// the image. Calls do not overlap with each other, nor with those of the store.
pub trait IntentStore: Send + Sync {
    /// The log. Always the same one.
    fn log(&self) -> &IntentLog;

    /// Starts the log, before the first change of data since `load` or `store`: `all` are the
    /// bitmaps as they are now, and no change of data is under way. Durable when it returns.
    ///
    /// # Errors
    /// The log is not started; the stored bitmaps are as before.
    fn start<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>>;

    /// Flushes the disk, then stores these bitmaps in the log, which has begun an epoch before
    /// ([`IntentLog::begin_epoch`]). Requests are in flight.
    ///
    /// # Errors
    /// What a crash leaves is right as before. May be tried again.
    fn checkpoint<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>>;

    /// The log cannot be written: makes it, and what is stored, count as nothing, durably, so that
    /// the disk can change without it.
    ///
    /// # Errors
    /// It may still count: the disk must not change.
    fn invalidate(&self) -> BoxFuture<'_, Result<()>>;
}
