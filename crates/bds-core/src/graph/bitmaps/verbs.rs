//! The verbs of bitmaps: QEMU's `block-dirty-bitmap-*`, one at a time. Several at once, and
//! together with other edits of the graph: [`crate::graph::Change`].

use std::ops::Range;

use super::edit::{BitmapEdit, Lists};
use super::info::{BitmapId, BitmapInfo, BitmapOptions};
use super::intent;
use super::lease::{belongs_to_owner, gone};
use super::list::Need;
use super::persist;
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, Node, NodeRef};

impl NodeRef {
    /// Adds a bitmap. It belongs to the node: it lives until it is removed or the node ends.
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
    /// let id = disk.add_bitmap(BitmapOptions::named("daily")).await?;
    /// assert_eq!(disk.find_bitmap("daily"), Some(id));
    /// let error = disk.add_bitmap(BitmapOptions::named("daily")).await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': Bitmap already exists: daily");
    ///
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(70_000, b"changed")?;
    /// assert_eq!(disk.bitmaps()[0].count, 65536);
    /// # drop(guest);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed, unless it says that the log of the bitmaps could not be written: then
    /// the bitmap is there, and a crash may lose it. `AlreadyExists`; `InvalidInput`: the name or
    /// the granularity; `LimitExceeded`: too many granules. If it is to be persistent:
    /// `NotSupported`, `ReadOnly`, `Inactive`, and what the image refuses.
    pub async fn add_bitmap(&self, options: BitmapOptions) -> Result<BitmapId> {
        let name = options.name.clone();
        self.edit_bitmaps(BitmapEdit::add(self, options)).await?;
        self.bitmap(&name)
    }

    /// The bitmap of this name.
    pub fn find_bitmap(&self, name: &str) -> Option<BitmapId> {
        self.bitmap(name).ok()
    }

    /// The bitmap of this name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bitmap(&self, name: &str) -> Result<BitmapId> {
        let found = self.bitmaps.number_of(name);
        let number = found.map_err(|error| error.node(self.name()))?;
        Ok(BitmapId { node: self.id(), number })
    }

    /// All bitmaps, oldest first.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BitmapOptions;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// disk.add_bitmap(BitmapOptions::named("daily")).await?;
    /// disk.add_bitmap(BitmapOptions::named("weekly")).await?;
    /// let lease = disk.lease_bitmap("weekly", "job 'backup0'")?;
    /// let all = disk.bitmaps();
    /// assert_eq!(all[0].name.as_deref(), Some("daily"));
    /// assert_eq!((all[1].busy, all[1].leased_by.as_deref()), (true, Some("job 'backup0'")));
    /// # drop(lease);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        let Some(locked) = self.bitmaps.get() else { return Vec::new() };
        locked.entries.iter().map(|entry| BitmapInfo::new(self.id(), entry)).collect()
    }

    /// Whether the node's image can store persistent bitmaps.
    pub fn stores_bitmaps(&self) -> bool {
        persist::can_store_any(self)
    }

    /// A copy of what a bitmap has recorded: what its `count` counts.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput`: it is inconsistent.
    pub fn copy_bitmap(&self, name: &str) -> Result<HBitmap> {
        let copy = || {
            let locked = self.bitmaps.lock(|| self.len());
            let entry = locked.named(name)?;
            entry.check_consistent()?;
            entry.bits.resized(entry.bits.len())
        };
        copy().map_err(|error| error.node(self.name()))
    }

    /// The first byte of the range that a bitmap has recorded, or has not cleared again.
    ///
    /// # Errors
    /// As [`NodeRef::copy_bitmap`].
    pub fn next_dirty_in_bitmap(&self, name: &str, range: Range<u64>) -> Result<Option<u64>> {
        let look = || {
            let locked = self.bitmaps.lock(|| self.len());
            let entry = locked.named(name)?;
            entry.check_consistent()?;
            Ok(entry.bits.next_dirty(range))
        };
        look().map_err(|error: Error| error.node(self.name()))
    }

    /// Removes a bitmap, from the image too if it is persistent.
    ///
    /// # Errors
    /// The bitmap is still there. `NotFound`; `InUse`; `ReadOnly`; the image could not be written.
    pub async fn remove_bitmap(&self, name: &str) -> Result<()> {
        let id = self.bitmap(name)?;
        self.graph().remove_bitmap(id).await
    }

    /// Forgets all that a bitmap has recorded.
    ///
    /// # Errors
    /// `NotFound`; `InUse`, `ReadOnly`, `InvalidInput`: its state forbids it; the image could not
    /// be written. If only the log of the bitmaps could not be written, the error says so: the edit
    /// is made, and a crash may undo it.
    pub async fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmaps(BitmapEdit::clear(self, name)).await
    }

    /// Lets a bitmap record from now on.
    ///
    /// # Errors
    /// As [`NodeRef::clear_bitmap`].
    pub async fn enable_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmaps(BitmapEdit::enable(self, name)).await
    }

    /// Lets a bitmap record no more. What changes until it is enabled again is missing in it.
    ///
    /// # Errors
    /// As [`NodeRef::clear_bitmap`].
    pub async fn disable_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmaps(BitmapEdit::disable(self, name)).await
    }

    /// Marks in a bitmap what is dirty in others, which may belong to other nodes and have other
    /// granularities. All or nothing; of no bitmaps, nothing.
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
    /// let other = graph.open(Options::parse("driver=mem,node-name=other,size=1M")?).await?;
    /// let fine = BitmapOptions { granularity: Some(4096), ..BitmapOptions::named("fine") };
    /// other.add_bitmap(fine).await?;
    /// disk.add_bitmap(BitmapOptions::named("sum")).await?;
    /// let guest = Backend::new(&other, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(0, b"changed")?;
    /// disk.merge_bitmaps("sum", &[(&other, "fine")]).await?;
    /// assert_eq!(disk.bitmaps()[0].count, 65536, "rounded outwards");
    /// # drop(guest);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`NodeRef::clear_bitmap`]; `InvalidInput` if the nodes differ in length, or belong to
    /// different graphs.
    pub async fn merge_bitmaps(&self, target: &str, sources: &[(&NodeRef, &str)]) -> Result<()> {
        self.edit_bitmaps(BitmapEdit::merge(self, target, sources)).await
    }

    /// Makes one edit, without draining anything.
    async fn edit_bitmaps(&self, mut edit: BitmapEdit) -> Result<()> {
        let named = |error: Error| error.node(self.name());
        edit.resolve().await?;
        let lists = Lists::of([&edit]);
        // Refused before the image is touched.
        drop(lists.stage([&edit])?);
        // In a task: the store's turn is given back also if the caller keeps its future.
        let marked =
            bds_io::spawn_now(async move { persist::mark_edited(&[&edit]).await.map(|()| edit) });
        let edit = marked.await.map_err(named)?;
        let is_stored = edit.is_about_stored(&self.bitmaps.lock(|| self.len()));
        drop(lists.stage([&edit])?.commit());
        drop(lists);
        if is_stored {
            let node = self.clone();
            bds_io::spawn_now(async move { intent::checkpoint(&node).await }).await?;
        }
        Ok(())
    }
}

impl Node {
    /// A copy of the dirty bits of a named bitmap, for a driver above.
    ///
    /// # Errors
    /// `NotFound`; `InUse`: it is leased; `InvalidInput`: it is inconsistent.
    pub(crate) fn copy_bitmap(&self, name: &str) -> Result<HBitmap> {
        let number = self.bitmaps.number_of(name)?;
        let locked = self.bitmaps.lock(|| self.len());
        let entry = locked.find(number).ok_or_else(|| {
            let words = format!("Bitmap '{name}' could not be found");
            Error::new(ErrorKind::NotFound, words)
        })?;
        entry.check(Need::Use)?;
        let copy = HBitmap::new(entry.bits.len(), entry.bits.granularity())?;
        copy.merge(&entry.bits)?;
        Ok(copy)
    }
}

impl Graph {
    /// Removes a named bitmap, from the image too if it is persistent.
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
    /// assert_eq!(graph.remove_bitmap(id).await.unwrap_err().kind(), ErrorKind::InUse);
    /// drop(lease);
    /// graph.remove_bitmap(id).await?;
    /// assert_eq!(graph.remove_bitmap(id).await.unwrap_err().kind(), ErrorKind::NotFound);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// The bitmap is still there. As [`Graph::lease_bitmap`]; `ReadOnly`; `InvalidInput` for an
    /// anonymous one, which only its owner removes; the image could not be written.
    pub async fn remove_bitmap(&self, id: BitmapId) -> Result<()> {
        let node = self.acquire(id.node)?;
        let remove = async move { remove(&node, id.number).await };
        bds_io::spawn_now(remove).await
    }
}

/// Removes a bitmap, first from the image.
async fn remove(node: &NodeRef, number: u64) -> Result<()> {
    let named = |error: Error| error.node(node.name());
    let stored = {
        let locked = node.bitmaps.lock(|| node.len());
        let Some(entry) = locked.find(number) else { return Err(gone(node)) };
        if entry.owner.is_some() {
            entry.check(Need::Remove).map_err(named)?;
            return Err(named(belongs_to_owner(entry)));
        }
        entry.name.clone().filter(|_| entry.is_persistent)
    };
    // Busy meanwhile; if this is dropped or fails, it is as before.
    let lease = node.lease_for_removal(number)?;
    if let Some(name) = &stored {
        persist::remove_stored(node, name).await.map_err(named)?;
    }
    {
        let mut locked = node.bitmaps.lock(|| node.len());
        locked.remove(number);
        locked.publish();
    }
    drop(lease);
    if stored.is_some() { intent::checkpoint(node).await } else { Ok(()) }
}
