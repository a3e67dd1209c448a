//! A node's write threshold: the first write that ends beyond it is reported by an event, once.
//!
//! For management that grows a thin device before it is full. Checking it costs a write one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::event::{Event, EventHub};

/// No write ends there.
const OFF: u64 = u64::MAX;

/// A write threshold; off at first.
pub(super) struct Threshold {
    at: AtomicU64,
    /// Where the event goes; known from the first threshold on.
    events: OnceLock<EventHub>,
}

impl Default for Threshold {
    fn default() -> Self {
        Self { at: AtomicU64::new(OFF), events: OnceLock::new() }
    }
}

impl Threshold {
    /// In bytes; beyond every write if it is off.
    #[inline]
    pub(super) fn bytes_or_max(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }

    /// In bytes, if it is on.
    pub(super) fn get(&self) -> Option<u64> {
        Some(self.bytes_or_max()).filter(|at| *at != OFF)
    }

    /// `None` or zero turns it off.
    pub(super) fn set(&self, bytes: Option<u64>, events: &EventHub) {
        self.events.get_or_init(|| events.clone());
        let at = bytes.filter(|bytes| *bytes != 0).unwrap_or(OFF);
        self.at.store(at, Ordering::Relaxed);
    }

    /// A write is going to end at `end`: turns a threshold below that off and emits the event.
    #[cold]
    pub(super) fn pass(&self, end: u64, node: &str) {
        let below = |at: u64| (end > at).then_some(OFF);
        // Of writes that pass it at the same time, one emits the event.
        let Ok(threshold) = self.at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below)
        else {
            return;
        };
        if let Some(events) = self.events.get() {
            let node = node.to_owned();
            let amount_exceeded = end - threshold;
            events.emit(|| Event::WriteThreshold { node, threshold, amount_exceeded });
        }
    }
}
