//! Persistent bitmaps of nodes: loads them from images and stores them there. The contract with
//! drivers is in [`crate::driver::BitmapStore`]'s module.

use std::collections::HashSet;
use std::sync::Arc;

use bds_refcount::Strong;

use super::edit::BitmapEdit;
use super::intent;
use super::list::{BitmapList, Entry, State};
use crate::bitmap::{HBitmap, MAX_GRANULARITY, MAX_GRANULES};
use crate::driver::{BitmapSpec, BitmapStore, BitmapToStore, Driver, StoredBitmap};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeRef;
use crate::graph::model::node::Node;

/// The granularity of bitmaps of nodes without clusters.
pub(super) const DEFAULT_GRANULARITY: u32 = 64 << 10;
/// The smallest granularity that is chosen for a node with small clusters.
const MIN_DEFAULT_GRANULARITY: u64 = 4 << 10;

/// The granularity of a bitmap for which none was asked: see `BitmapOptions::granularity`.
pub(super) async fn default_granularity(node: &Node) -> Result<u32> {
    let cluster = cluster_size(node).await?.unwrap_or(u64::from(DEFAULT_GRANULARITY));
    let chosen = cluster.clamp(MIN_DEFAULT_GRANULARITY, u64::from(DEFAULT_GRANULARITY));
    Ok(fitting(u32::try_from(chosen).unwrap_or(DEFAULT_GRANULARITY), node.len()))
}

/// The granularity, or the next larger one with which a bitmap for `len` bytes has no more granules
/// than it may.
pub(super) fn fitting(mut granularity: u32, len: u64) -> u32 {
    while granularity < MAX_GRANULARITY && len.div_ceil(u64::from(granularity)) > MAX_GRANULES {
        granularity *= 2;
    }
    granularity
}

/// The cluster size of the node, or of the node that it filters.
async fn cluster_size(node: &Node) -> Result<Option<u64>> {
    let mut below = None;
    loop {
        let node: &Node = below.as_deref().unwrap_or(node);
        let info = node.driver().info().await.map_err(|error| error.node(node.name()))?;
        let size = info.cluster_size.filter(|size| size.is_power_of_two());
        let edge = if size.is_none() { node.filtered_child() } else { None };
        match edge {
            Some(edge) => below = Some(bds_refcount::Strong::clone(edge.target().strong())),
            None => return Ok(size),
        }
    }
}

/// Checks that a bitmap can become persistent beside those that are.
pub(super) fn check_can_store(node: &Node, state: &State, entry: &Entry) -> Result<()> {
    let name = entry.name.as_deref().unwrap_or_default();
    let refuse = |error: Error| {
        error.context(format!("Can't make bitmap '{name}' persistent in '{}'", node.name()))
    };
    let Some(store) = node.driver().bitmap_store() else {
        let text =
            format!("Can't store persistent bitmaps to {}: Operation not supported", node.name());
        return Err(Error::new(ErrorKind::NotSupported, text));
    };
    if !node.could_write() {
        let text = "the node is read-only, the bitmap would be lost";
        return Err(refuse(Error::new(ErrorKind::ReadOnly, text)));
    }
    if !node.is_active() {
        let text = "the node is inactive, the bitmap would be lost";
        return Err(refuse(Error::new(ErrorKind::Inactive, text)));
    }
    let others: Vec<BitmapSpec> =
        state.entries.iter().filter(|entry| entry.is_persistent).filter_map(spec).collect();
    let Some(new) = spec(entry) else { return Ok(()) };
    store.can_store(&new, &others).map_err(refuse)
}

/// Whether the node's image can store any bitmap at all.
pub(super) fn can_store_any(node: &Node) -> bool {
    let smallest = BitmapSpec { name: "b".into(), granularity: MAX_GRANULARITY, len: node.len() };
    node.driver().bitmap_store().is_some_and(|store| store.can_store(&smallest, &[]).is_ok())
}

fn spec(entry: &Entry) -> Option<BitmapSpec> {
    let (granularity, len) = (entry.bits.granularity(), entry.bits.len());
    Some(BitmapSpec { name: entry.name.clone()?, granularity, len })
}

/// The node's store, if its bitmaps can be stored now.
fn store_of(node: &Node) -> Option<&dyn BitmapStore> {
    node.driver().bitmap_store().filter(|_| node.is_writable())
}

/// Marks the stored copies of bitmaps that the edits are going to change.
pub(super) async fn mark_edited(edits: &[&BitmapEdit]) -> Result<()> {
    let mut marked = HashSet::new();
    for edit in edits {
        let node = &edit.node;
        let is_needed = {
            let locked = node.bitmaps.lock(|| node.len());
            edit.is_about_stored(&locked)
        };
        if is_needed
            && marked.insert(node.id())
            && let Some(store) = store_of(node)
        {
            let named = |error: Error| {
                error.context("cannot mark the stored bitmaps as in use").node(node.name())
            };
            let _turn = node.bitmaps.shared().store_turn.lock().await;
            // A crash right after the mark must find the log.
            intent::start_before_mark(node).await.map_err(named)?;
            store.mark_in_use().await.map_err(named)?;
        }
    }
    Ok(())
}

/// What a change writes to images before it takes effect.
pub(in crate::graph) struct ImageWork<'a> {
    /// Edits that change what the image stores.
    edits: Vec<&'a BitmapEdit>,
    /// Nodes whose bitmaps are to be stored.
    to_store: Vec<&'a NodeRef>,
}

impl<'a> ImageWork<'a> {
    pub(in crate::graph) fn new(
        edits: impl Iterator<Item = &'a BitmapEdit>,
        to_store: impl Iterator<Item = &'a NodeRef>,
    ) -> Self {
        let marks = |edit: &&BitmapEdit| {
            let node = &edit.node;
            store_of(node).is_some() && edit.is_about_stored(&node.bitmaps.lock(|| node.len()))
        };
        Self { edits: edits.filter(marks).collect(), to_store: to_store.collect() }
    }

    /// The nodes whose drivers write.
    pub(in crate::graph) fn nodes(&self) -> impl Iterator<Item = Strong<Node>> {
        let edited = self.edits.iter().map(|edit| &edit.node);
        edited.chain(self.to_store.iter().copied()).map(|node| Strong::clone(node.strong()))
    }

    pub(in crate::graph) async fn run(&self) -> Result<()> {
        for node in &self.to_store {
            store_all(node).await?;
        }
        mark_edited(&self.edits).await
    }
}

/// Removes a bitmap from the image that stores it.
pub(super) async fn remove_stored(node: &Node, name: &str) -> Result<()> {
    let Some(store) = store_of(node) else { return Ok(()) };
    let _turn = node.bitmaps.shared().store_turn.lock().await;
    let removed = store.remove(name).await;
    removed.map_err(|error| error.context(format!("cannot remove the stored bitmap '{name}'")))
}

/// Removes stored copies of bitmaps that a change has removed. Returns what failed.
pub(in crate::graph) async fn remove_all_stored(removed: Vec<(NodeRef, Arc<str>)>) -> Vec<Error> {
    let mut failed = Vec::new();
    for (node, name) in removed {
        let Some(store) = store_of(&node) else { continue };
        // Another bitmap may have got the name meanwhile: the copy is its own then.
        let _turn = node.bitmaps.shared().store_turn.lock().await;
        if node.bitmaps.lock(|| node.len()).has_name(&name) {
            continue;
        }
        if let Err(error) = store.remove(&name).await {
            let words = format!("cannot remove the stored bitmap '{name}'");
            failed.push(error.context(words).node(node.name()));
        }
    }
    failed
}

/// Stores the persistent bitmaps of a node in its image. No request is in flight.
///
/// # Errors
/// The image's; the bitmaps go on as before.
pub(in crate::graph) async fn store_all(node: &Node) -> Result<()> {
    let Some(store) = store_of(node) else { return Ok(()) };
    let Some(shared) = node.bitmaps.existing() else { return Ok(()) };
    let _turn = shared.store_turn.lock().await;
    let (all, is_stale) = {
        let locked = node.bitmaps.lock(|| node.len());
        if !locked.had_persistent {
            return Ok(());
        }
        let all: Result<Vec<BitmapToStore>> = locked.entries.iter().filter_map(to_store).collect();
        (all?, locked.is_stale)
    };
    let stored = async {
        if is_stale {
            store.mark_in_use().await?;
        }
        store.store(&all).await
    };
    stored
        .await
        .map_err(|error| error.context("cannot store its persistent bitmaps").node(node.name()))?;
    shared.lock().is_stale = false;
    Ok(())
}

/// Stores the persistent bitmaps of a node that is being closed.
///
/// # Errors
/// They are lost: those in the image are marked in use, or older.
pub(in crate::graph) async fn store_at_close(node: &Node) -> Result<()> {
    let stored = match node.is_poisoned() {
        false => store_all(node).await,
        true if node.bitmaps.get().is_some_and(|locked| locked.has_persistent()) => {
            Err(Error::new(ErrorKind::Io, "its requests were given up (poisoned)"))
        }
        true => Ok(()),
    };
    stored.map_err(|error| {
        let name = node.name();
        error.context(format!("Lost persistent bitmaps during inactivation of node '{name}'"))
    })
}

/// The persistent bitmaps of a node as they are now, for its write-intent log: copies, since
/// requests may mark them and make the node longer meanwhile.
///
/// # Errors
/// `LimitExceeded`.
pub(super) fn copies_to_store(node: &Node) -> Result<Vec<BitmapToStore>> {
    let len = node.len();
    let locked = node.bitmaps.lock(|| node.len());
    let all = locked.entries.iter().filter_map(to_store).map(|bitmap| {
        let bitmap = bitmap?;
        let bits = bitmap.bits.map(|bits| bits.resized(len).map(Arc::new)).transpose()?;
        Ok(BitmapToStore { bits, ..bitmap })
    });
    all.collect()
}

/// A persistent bitmap as it is stored: if its lease was split, with what the successor recorded.
fn to_store(entry: &Entry) -> Option<Result<BitmapToStore>> {
    let name = entry.name.clone().filter(|_| entry.is_persistent)?;
    let granularity = entry.bits.granularity();
    let bits = match entry.is_inconsistent {
        true => None,
        false => match entry.merged_bits() {
            Ok(bits) => Some(bits),
            Err(error) => return Some(Err(error)),
        },
    };
    Some(Ok(BitmapToStore { name, granularity, is_enabled: entry.is_enabled, bits }))
}

/// Reads the bitmaps of an image that was just opened or activated.
pub(in crate::graph) async fn load(driver: &dyn Driver) -> Result<Vec<LoadedBitmap>> {
    let Some(store) = driver.bitmap_store() else { return Ok(Vec::new()) };
    let stored = store.load().await.map_err(|error| error.context("cannot load its bitmaps"))?;
    let mut names = HashSet::new();
    for StoredBitmap { name, .. } in &stored {
        let is_name = !name.is_empty() && name.len() <= super::info::MAX_BITMAP_NAME_LEN;
        if !is_name || !names.insert(name.as_str()) {
            let text = format!("the image has two bitmaps '{name}', or that is no name");
            return Err(Error::new(ErrorKind::InvalidImage, text));
        }
    }
    stored.into_iter().map(LoadedBitmap::new).collect()
}

/// A bitmap of an image, checked.
pub(in crate::graph) struct LoadedBitmap {
    name: String,
    is_enabled: bool,
    is_inconsistent: bool,
    recovered_bytes: Option<u64>,
    bits: HBitmap,
}

impl LoadedBitmap {
    fn new(stored: StoredBitmap) -> Result<Self> {
        let StoredBitmap { name, granularity, is_enabled, bits, recovered_bytes } = stored;
        let is_inconsistent = bits.is_none();
        let bits = match bits {
            Some(bits) => bits,
            None => HBitmap::new(0, granularity).map_err(|error| {
                error.with_kind(ErrorKind::InvalidImage).context(format!("bitmap '{name}'"))
            })?,
        };
        Ok(Self { name, is_enabled, is_inconsistent, recovered_bytes, bits })
    }
}

impl BitmapList {
    /// Takes over bitmaps that the image stores. Those that were loaded before go, except leased
    /// ones, which get what is stored in addition.
    pub(in crate::graph) fn set_loaded(&self, loaded: Vec<LoadedBitmap>, len: u64) {
        if loaded.is_empty() && self.existing().is_none() {
            return;
        }
        let mut locked = self.lock(|| len);
        locked.entries.retain(|entry| !entry.is_persistent || entry.lease.is_some());
        locked.is_stale = false;
        for stored in loaded {
            let LoadedBitmap { name, is_enabled, is_inconsistent, recovered_bytes, bits } = stored;
            if let Ok(leased) = locked.named(&name) {
                leased.bits.take_over(&bits);
                continue;
            }
            bits.set_len(len);
            locked.insert(Entry {
                name: Some(name.as_str().into()),
                is_enabled: is_enabled && !is_inconsistent,
                is_persistent: true,
                is_inconsistent,
                recovered_bytes,
                ..Entry::new(bits)
            });
        }
        locked.publish();
    }
}
