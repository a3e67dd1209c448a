//! Compares graph and model after every command, and asserts that nothing is left at the end.

use std::sync::atomic::Ordering;

use super::commands::NAMES;
use super::run::{Comparison, Held, idle};
use super::snapshot;

impl Comparison {
    /// Everything visible agrees with the model.
    pub(super) fn check(&mut self, what: &str) {
        // P6 (counts), P16 (both ends of every edge), P18 (one child per name), P25 (permissions
        // from scratch), P35 (quiesce counts), P23 (inheritance), P29 and P38 (nothing else
        // changed).
        let (found, wanted) = (snapshot::of_graph(&self.graph), snapshot::of_model(&self.model));
        for (name, node) in &found.nodes {
            assert_eq!(Some(node), wanted.nodes.get(name), "{name} after {what}");
        }
        assert_eq!(found, wanted, "after {what}");
        // P24, P27, P47: the graph is legal.
        assert!(self.model.is_legal(), "P24, P27, P47: after {what}");
        self.check_ids(what);
        self.check_lists(what);
        self.check_ends(what);
    }

    fn check_ids(&self, what: &str) {
        let arena = &self.graph.0.core.arena;
        for (id, key) in &self.ids {
            let is_live = self.model.is_live(*key);
            assert_eq!(arena.check(id.0).is_ok(), is_live, "P1, P4: {key} after {what}");
            if is_live {
                let node = self.graph.acquire(*id).unwrap();
                assert_eq!(node.name(), self.model.nodes[key].name, "P5: after {what}");
            }
            // P6, by name: each holder is on the list.
            let count = if is_live { self.model.count(*key) } else { 0 };
            assert_eq!(self.graph.count(*id), count, "P6: after {what}");
            if is_live {
                assert_eq!(self.graph.holders(*id).len(), count, "P6: by name, after {what}");
            }
        }
        for name in (0..NAMES).map(|name| format!("n{name}")) {
            let is_there = self.graph.find(&name).is_ok();
            assert_eq!(is_there, self.model.find(&name).is_some(), "P42: {name} after {what}");
        }
        let stats = arena.stats();
        let dead = self.model.nodes.len() - self.model.live().len();
        assert_eq!((stats.live, stats.dead), (self.model.live().len(), dead), "P7: after {what}");
        let sum = stats.live + stats.dead + stats.free + stats.retired;
        assert_eq!(sum, stats.capacity, "P2: after {what}");
    }

    fn check_lists(&self, what: &str) {
        let names = |node: crate::graph::NodeRef| node.name().to_owned();
        let wanted: Vec<String> =
            self.model_top_level().iter().map(|key| self.model.nodes[key].name.clone()).collect();
        let found: Vec<String> = self.graph.top_level().map(names).collect();
        assert_eq!(found, wanted, "P44: each once, after {what}");
        for (watch, key) in &self.watches {
            assert_eq!(watch.has_fired(), !self.model.is_live(*key), "P49: after {what}");
        }
        for (lease, key, _) in &self.leases {
            let is_closed = !self.model.nodes.contains_key(key);
            assert_eq!(lease.is_valid(), !is_closed, "P46: after {what}");
        }
        for (root, edge) in &self.roots {
            let child = self.model.edges[edge].child;
            let wanted = child.map(|key| self.model.nodes[&key].name.clone());
            let found = match root {
                Held::Backend(edge) => edge.medium().map(|node| node.name().to_owned()),
                Held::Job(job) => Some(job.node().name().to_owned()),
            };
            assert_eq!(found, wanted, "P22, P45: after {what}");
            if let (Held::Backend(edge), None) = (root, child) {
                assert!(!edge.gate_blocked(), "P35: nothing is drained where nothing is");
            }
        }
    }

    fn check_ends(&mut self, what: &str) {
        self.graph.reports().iter().for_each(|report| self.collect_failures(report));
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        // P11: each once; P14: each failure in exactly one report.
        let closed = std::mem::take(&mut *self.drivers.closed.lock().unwrap());
        let wanted = std::mem::take(&mut self.model.closed);
        assert_eq!(sorted(closed), sorted(wanted), "P11: after {what}");
        let unclean = std::mem::take(&mut self.unclean);
        let wanted = std::mem::take(&mut self.model.unclean);
        assert_eq!(sorted(unclean), sorted(wanted), "P14: after {what}");
        let count = |count: &std::sync::atomic::AtomicUsize| count.load(Ordering::Relaxed);
        let drivers = &self.drivers;
        let open = count(&drivers.opens) - count(&drivers.closes);
        assert_eq!(open, self.model.nodes.len(), "P11: one close an open, after {what}");
        // P28, P30: every prepared reopen was committed or dropped.
        let done = count(&drivers.committed) + count(&drivers.dropped);
        assert_eq!(count(&drivers.prepared), done, "P28, P30: after {what}");
    }

    /// P13: when all holders are gone and all nodes are reaped, nothing is left.
    pub(super) async fn end(mut self) {
        self.walk = None;
        self.roots.clear();
        self.frozen.clear();
        self.refs.clear();
        self.drains.clear();
        self.leases.clear();
        self.anonymous.clear();
        self.blockers.clear();
        self.slots.clear();
        idle().await;
        let report = self.graph.shutdown().await;
        report.check_leaks().unwrap();
        idle().await;
        self.graph.reap().await;
        assert_eq!(self.graph.dump(), "", "P13");
        let stats = self.graph.0.core.arena.stats();
        assert_eq!((stats.live, stats.dead), (0, 0), "P13");
        assert!(self.ids.iter().all(|(id, _)| self.graph.acquire(*id).is_err()), "P1, P48");
        assert!(self.watches.iter().all(|(watch, _)| watch.has_fired()), "P49");
        let count = |count: &std::sync::atomic::AtomicUsize| count.load(Ordering::Relaxed);
        assert_eq!(count(&self.drivers.opens), count(&self.drivers.closes), "P11, P13");
        assert!(self.graph.0.core.lock_names().claims.is_empty(), "P13: no name is left");
    }
}
