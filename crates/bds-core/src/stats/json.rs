//! Formats statistics as JSON under QEMU's names: `BlockDeviceStats`.

use serde_json::{Map, Value, json};

use super::interval::{IntervalStats, Spread};
use super::operation::{Operation, nanos};
use super::{Stats, Totals};

/// QEMU's prefixes and the operations each sums up: a zero write is a write there.
const GROUPS: [(&str, &[Operation]); 4] = [
    ("rd", &[Operation::Read]),
    ("wr", &[Operation::Write, Operation::Zero]),
    ("unmap", &[Operation::Discard]),
    ("flush", &[Operation::Flush]),
];

impl Stats {
    /// The counts as `query-blockstats` names them, times in nanoseconds. A zero write counts as a
    /// write. `idle_time_ns` and the histograms are there only if measured. There is no
    /// `wr_highest_offset`, which is a node's in QEMU.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// let drive = Backend::empty(&graph, BackendOptions::default())?;
    /// assert!(drive.read_at(0, &mut [0; 512]).is_err(), "there is no medium");
    /// let stats = drive.stats().to_json();
    /// let counts = (&stats["rd_operations"], &stats["failed_rd_operations"]);
    /// assert_eq!(counts, (&0.into(), &1.into()));
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for (prefix, operations) in GROUPS {
            let sum = self.sum(operations);
            let mut set = |key: String, value: u64| all.insert(key, json!(value));
            set(format!("{prefix}_operations"), sum.done());
            set(format!("{prefix}_total_time_ns"), nanos(sum.total_time));
            set(format!("failed_{prefix}_operations"), sum.failed);
            set(format!("invalid_{prefix}_operations"), sum.invalid);
            set(format!("{prefix}_merged"), sum.merged);
            if prefix != "flush" {
                set(format!("{prefix}_bytes"), sum.bytes);
            }
        }
        all.insert("account_failed".into(), json!(self.is_on(&self.counts_failed)));
        all.insert("account_invalid".into(), json!(self.is_on(&self.counts_invalid)));
        if let Some(idle) = self.idle_time() {
            all.insert("idle_time_ns".into(), json!(nanos(idle)));
        }
        all.insert("timed_stats".into(), self.timed());
        for (prefix, operations) in GROUPS {
            if let Some(histogram) = self.histogram(operations[0]) {
                let value = json!({"boundaries": histogram.boundaries_ns, "bins": histogram.bins});
                all.insert(format!("{prefix}_latency_histogram"), value);
            }
        }
        Value::Object(all)
    }

    fn is_on(&self, switch: &std::sync::atomic::AtomicBool) -> bool {
        switch.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn sum(&self, operations: &[Operation]) -> Totals {
        let mut sum = Totals::default();
        for of in operations.iter().map(|operation| self.totals(*operation)) {
            sum.ops += of.ops;
            sum.bytes += of.bytes;
            sum.failed += of.failed;
            sum.invalid += of.invalid;
            sum.merged += of.merged;
            sum.total_time += of.total_time;
        }
        sum
    }

    fn timed(&self) -> Value {
        let each = |interval: IntervalStats| {
            let mut all = Map::new();
            all.insert("interval_length".into(), json!(interval.length.as_secs()));
            for (prefix, operations) in GROUPS {
                let Spread { min, max, avg, queue_depth, .. } = interval.of_all(operations);
                for (what, time) in [("min", min), ("max", max), ("avg", avg)] {
                    all.insert(format!("{what}_{prefix}_latency_ns"), json!(nanos(time)));
                }
                if matches!(prefix, "rd" | "wr") {
                    all.insert(format!("avg_{prefix}_queue_depth"), json!(queue_depth));
                }
            }
            Value::Object(all)
        };
        self.intervals().into_iter().map(each).collect()
    }
}
