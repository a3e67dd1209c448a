//! Guards of bitmaps: exclusive use of one, and the ownership of an anonymous one.
//!
//! A lease ends in one of two ways. A lease that was *split* has frozen the bitmap, so that a
//! backup copies one point in time, and a successor records what changes meanwhile:
//!
//! ```text
//!                 bitmap                 successor
//! leased          records, busy          -
//! split           frozen, busy           records from now on
//! reclaim         old ∪ new              merged into the bitmap     (failure, drop)
//! abdicate        gone                   takes name and persistence (success)
//! ```
//!
//! A write that completes while a lease is split, reclaimed or abdicated is recorded in one of the
//! two, or in both: see `recorder`.

use std::fmt;
use std::sync::Arc;

use super::edit::{BitmapEdit, Verb, lease_ended};
use super::info::BitmapId;
use super::list::{Entry, LeaseKey, Need, Shared, removed};
use super::persist;
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::model::node::NodeId;
use crate::graph::{Graph, NodeRef};

impl Graph {
    /// Leases a bitmap to `holder`, exclusively, until the returned guard is dropped.
    ///
    /// ```
    /// use bds_core::graph::BitmapOptions;
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let id = disk.add_bitmap(BitmapOptions::named("daily")).await?;
    /// let lease = graph.lease_bitmap(id, "job 'backup0'")?;
    /// let error = graph.lease_bitmap(id, "export 'nbd0'").unwrap_err();
    /// let text = "Bitmap 'daily' is currently in use by another operation and cannot be used";
    /// assert_eq!(error.message(), text);
    /// assert_eq!(error.to_string(), format!("node 'disk': {text}: job 'backup0' holds it"));
    ///
    /// drop(disk.close().await?);
    /// assert!(!lease.is_valid(), "the lease keeps no node open");
    /// assert_eq!(graph.lease_bitmap(id, "export 'nbd0'").unwrap_err().kind(), ErrorKind::Stale);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InUse` names the holder; `InvalidInput`: it is inconsistent; `Stale`: the node has ended;
    /// `NotFound`: the bitmap was removed.
    pub fn lease_bitmap(&self, id: BitmapId, holder: &str) -> Result<BitmapLease> {
        let node = self.acquire(id.node)?;
        node.lease_number(id.number, holder, Need::Use)
    }
}

impl NodeRef {
    /// As [`Graph::lease_bitmap`], by name.
    ///
    /// # Errors
    /// As [`Graph::lease_bitmap`].
    pub fn lease_bitmap(&self, name: &str, holder: &str) -> Result<BitmapLease> {
        let found = self.bitmaps.number_of(name);
        self.lease_number(found.map_err(|error| error.node(self.name()))?, holder, Need::Use)
    }

    /// Leases a bitmap that is going to be removed.
    pub(super) fn lease_for_removal(&self, number: u64) -> Result<BitmapLease> {
        self.lease_number(number, "its removal", Need::Remove)
    }

    fn lease_number(&self, number: u64, holder: &str, need: Need) -> Result<BitmapLease> {
        let shared = Arc::clone(self.bitmaps.shared());
        let leased = self.bitmaps.lock(|| self.len()).lease(number, holder, need);
        let (key, bits) = leased.map_err(|error| error.node(self.name()))?;
        Ok(BitmapLease { shared, node: self.id(), key, bits })
    }

    /// Adds a bitmap without a name, which records. It belongs to `owner` and is removed when the
    /// returned guard is dropped. `granularity`: as [`crate::graph::BitmapOptions::granularity`],
    /// but 64 KiB if it is `None`.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let bitmap = disk.add_anonymous_bitmap("job 'mirror0'", None)?;
    /// let error = graph.remove_bitmap(bitmap.id()).await.unwrap_err();
    /// assert!(error.to_string().contains("belongs to its owner alone"), "{error}");
    ///
    /// let report = disk.close().await?; // before the owner has given it back
    /// let error = report.into_result().unwrap_err().to_string();
    /// let text = "an anonymous bitmap of job 'mirror0' was not removed by its owner";
    /// assert!(error.contains(text), "{error}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`HBitmap::new`].
    pub fn add_anonymous_bitmap(
        &self,
        owner: &str,
        granularity: Option<u32>,
    ) -> Result<AnonymousBitmap> {
        let len = self.len();
        let granularity =
            granularity.unwrap_or_else(|| persist::fitting(persist::DEFAULT_GRANULARITY, len));
        let bits = HBitmap::new(len, granularity).map_err(|error| error.node(self.name()))?;
        let entry = Entry { owner: Some(owner.into()), ..Entry::new(bits) };
        let bits = Arc::clone(&entry.bits);
        let mut locked = self.bitmaps.lock(|| self.len());
        let number = locked.insert(entry);
        locked.publish();
        drop(locked);
        self.tracker().observe_writes();
        let shared = Arc::clone(self.bitmaps.shared());
        Ok(AnonymousBitmap { shared, id: BitmapId { node: self.id(), number }, bits })
    }
}

/// Exclusive use of a bitmap. Keeps neither the bitmap nor its node: see [`BitmapLease::is_valid`].
/// Dropping it is [`BitmapLease::reclaim`].
#[must_use = "the lease ends when this is dropped"]
pub struct BitmapLease {
    shared: Arc<Shared>,
    node: NodeId,
    key: LeaseKey,
    bits: Arc<HBitmap>,
}

impl fmt::Debug for BitmapLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BitmapLease({:?})", self.id())
    }
}

impl BitmapLease {
    /// Which bitmap.
    pub fn id(&self) -> BitmapId {
        BitmapId { node: self.node, number: self.key.number }
    }

    /// False once the node has ended.
    pub fn is_valid(&self) -> bool {
        !self.shared.lock().is_closed
    }

    /// The bits of the bitmap. They go on recording until the lease is split; from then on they
    /// change no more. (A write that is under way at that moment may still mark its granules: too
    /// many, never too few. In a drained section there is none.)
    pub fn bits(&self) -> Arc<HBitmap> {
        Arc::clone(&self.bits)
    }

    /// The bits that record since the lease was split.
    pub fn successor(&self) -> Option<Arc<HBitmap>> {
        let mut locked = self.shared.lock();
        locked.leased(self.key)?.lease.as_ref()?.successor.clone()
    }

    /// Freezes the bitmap: a successor records from now on, if the bitmap was recording. To let
    /// several bitmaps and other edits begin at one point in time, see
    /// [`crate::graph::Change::split_bitmap`].
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BitmapOptions;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// disk.add_bitmap(BitmapOptions::named("daily")).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(0, &[1; 512])?;
    ///
    /// let lease = disk.lease_bitmap("daily", "job 'backup0'")?;
    /// lease.split()?;
    /// guest.write_at(512 << 10, &[2; 512])?; // while the backup runs
    /// assert_eq!(lease.bits().dirty_bytes(), 65536, "what the backup copies");
    ///
    /// lease.abdicate()?; // it succeeded: the next one copies what was written since
    /// assert_eq!(disk.bitmaps()[0].count, 65536);
    /// disk.lease_bitmap("daily", "job 'backup1'")?.split()?; // … fails: nothing is lost
    /// assert_eq!(disk.bitmaps()[0].count, 65536);
    /// # drop(guest);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidInput`: it was split before; `Stale`: the node has ended.
    pub fn split(&self) -> Result<()> {
        let mut locked = self.shared.lock();
        locked.leased(self.key).ok_or_else(lease_ended)?.split()?;
        locked.publish();
        Ok(())
    }

    /// Ends the lease. If it was split, what its successor recorded is merged back: the bitmap has
    /// old and new.
    pub fn reclaim(self) {
        drop(self);
    }

    /// Ends a lease that was split: the successor takes the bitmap's place, with its name, id and
    /// persistence; what was frozen is forgotten.
    ///
    /// # Errors
    /// The lease is reclaimed. `InvalidInput`: it was not split; `Stale`: the node has ended.
    pub fn abdicate(self) -> Result<()> {
        self.give_up(None)
    }

    /// As [`BitmapLease::abdicate`], and marks what is dirty in `uncopied` too: after a backup that
    /// failed half-way, what it did not copy.
    ///
    /// # Errors
    /// As [`BitmapLease::abdicate`]; `InvalidInput`: the lengths differ.
    pub fn abdicate_keeping(self, uncopied: &HBitmap) -> Result<()> {
        self.give_up(Some(uncopied))
    }

    fn give_up(self, uncopied: Option<&HBitmap>) -> Result<()> {
        let mut locked = self.shared.lock();
        let entry = locked.leased(self.key).ok_or_else(lease_ended)?;
        if let (Some(uncopied), Some(lease)) = (uncopied, &entry.lease)
            && let Some(successor) = &lease.successor
        {
            // Before anything else has changed: sizes may differ.
            successor.merge(uncopied)?;
        }
        entry.abdicate()?;
        locked.is_stale = true;
        locked.publish();
        Ok(())
    }

    /// The edit that splits it in a change.
    pub(in crate::graph) fn split_edit(&self, node: &NodeRef) -> BitmapEdit {
        BitmapEdit { node: node.clone(), verb: Verb::Split(self.key) }
    }

    /// The edit that abdicates in a change.
    pub(in crate::graph) fn abdicate_edit(
        &self,
        node: &NodeRef,
        uncopied: Option<Arc<HBitmap>>,
    ) -> BitmapEdit {
        BitmapEdit { node: node.clone(), verb: Verb::Abdicate(self.key, uncopied) }
    }
}

impl Drop for BitmapLease {
    fn drop(&mut self) {
        self.shared.lock().reclaim(self.key);
    }
}

/// Owns a bitmap without a name. Dropping it removes the bitmap.
#[must_use = "the bitmap goes when this is dropped"]
pub struct AnonymousBitmap {
    shared: Arc<Shared>,
    id: BitmapId,
    bits: Arc<HBitmap>,
}

impl fmt::Debug for AnonymousBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnonymousBitmap({:?})", self.id)
    }
}

impl AnonymousBitmap {
    /// Which bitmap.
    pub fn id(&self) -> BitmapId {
        self.id
    }

    /// The bits, which record until this is dropped. A job claims them from here.
    pub fn bits(&self) -> Arc<HBitmap> {
        Arc::clone(&self.bits)
    }
}

impl Drop for AnonymousBitmap {
    fn drop(&mut self) {
        let mut locked = self.shared.lock();
        locked.remove(self.id.number);
        locked.publish();
    }
}

/// The error for an anonymous bitmap that another than its owner would remove.
pub(super) fn belongs_to_owner(entry: &Entry) -> Error {
    let text = format!("{} belongs to its owner alone", entry.describe());
    Error::new(ErrorKind::InvalidInput, text)
}

/// The error for an id that has no bitmap any more.
pub(super) fn gone(node: &NodeRef) -> Error {
    removed().node(node.name())
}
