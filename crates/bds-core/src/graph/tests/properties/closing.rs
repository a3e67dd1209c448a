//! Runs commands that end nodes (by reference, by name, by shutdown) and that begin and end drained
//! sections.

use super::commands::Command;
use super::model::Drain;
use super::open::pick;
use super::run::Comparison;
use crate::graph::CloseError;

impl Comparison {
    pub(super) async fn close(&mut self, n: usize) {
        let Some(n) = self.pick_ref(n) else { return };
        let key = self.model.refs[n];
        let is_last = self.model.count(key) == 1;
        if is_last && !self.model.can_close(key) {
            return; // It would wait for the end of the section.
        }
        let node = self.take_ref(n);
        let id = node.id();
        match node.close().await {
            Ok(report) => {
                assert!(is_last, "P14");
                self.tally.count("closed");
                self.tally.count_if(!report.is_clean(), "closed, with failures");
                assert_eq!(report.node, id);
                self.collect_failures(&report);
                self.model.mark_dead();
                self.model.close(key);
                self.model.sweep();
            }
            Err(CloseError::InUse { node, holders }) => {
                assert!(!is_last, "P14");
                self.tally.count("in use");
                assert_eq!(node.id(), id, "P14: the same reference comes back");
                assert_eq!(holders.len() + 1, node.count(), "P6: the others have names");
                self.push_ref(node);
            }
        }
    }

    /// P43: by name, if the monitor owns the node, no other holder has it and no blocker forbids
    /// it.
    pub(super) async fn del(&mut self, n: usize) {
        let swept = self.model.swept();
        let Some(key) = pick(&swept.live(), n) else { return };
        let is_owned = swept.monitor.contains(&key);
        let may = is_owned && swept.count(key) == 1 && !swept.is_blocked(key, super::edits::DELETE);
        if may && !swept.can_close(key) {
            return; // It would wait for the end of the section.
        }
        self.model = swept;
        let name = self.model.nodes[&key].name.clone();
        let deleted = self.graph.del(&name).await;
        assert_eq!(deleted.is_ok(), may, "P43: {name} {:?}", deleted.err());
        self.tally.count_if(may, "deleted");
        if let Ok(report) = deleted {
            self.collect_failures(&report);
            self.model.monitor.retain(|owned| *owned != key);
            self.model.mark_dead();
            self.model.close(key);
            self.model.sweep();
        }
    }

    /// P48: every unused node is closed, the others are named, and a second shutdown finds nothing
    /// more to do.
    pub(super) async fn shutdown(&mut self) {
        let report = self.graph.shutdown().await;
        report.closed.iter().for_each(|report| self.collect_failures(report));
        self.model.is_shut = true;
        self.model.monitor.clear();
        self.model.sweep();
        let leaks = |report: &crate::graph::ShutdownReport| {
            let leaks = report.leaked.iter().map(|leak| (leak.name.clone(), leak.count));
            leaks.collect::<Vec<_>>()
        };
        let mut wanted: Vec<(String, usize)> = self
            .model
            .live()
            .into_iter()
            .map(|key| (self.model.nodes[&key].name.clone(), self.model.count(key)))
            .collect();
        wanted.sort();
        assert_eq!(leaks(&report), wanted, "P48");
        let again = self.graph.shutdown().await;
        assert_eq!((leaks(&again), again.closed.len()), (wanted, 0), "P48: idempotent");
    }

    pub(super) async fn drain(&mut self, command: &Command) {
        let (guard, nodes) = match *command {
            Command::DrainAll => (self.graph.drain_all().await, Default::default()),
            Command::Drain(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let guard = self.graph.drain(&self.refs[n]).await;
                (guard, [self.model.refs[n]].into())
            }
            Command::DrainSubtree(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let guard = self.graph.drain_subtree(&self.refs[n]).await;
                (guard, self.model.below(self.model.refs[n]))
            }
            _ => unreachable!("only drains come here"),
        };
        let number = self.model.fresh();
        let is_all = matches!(command, Command::DrainAll);
        self.model.drains.push(Drain { number, nodes, is_all });
        self.drains.push((guard, number));
    }

    /// P38: ending a section changes nothing of the graph; the snapshots are compared afterwards.
    pub(super) fn end_drain(&mut self, n: usize) {
        if self.drains.is_empty() {
            return;
        }
        let index = n % self.drains.len();
        let number = self.drains[index].1;
        let mut after = self.model.clone();
        after.drains.retain(|drain| drain.number != number);
        if !self.close_order_is_ambiguous(&after) {
            self.model = after;
            drop(self.drains.swap_remove(index));
        }
    }
}
