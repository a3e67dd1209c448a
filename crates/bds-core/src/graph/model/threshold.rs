//! A mark in a node: the first write that goes past it is told, once.
//!
//! For whoever grows a thin device below before it is full. Not passed is the usual case, and costs a write one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::node::Node;
use crate::event::{Event, EventHub};
use crate::graph::NodeRef;

/// No write ends there.
const OFF: u64 = u64::MAX;

/// A node's mark.
pub(in crate::graph) struct Threshold {
    at: AtomicU64,
    /// Where it is told; known from the first mark on.
    events: OnceLock<EventHub>,
}

impl Default for Threshold {
    fn default() -> Self {
        Self { at: AtomicU64::new(OFF), events: OnceLock::new() }
    }
}

impl Node {
    /// The mark in bytes; beyond every write if there is none.
    #[inline]
    pub(crate) fn write_mark(&self) -> u64 {
        self.threshold.at.load(Ordering::Relaxed)
    }

    /// A write is going to end at `end`, past the mark as it was a moment ago.
    #[cold]
    pub(crate) fn pass_threshold(&self, end: u64) {
        let at = &self.threshold.at;
        let armed = |mark: u64| (end > mark).then_some(OFF);
        // Of writes that pass it at the same time, one tells.
        let Ok(threshold) = at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, armed) else {
            return;
        };
        if let Some(events) = self.threshold.events.get() {
            let node = self.name().to_owned();
            let amount_exceeded = end - threshold;
            events.emit(|| Event::WriteThreshold { node, threshold, amount_exceeded });
        }
    }
}

impl NodeRef {
    /// Has the first write told that ends more than this many bytes into the node ([`Event::WriteThreshold`]); `None` or zero has
    /// none told. The mark goes when it is passed: set another one then. It is passed when the write comes in, before it
    /// is done, and also by zero writes; not by a change of length. Writes of parents inside the graph count.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// disk.set_write_threshold(Some(512 << 10));
    /// assert_eq!(disk.write_threshold(), Some(512 << 10));
    /// disk.set_write_threshold(None);
    /// assert_eq!(disk.write_threshold(), None);
    /// # Ok(()) });
    /// ```
    pub fn set_write_threshold(&self, bytes: Option<u64>) {
        let threshold = &self.node().threshold;
        threshold.events.get_or_init(|| self.graph().event_hub().clone());
        let at = bytes.filter(|bytes| *bytes != 0).unwrap_or(OFF);
        threshold.at.store(at, Ordering::Relaxed);
    }

    /// The mark, if one is set that was not passed yet: QEMU's `write_threshold`.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let mut events = graph.events();
    /// disk.set_write_threshold(Some(4096));
    /// guest.write(4000, bds_io::Buf::zeroed(512, 512).iov(), WriteFlags::empty()).await?;
    ///
    /// let event = events.try_next().expect("it went 416 bytes past the mark");
    /// assert_eq!(event.to_json()["data"]["amount-exceeded"], 416);
    /// assert_eq!(disk.write_threshold(), None, "told once");
    /// # Ok(()) });
    /// ```
    pub fn write_threshold(&self) -> Option<u64> {
        Some(self.node().write_mark()).filter(|at| *at != OFF)
    }
}
