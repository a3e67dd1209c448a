//! Dirty bitmaps of a node as owned objects: ids, leases, guards. Their contents are not part of
//! this file.
//!
//! A bitmap belongs to one node and no graph change moves it. A *named* one belongs to the node: it
//! lives until it is removed or the node ends. An *anonymous* one belongs to its creator, which
//! must drop it before the node ends. A user takes a lease; there is one at a time. A node that
//! ends while a bitmap is leased, or while an anonymous one is left, reports that as a failed
//! close, and closes all the same.

use std::fmt;
use std::sync::{Arc, Mutex};

use super::bitmap_list::{Entry, State, lock};
use super::node::NodeId;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, NodeRef};

/// Longest name of a bitmap, in bytes (what qcow2 can store).
pub const MAX_BITMAP_NAME_LEN: usize = 1023;

/// Identifies a bitmap: its node, and a number that the node never uses again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BitmapId {
    node: NodeId,
    number: u64,
}

impl BitmapId {
    /// The node it belongs to.
    pub fn node(self) -> NodeId {
        self.node
    }
}

/// Facts about a bitmap: id, name, owner, lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapInfo {
    /// Its id.
    pub id: BitmapId,
    /// Its name, unless it is anonymous.
    pub name: Option<Arc<str>>,
    /// The creator of an anonymous one.
    pub owner: Option<Arc<str>>,
    /// The holder of the lease, if it is leased.
    pub leased_by: Option<Arc<str>>,
}

impl NodeRef {
    /// Adds a bitmap of this name. It belongs to the node.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let id = disk.add_bitmap("daily")?;
    /// assert_eq!(disk.find_bitmap("daily"), Some(id));
    /// let error = disk.add_bitmap("daily").unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': there is a bitmap 'daily' already");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidInput` for a name that is empty or longer than
    /// [`MAX_BITMAP_NAME_LEN`].
    pub fn add_bitmap(&self, name: &str) -> Result<BitmapId> {
        if name.is_empty() || name.len() > MAX_BITMAP_NAME_LEN {
            let message = format!("a bitmap's name is 1 to {MAX_BITMAP_NAME_LEN} bytes long");
            return Err(Error::new(ErrorKind::InvalidInput, message).node(self.name()));
        }
        self.insert(Some(name.into()), None).ok_or_else(|| {
            let message = format!("there is a bitmap '{name}' already");
            Error::new(ErrorKind::AlreadyExists, message).node(self.name())
        })
    }

    /// Adds a bitmap without a name. It belongs to `owner` and is removed when the returned guard
    /// is dropped.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let bitmap = disk.add_anonymous_bitmap("job 'mirror0'");
    /// let error = graph.remove_bitmap(bitmap.id()).unwrap_err();
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
    pub fn add_anonymous_bitmap(&self, owner: &str) -> AnonymousBitmap {
        let id = self.insert(None, Some(owner.into())).expect("no name is taken by nameless ones");
        AnonymousBitmap { list: self.node().bitmaps.state(), id }
    }

    /// `None`: the name is taken.
    fn insert(&self, name: Option<Arc<str>>, owner: Option<Arc<str>>) -> Option<BitmapId> {
        let number = lock(&self.node().bitmaps.state()).insert(name, owner)?;
        Some(BitmapId { node: self.id(), number })
    }

    /// The bitmap of this name.
    pub fn find_bitmap(&self, name: &str) -> Option<BitmapId> {
        self.bitmaps().into_iter().find(|info| info.name.as_deref() == Some(name)).map(|i| i.id)
    }

    /// All bitmaps, oldest first.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// disk.add_bitmap("daily")?;
    /// let lease = graph.lease_bitmap(disk.add_bitmap("weekly")?, "job 'backup0'")?;
    /// let all = disk.bitmaps();
    /// assert_eq!(all[0].name.as_deref(), Some("daily"));
    /// assert_eq!(all[1].leased_by.as_deref(), Some("job 'backup0'"));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        let Some(list) = self.node().bitmaps.get() else { return Vec::new() };
        let info = |entry: &Entry| BitmapInfo {
            id: BitmapId { node: self.id(), number: entry.number },
            name: entry.name.clone(),
            owner: entry.owner.clone(),
            leased_by: entry.leased_by.clone(),
        };
        let mut all: Vec<BitmapInfo> = list.entries.iter().map(|(_, entry)| info(entry)).collect();
        all.sort_by_key(|info| info.id.number);
        all
    }
}

impl Graph {
    /// Leases a bitmap to `holder`, exclusively, until the returned guard is dropped.
    ///
    /// ```
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let id = disk.add_bitmap("daily")?;
    /// let lease = graph.lease_bitmap(id, "job 'backup0'")?;
    /// let error = graph.lease_bitmap(id, "export 'nbd0'").unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': bitmap 'daily' is in use by job 'backup0'");
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
    /// `InUse` names the holder; `Stale`: the node has ended; `NotFound`: the bitmap was removed.
    pub fn lease_bitmap(&self, id: BitmapId, holder: &str) -> Result<BitmapLease> {
        let node = self.acquire(id.node)?;
        let list = node.node().bitmaps.state();
        let mut guard = lock(&list);
        let Some((_, entry)) = guard.find(id.number) else { return Err(gone(&node)) };
        if let Some(other) = &entry.leased_by {
            let message = format!("{} is in use by {other}", entry.describe());
            return Err(Error::new(ErrorKind::InUse, message).node(node.name()));
        }
        entry.leased_by = Some(holder.into());
        drop(guard);
        Ok(BitmapLease { list, id })
    }

    /// Removes a named bitmap.
    ///
    /// ```
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let id = disk.add_bitmap("daily")?;
    /// let lease = graph.lease_bitmap(id, "job 'backup0'")?;
    /// assert_eq!(graph.remove_bitmap(id).unwrap_err().kind(), ErrorKind::InUse);
    /// drop(lease);
    /// graph.remove_bitmap(id)?;
    /// assert_eq!(graph.remove_bitmap(id).unwrap_err().kind(), ErrorKind::NotFound);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Graph::lease_bitmap`]; `InvalidInput` for an anonymous one, which only its owner
    /// removes.
    pub fn remove_bitmap(&self, id: BitmapId) -> Result<()> {
        let node = self.acquire(id.node)?;
        let list = node.node().bitmaps.state();
        let mut guard = lock(&list);
        let Some((place, entry)) = guard.find(id.number) else { return Err(gone(&node)) };
        let refusal = match (&entry.leased_by, &entry.owner) {
            (Some(holder), _) => Some((ErrorKind::InUse, format!("is in use by {holder}"))),
            (None, Some(_)) => Some((ErrorKind::InvalidInput, "belongs to its owner alone".into())),
            (None, None) => None,
        };
        if let Some((kind, message)) = refusal {
            return Err(
                Error::new(kind, format!("{} {message}", entry.describe())).node(node.name())
            );
        }
        guard.entries.remove(place);
        Ok(())
    }
}

fn gone(node: &NodeRef) -> Error {
    Error::new(ErrorKind::NotFound, "the bitmap was removed").node(node.name())
}

/// Exclusive use of a bitmap. Keeps neither the bitmap nor its node: see [`BitmapLease::is_valid`].
#[must_use = "the lease ends when this is dropped"]
pub struct BitmapLease {
    list: Arc<Mutex<State>>,
    id: BitmapId,
}

impl fmt::Debug for BitmapLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BitmapLease({:?})", self.id)
    }
}

impl BitmapLease {
    /// Which bitmap.
    pub fn id(&self) -> BitmapId {
        self.id
    }

    /// False once the node has ended.
    pub fn is_valid(&self) -> bool {
        !lock(&self.list).is_closed
    }
}

impl Drop for BitmapLease {
    fn drop(&mut self) {
        if let Some((_, entry)) = lock(&self.list).find(self.id.number) {
            entry.leased_by = None;
        }
    }
}

/// Owns a bitmap without a name. Dropping it removes the bitmap.
#[must_use = "the bitmap goes when this is dropped"]
pub struct AnonymousBitmap {
    list: Arc<Mutex<State>>,
    id: BitmapId,
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
}

impl Drop for AnonymousBitmap {
    fn drop(&mut self) {
        let mut list = lock(&self.list);
        if let Some((place, _)) = list.find(self.id.number) {
            list.entries.remove(place);
        }
    }
}
