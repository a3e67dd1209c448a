//! Runs changes on graph and model, with every [`CommitMode`].

use std::sync::atomic::Ordering;

use super::commands::{CommitMode, Step};
use super::edits::{Edit, Reopen};
use super::model::{Access, Key, Model};
use super::open::pick;
use super::run::{Comparison, Held, idle, real_access};
use super::snapshot;
use crate::error::Result;
use crate::graph::{Change, ChangeReport, Drained, Handover, NodeRef, RootMove};
use crate::options::Options;

/// A step with its numbers resolved to indices of references and roots, and the model's edit for
/// it.
#[derive(Clone, Debug)]
struct Planned {
    step: Step,
    edit: Edit,
}

impl Comparison {
    /// Resolves the steps. Steps without anything to act on are left out.
    fn plan(&self, steps: &[Step]) -> Vec<Planned> {
        let mut planned: Vec<Planned> = Vec::new();
        for step in steps {
            let Some(next) = self.plan_step(step) else { continue };
            let is_again = |known: &Planned| match (&known.step, &next.step) {
                (Step::Remove(a), Step::Remove(b)) => a == b,
                _ => false,
            };
            if !planned.iter().any(is_again) {
                planned.push(next);
            }
        }
        planned
    }

    fn plan_step(&self, step: &Step) -> Option<Planned> {
        let index = |n: usize| self.pick_ref(n);
        let key = |index: usize| self.model.refs[index];
        let pair = |a: usize, b: usize| Some((index(a)?, index(b)?));
        let (step, edit) = match *step {
            Step::Append(a, b) => {
                let (a, b) = pair(a, b)?;
                (Step::Append(a, b), Edit::Append { top: key(a), overlay: key(b) })
            }
            Step::Replace(a, b) => {
                let (a, b) = pair(a, b)?;
                (Step::Replace(a, b), Edit::Replace { from: key(a), to: key(b) })
            }
            Step::ReplaceChild(a, is_file, b) => {
                let (a, b) = pair(a, b)?;
                let name = if is_file { "file" } else { "backing" };
                let edit = Edit::ReplaceChild { parent: key(a), name, to: key(b) };
                (Step::ReplaceChild(a, is_file, b), edit)
            }
            Step::InsertFilter(a, b) => {
                let (a, b) = pair(a, b)?;
                (Step::InsertFilter(a, b), Edit::InsertFilter { node: key(a), filter: key(b) })
            }
            Step::DropFilter(a) => {
                let a = index(a)?;
                (Step::DropFilter(a), Edit::DropFilter { filter: key(a) })
            }
            Step::SetBacking(a, b) => {
                let (a, b) = (index(a)?, b.and_then(index));
                (Step::SetBacking(a, b), Edit::SetBacking { node: key(a), backing: b.map(key) })
            }
            Step::Remove(a) => (Step::Remove(index(a)?), Edit::Remove { node: key(index(a)?) }),
            Step::Rename(a, name) => {
                let a = index(a)?;
                (Step::Rename(a, name), Edit::Rename { node: key(a), name: format!("n{name}") })
            }
            Step::Own(a) => (Step::Own(index(a)?), Edit::Own { node: key(index(a)?) }),
            Step::Disown(a) => (Step::Disown(index(a)?), Edit::Disown { node: key(index(a)?) }),
            Step::Root(root, to) => {
                let (root, edge) = self.pick_backend(root)?;
                let to = to.and_then(index);
                (Step::Root(root, to), Edit::Root { edge, to: to.map(key) })
            }
            Step::Access(root, access) => {
                let (root, edge) = self.pick_backend(root)?;
                (Step::Access(root, access), Edit::Access { edge, access })
            }
            ref other => self.plan_reopen(other)?,
        };
        Some(Planned { step, edit })
    }

    fn plan_reopen(&self, step: &Step) -> Option<(Step, Edit)> {
        let index = |n: usize| self.pick_ref(n);
        let key = |index: usize| self.model.refs[index];
        let (step, node, what) = match *step {
            Step::ReadOnly(a, on) => {
                (Step::ReadOnly(index(a)?, on), index(a)?, Reopen::ReadOnly(on))
            }
            Step::Discard(a, on) => (Step::Discard(index(a)?, on), index(a)?, Reopen::Discard(on)),
            Step::Level(a, level) => {
                (Step::Level(index(a)?, level), index(a)?, Reopen::Level(level))
            }
            Step::ReopenBacking(a, to) => {
                let to = to.and_then(index);
                (Step::ReopenBacking(index(a)?, to), index(a)?, Reopen::Backing(to.map(key)))
            }
            Step::ReopenFile(a, b) => {
                (Step::ReopenFile(index(a)?, index(b)?), index(a)?, Reopen::File(key(index(b)?)))
            }
            _ => unreachable!("only reopens come here"),
        };
        Some((step, Edit::Reopen { node: key(node), what }))
    }

    fn pick_backend(&self, n: usize) -> Option<(usize, u32)> {
        let is_backend = |place: &usize| matches!(self.roots[*place].0, Held::Backend(_));
        let backends: Vec<usize> = (0..self.roots.len()).filter(is_backend).collect();
        pick(&backends, n).map(|place| (place, self.roots[place].1))
    }

    /// Builds the graph's change. References of removed nodes are taken from graph and model.
    fn build(&mut self, planned: &[Planned]) -> Change {
        let handles = self.refs.clone();
        let mut removed: Vec<usize> = planned
            .iter()
            .filter_map(|planned| match planned.step {
                Step::Remove(index) => Some(index),
                _ => None,
            })
            .collect();
        removed.sort_unstable();
        let mut taken: Vec<(usize, NodeRef)> =
            removed.into_iter().rev().map(|index| (index, self.take_ref(index))).collect();
        // The change runs inside the sections that this test holds.
        let within = |change: Change, (drained, _): &(Drained, u32)| change.within(drained);
        let mut change = self.drains.iter().fold(self.graph.change(), within);
        for Planned { step, .. } in planned {
            change = match step {
                Step::Remove(index) => {
                    let place = taken.iter().position(|(known, _)| known == index).unwrap();
                    change.remove(taken.swap_remove(place).1)
                }
                step => self.add(change, step, &handles),
            };
        }
        change
    }

    fn add(&self, change: Change, step: &Step, refs: &[NodeRef]) -> Change {
        let at = |index: &Option<usize>| index.map(|index| &refs[index]);
        let edge = |root: usize| match &self.roots[root].0 {
            Held::Backend(edge) => edge,
            Held::Job(_) => unreachable!("only backends are moved"),
        };
        let word = |on: bool| if on { "on" } else { "off" };
        let reopen =
            |change: Change, index: usize, options: Options| change.reopen(&refs[index], options);
        let name = |to: &Option<usize>| match at(to) {
            Some(node) => serde_json::Value::from(node.name()),
            None => serde_json::Value::Null,
        };
        match step {
            Step::Append(a, b) => change.append(&refs[*a], &refs[*b]),
            Step::Replace(a, b) => change.replace(&refs[*a], &refs[*b]),
            Step::ReplaceChild(a, is_file, b) => {
                let name = if *is_file { "file" } else { "backing" };
                change.replace_child(&refs[*a], name, &refs[*b])
            }
            Step::InsertFilter(a, b) => change.insert_filter(&refs[*a], &refs[*b]),
            Step::DropFilter(a) => change.drop_filter(&refs[*a]),
            Step::SetBacking(a, b) => change.set_backing(&refs[*a], at(b)),
            Step::ReadOnly(a, on) => {
                reopen(change, *a, Options::new().with("read-only", word(*on)))
            }
            Step::Discard(a, on) => reopen(change, *a, Options::new().with("discard", word(*on))),
            Step::Level(a, level) => reopen(change, *a, Options::new().with("level", *level)),
            Step::ReopenBacking(a, b) => {
                reopen(change, *a, Options::new().with("backing", name(b)))
            }
            Step::ReopenFile(a, b) => {
                reopen(change, *a, Options::new().with("file", name(&Some(*b))))
            }
            Step::Rename(a, name) => change.rename(&refs[*a], &format!("n{name}")),
            Step::Own(a) => change.own(&refs[*a]),
            Step::Disown(a) => change.disown(&refs[*a]),
            Step::Root(root, to) => {
                change.move_root(RootMove::new(&self.graph, edge(*root), at(to)))
            }
            Step::Access(root, access) => change.set_access(edge(*root), real_access(*access)),
            Step::Remove(_) => unreachable!("done by the caller"),
        }
    }

    /// P29 to P33: a change takes effect whole or not at all.
    pub(super) async fn change(&mut self, steps: &[Step], mode: &CommitMode) {
        let planned = self.plan(steps);
        let edits: Vec<Edit> = planned.iter().map(|planned| planned.edit.clone()).collect();
        let removes = edits.iter().any(|edit| matches!(edit, Edit::Remove { .. }));
        let swept = if edits.is_empty() { self.model.clone() } else { self.model.swept() };
        let mut after = swept.clone();
        let is_fine = after.change(&edits).is_ok();
        if self.is_waiting(&edits, &after) {
            return;
        }
        if !matches!(mode, CommitMode::Drop) {
            self.model = swept;
        }
        self.drivers.drivers_fail.store(is_fine, Ordering::Relaxed);
        match mode {
            CommitMode::Drop => {
                // P31: a dropped change has no effect.
                drop(self.build(&planned));
            }
            CommitMode::CancelAt(turns) => self.cancel(&planned, after, *turns).await,
            CommitMode::FailAt(step) => {
                if !self.fail_at(&planned, *step).await {
                    self.reap().await;
                    self.forget_faults();
                }
            }
            CommitMode::Sweep if !removes => {
                for step in 0.. {
                    if !self.fail_at(&planned, step).await {
                        break;
                    }
                }
                self.forget_faults();
                // The last attempt succeeded.
            }
            CommitMode::Commit | CommitMode::Sweep => {
                let change = self.build(&planned);
                self.finish(change.commit().await, after, is_fine, &edits).await;
            }
        }
    }

    /// True if closing the removed nodes would wait for the end of a drained section, or has no
    /// defined order.
    fn is_waiting(&self, edits: &[Edit], after: &Model) -> bool {
        let mut after = after.clone();
        let removed: Vec<Key> = edits
            .iter()
            .filter_map(|edit| match edit {
                Edit::Remove { node } => Some(*node),
                _ => None,
            })
            .collect();
        after.refs.retain(|key| !removed.contains(key));
        let close_order_is_ambiguous = self.close_order_is_ambiguous(&after);
        after.mark_dead();
        let waits = |key: &Key| !after.is_live(*key) && !after.can_close(*key);
        close_order_is_ambiguous || removed.iter().any(waits)
    }

    /// Compares the result, and updates the model.
    async fn finish(
        &mut self,
        answer: Result<ChangeReport>,
        mut after: Model,
        is_fine: bool,
        edits: &[Edit],
    ) {
        assert_eq!(answer.is_ok(), is_fine, "{edits:?}: {:?}", answer.err());
        self.tally.count_if(is_fine && !edits.is_empty(), "committed");
        self.tally.count_if(is_fine && edits.len() > 1, "committed, more than one edit");
        self.tally.count_if(!is_fine, "refused");
        if is_fine {
            after.refs.clone_from(&self.model.refs);
            self.model = after;
        }
        self.model.update();
        if let Ok(report) = answer {
            self.tally.count_if(!report.closed.is_empty(), "removed");
            report.closed.iter().for_each(|report| self.collect_failures(report));
            if edits.iter().any(|edit| matches!(edit, Edit::Remove { .. })) {
                self.model.sweep();
            }
        }
    }

    /// P29: fails at this step, of the graph or of a driver, and changes nothing. False if there is
    /// no such step any more: then the change was committed.
    async fn fail_at(&mut self, planned: &[Planned], step: usize) -> bool {
        let edits: Vec<Edit> = planned.iter().map(|planned| planned.edit.clone()).collect();
        self.reap().await;
        let mut after = self.model.clone();
        let is_fine = after.change(&edits).is_ok();
        let before = snapshot::of_graph(&self.graph);
        let removes = edits.iter().any(|edit| matches!(edit, Edit::Remove { .. }));
        self.graph.0.faults.set(Some(step));
        let change = self.build(planned);
        let answer = change.commit().await;
        if !self.graph.0.faults.has_struck() {
            self.forget_faults();
            self.finish(answer, after, is_fine, &edits).await;
            return false;
        }
        self.forget_faults();
        assert!(answer.is_err(), "P29: {edits:?} at {step}");
        self.tally.count("faults of changes");
        if !removes {
            assert_eq!(snapshot::of_graph(&self.graph), before, "P29: {edits:?} at {step}");
        }
        true
    }

    fn forget_faults(&self) {
        self.graph.0.faults.set(None);
    }

    /// A commit whose future is dropped has taken effect whole or not at all (P29, P31).
    async fn cancel(&mut self, planned: &[Planned], after: Model, turns: usize) {
        let change = self.build(planned);
        let mut after = Model {
            refs: self.model.refs.clone(),
            closed: self.model.closed.clone(),
            unclean: self.model.unclean.clone(),
            ..after
        };
        // The graph keeps a report whose future was dropped.
        let answer = Self::run_for(turns, change.commit()).await;
        self.tally.count_if(answer.is_none(), "cancelled");
        if let Some(Ok(report)) = answer {
            report.closed.iter().for_each(|report| self.collect_failures(report));
        }
        idle().await;
        after.update();
        after.sweep();
        self.model.update();
        self.reap().await;
        let found = snapshot::of_graph(&self.graph);
        if found != snapshot::of_model(&self.model) && found == snapshot::of_model(&after) {
            self.tally.count("cancelled or not, done");
            self.model = after;
        }
    }

    /// P20: attaching and detaching leaves no trace.
    pub(super) async fn attach_and_detach(&mut self, node: usize, backing: usize) {
        let (Some(node), Some(backing)) = (self.pick_ref(node), self.pick_ref(backing)) else {
            return;
        };
        let key = self.model.refs[node];
        let there = Edit::SetBacking { node: key, backing: Some(self.model.refs[backing]) };
        if self.model.child(key, "backing").is_some()
            || self.model.clone().change(&[there]).is_err()
        {
            return;
        }
        self.reap().await;
        let mut before = snapshot::of_graph(&self.graph);
        let (node, backing) = (self.refs[node].clone(), self.refs[backing].clone());
        self.graph.set_backing(&node, Some(&backing)).await.unwrap();
        self.graph.set_backing(&node, None).await.unwrap();
        drop((node, backing));
        self.tally.count("attached and detached");
        before.epoch += 2;
        self.model.epoch += 2;
        assert_eq!(snapshot::of_graph(&self.graph), before, "P20");
    }

    pub(super) async fn job_access(&mut self, n: usize, access: Access) {
        let is_job = |place: &usize| matches!(self.roots[*place].0, Held::Job(_));
        let jobs: Vec<usize> = (0..self.roots.len()).filter(is_job).collect();
        let Some(place) = pick(&jobs, n) else { return };
        let (Held::Job(job), edge) = &self.roots[place] else { return };
        self.model.sweep();
        let was = self.model.edges[edge].access;
        let is_looser = access.perm & !was.perm == 0 && was.shared & !access.shared == 0;
        let is_fine = self.model.change(&[Edit::Access { edge: *edge, access }]).is_ok();
        assert!(is_fine || !is_looser, "P26: the model agrees that loosening is allowed");
        let answer = job.set_access(real_access(access)).await;
        assert_eq!(answer.is_ok(), is_fine, "P26: {access:?} {:?}", answer.err());
        assert_eq!(job.access(), real_access(if is_fine { access } else { was }), "P26");
    }

    // ---- activation

    /// P47, and P29 for it: all nodes or none.
    pub(super) async fn set_active(&mut self, node: Option<usize>, on: bool, mode: &CommitMode) {
        let node = match node.map(|n| self.pick_ref(n)) {
            Some(None) => return,
            Some(index) => index,
            None => None,
        };
        self.model.sweep();
        let tops: Vec<Key> = match node {
            Some(index) => vec![self.model.refs[index]],
            None => self
                .model
                .live()
                .into_iter()
                .filter(|k| on || self.model.parent_nodes(*k).is_empty())
                .collect(),
        };
        let mut after = self.model.clone();
        let is_fine = if on { after.activate(&tops) } else { after.inactivate(&tops) }.is_ok();
        self.drivers.drivers_fail.store(is_fine, Ordering::Relaxed);
        let steps = match mode {
            CommitMode::Sweep => 0..usize::MAX,
            CommitMode::FailAt(step) => *step..*step + 1,
            _ => 0..0,
        };
        for step in steps {
            self.reap().await;
            let before = snapshot::of_graph(&self.graph);
            self.graph.0.faults.set(Some(step));
            let answer = self.set_active_once(node, on).await;
            if !self.graph.0.faults.has_struck() {
                self.forget_faults();
                return self.expect_activity(&tops, on, answer);
            }
            self.forget_faults();
            assert!(answer.is_err(), "P29: at {step}");
            self.tally.count("faults of handovers");
            assert_eq!(snapshot::of_graph(&self.graph), before, "P29: at {step}");
        }
        if matches!(mode, CommitMode::Sweep | CommitMode::FailAt(_)) {
            return;
        }
        let answer = self.set_active_once(node, on).await;
        self.expect_activity(&tops, on, answer);
    }

    async fn set_active_once(&self, node: Option<usize>, on: bool) -> Result<()> {
        let within = |handover: Handover, (drained, _): &(Drained, u32)| handover.within(drained);
        let handover = self.drains.iter().fold(self.graph.handover(), within);
        match (node.map(|index| &self.refs[index]), on) {
            (Some(node), true) => handover.activate(node).await,
            (Some(node), false) => handover.inactivate(node).await,
            (None, true) => handover.activate_all().await,
            (None, false) => handover.inactivate_all().await,
        }
    }

    fn expect_activity(&mut self, tops: &[Key], on: bool, answer: Result<()>) {
        let wanted = if on { self.model.activate(tops) } else { self.model.inactivate(tops) };
        assert_eq!(answer.is_ok(), wanted.is_ok(), "P47: {on} {:?}", answer.err());
        self.tally.count_if(answer.is_ok(), if on { "activated" } else { "inactivated" });
    }
}
