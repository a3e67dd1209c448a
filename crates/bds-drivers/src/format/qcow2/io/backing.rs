//! The backing node: reads what unallocated clusters show.
//!
//! Past its end there are zeros. The node may be replaced without a call into this driver (the
//! child then leads elsewhere), and a node may grow; so its length is read where it matters, and
//! the cached length only saves a call per layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bds_core::driver::{Child, RcuCell, ReadFlags};
use bds_core::error::Result;
use bds_io::IoVec;

use crate::format::qcow2::layout::units::{mem_len, part_of};

/// The backing child, which may be absent.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Cached flag: true if there is a backing child. One load instead of an RCU read.
    is_there: AtomicBool,
    now: RcuCell<Option<Arc<Child>>>,
    /// Its cached length.
    known_len: AtomicU64,
}

impl Backing {
    pub(crate) fn new(child: Option<Child>) -> Self {
        Self {
            is_there: AtomicBool::new(child.is_some()),
            known_len: AtomicU64::new(child.as_ref().map_or(0, |b| b.len())),
            now: RcuCell::new(child.map(Arc::new)),
        }
    }

    #[inline]
    pub(crate) fn is_some(&self) -> bool {
        self.is_there.load(Ordering::Acquire)
    }

    /// Its length now; 0 if there is none.
    pub(crate) fn len(&self) -> u64 {
        if !self.is_some() {
            return 0;
        }
        let len = self.now.read().as_ref().map_or(0, |child| child.len());
        // Look first: a store would take the cache line from all other readers.
        if len != self.known_len.load(Ordering::Relaxed) {
            self.known_len.store(len, Ordering::Relaxed);
        }
        len
    }

    /// The child, to be read by itself.
    pub(crate) fn child(&self) -> Option<Arc<Child>> {
        self.now.read().clone()
    }

    /// The name of the node it leads to now.
    pub(crate) fn node_name(&self) -> Option<String> {
        self.now.read().as_ref().map(|child| child.node_name())
    }

    /// How many of the `len` bytes at `guest` the backing node has; what follows is zeros.
    #[inline]
    pub(crate) fn available_len(&self, guest: u64, len: u64) -> u64 {
        self.len().saturating_sub(guest).min(len)
    }

    /// Reads what the backing node shows at `guest`, if that needs no waiting.
    #[inline]
    pub(crate) fn try_read(&self, guest: u64, iov: &IoVec) -> Option<Result<()>> {
        if !self.is_some() {
            iov.fill(0..iov.len(), 0);
            return Some(Ok(()));
        }
        let now = self.now.read();
        let child = now.as_ref()?;
        // What it had it still has, or its own range check declines: no call per layer.
        let known_len = self.known_len.load(Ordering::Relaxed);
        if guest.checked_add(iov.len() as u64)? <= known_len {
            return child.try_read(guest, iov);
        }
        let below = self.available_len(guest, iov.len() as u64);
        if below == iov.len() as u64 {
            return child.try_read(guest, iov);
        }
        iov.fill(mem_len(below)..iov.len(), 0);
        if below > 0 {
            return child.try_read(guest, &part_of(iov, 0, below));
        }
        Some(Ok(()))
    }

    /// Reads what the backing node shows.
    pub(crate) async fn read(&self, guest: u64, iov: IoVec) -> Result<()> {
        let below = self.available_len(guest, iov.len() as u64);
        iov.fill(mem_len(below)..iov.len(), 0);
        let now = self.now.read();
        match &*now {
            Some(backing) if below > 0 => {
                backing.read(guest, part_of(&iov, 0, below), ReadFlags::empty()).await
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn exchange(&self, child: Option<Child>) -> Option<Child> {
        let old = self.now.read().clone();
        self.known_len.store(child.as_ref().map_or(0, |b| b.len()), Ordering::Relaxed);
        self.is_there.store(child.is_some(), Ordering::Release);
        self.now.replace(child.map(Arc::new));
        // A task whose caller was dropped may still read from it: then the last reader drops it.
        old.and_then(Arc::into_inner)
    }
}
