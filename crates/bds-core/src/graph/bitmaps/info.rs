//! Facts about bitmaps as values: options of a new one, ids, what a query shows.

use std::sync::Arc;

use serde_json::{Value, json};

use super::list::Entry;
use crate::graph::model::node::NodeId;

/// Longest name of a bitmap, in bytes (what qcow2 can store).
pub const MAX_BITMAP_NAME_LEN: usize = 1023;

/// Identifies a bitmap: its node, and a number that the node never uses again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BitmapId {
    pub(super) node: NodeId,
    pub(super) number: u64,
}

impl BitmapId {
    /// The node it belongs to.
    pub fn node(self) -> NodeId {
        self.node
    }
}

/// Options of a new bitmap, as of `block-dirty-bitmap-add`.
///
/// ```
/// use bds_core::graph::BitmapOptions;
///
/// let options = BitmapOptions { granularity: Some(4096), ..BitmapOptions::named("daily") };
/// assert!(!options.persistent && !options.disabled);
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BitmapOptions {
    /// Its name: 1 to [`MAX_BITMAP_NAME_LEN`] bytes, unique for the node.
    pub name: String,
    /// Bytes that share a bit: a power of two from 512 to 2^31. `None`: the node's cluster size,
    /// but 4 KiB at least and 64 KiB at most; 64 KiB if it has no clusters; more if there would be
    /// more granules than a bitmap can have.
    pub granularity: Option<u32>,
    /// It is stored in the image when the node is closed, inactivated or becomes read-only.
    pub persistent: bool,
    /// It does not record changes until it is enabled.
    pub disabled: bool,
}

impl BitmapOptions {
    /// A bitmap of this name that records, is not persistent, and has the default granularity.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// Facts about a bitmap, as QAPI's `BlockDirtyInfo` has them, and who uses it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapInfo {
    /// Its id.
    pub id: BitmapId,
    /// Its name, unless it is anonymous.
    pub name: Option<Arc<str>>,
    /// Dirty bytes: granules times granularity. Of a bitmap whose lease was split: as frozen.
    pub count: u64,
    /// Bytes that share a bit.
    pub granularity: u32,
    /// Whether it, or the successor of its lease, records changes.
    pub recording: bool,
    /// It is leased.
    pub busy: bool,
    /// It is stored in the image.
    pub persistent: bool,
    /// Its contents are not known, because the image was not closed properly. It can only be
    /// removed.
    pub inconsistent: bool,
    /// It was recovered when the image was opened, because its last user crashed: bytes that are
    /// dirty because it cannot be known whether they are, at most. `None` after it was cleared.
    pub recovered_bytes: Option<u64>,
    /// It cannot be changed, because its node is read-only or inactive.
    pub readonly: bool,
    /// The creator of an anonymous one.
    pub owner: Option<Arc<str>>,
    /// The holder of the lease, if it is leased.
    pub leased_by: Option<Arc<str>>,
}

impl BitmapInfo {
    pub(super) fn new(node: NodeId, entry: &Entry) -> Self {
        Self {
            id: BitmapId { node, number: entry.number },
            name: entry.name.clone(),
            count: entry.bits.dirty_bytes(),
            granularity: entry.bits.granularity(),
            recording: entry.is_enabled && !entry.is_inconsistent,
            busy: entry.lease.is_some(),
            persistent: entry.is_persistent,
            inconsistent: entry.is_inconsistent,
            recovered_bytes: entry.recovered_bytes,
            readonly: entry.is_readonly,
            owner: entry.owner.clone(),
            leased_by: entry.lease.as_ref().map(|lease| Arc::clone(&lease.holder)),
        }
    }

    /// As an element of `dirty-bitmaps` in QEMU's answers: `name` unless it is anonymous, and
    /// `inconsistent` only if it is. Beyond QEMU's: `recovered-bytes` if a crash was survived.
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
    /// let shown = disk.bitmaps()[0].to_json();
    /// assert_eq!((&shown["name"], &shown["count"]), (&"daily".into(), &0.into()));
    /// assert_eq!((&shown["recording"], &shown["busy"]), (&true.into(), &false.into()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn to_json(&self) -> Value {
        let mut value = json!({
            "recording": self.recording,
            "busy": self.busy,
            "persistent": self.persistent,
            "granularity": self.granularity,
            "count": self.count,
        });
        if let Some(name) = &self.name {
            value["name"] = json!(**name);
        }
        if self.inconsistent {
            value["inconsistent"] = json!(true);
        }
        if let Some(bytes) = self.recovered_bytes {
            value["recovered-bytes"] = json!(bytes);
        }
        value
    }
}
