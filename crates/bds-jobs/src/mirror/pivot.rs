//! The end of a mirror: its edits in the change of its group, and giving back what it holds.
//!
//! The filter stays drained from the end of the work to the end of the change, and a user that
//! attaches to it meanwhile finds the gate closed; the change moves it like the others. The change
//! also points the filter itself to the target. So a write that reaches it later by whatever way
//! goes where the disk is by then.

use bds_core::graph::{Change, EdgeFacts, Parent, Perm};
use bds_core::{Error, ErrorKind, Result};

use super::Mirror;
use super::bitmaps;
use super::filter::Flavour;
use super::tracking::Mode;

impl Mirror {
    /// Adds the job's edits to the change of its group.
    pub(super) async fn plan_end(&mut self, change: Change) -> Result<Change> {
        let replaced = if self.pivots { self.control.find_replaced()? } else { None };
        self.check_writers()?;
        self.tracking.target.flush().await?;
        // Links that the change moves; nothing else changes the graph before it.
        self.frozen = None;
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let drained = self.drained.as_ref().expect("the work has ended");
        let (source, target) = (&self.source, &self.target);
        let mut change = change.within(drained);
        change = match (self.pivots, &replaced) {
            (false, _) => change.drop_filter(filter),
            (true, None) => change.replace(filter, target).replace(source, target),
            (true, Some(replaced)) => change.drop_filter(filter).replace(replaced, target),
        };
        if self.pivots {
            change = bitmaps::hand_over(change, source, target, self.bitmaps)?;
        }
        change = change.eject(&self.main).eject(&self.tracking.target).eject(&self.reader);
        Ok(self.between.iter().fold(change, |change, (edge, _)| change.eject(edge)))
    }

    /// Checks that no other user writes the source past the filter. A mirror's filter refuses such
    /// users; that of a commit cannot, because the job itself writes below.
    fn check_writers(&self) -> Result<()> {
        let filter = self.filter.as_ref().map(|filter| filter.id());
        let is_other = |edge: &EdgeFacts| {
            edge.access.perm.intersects(Perm::WRITE | Perm::RESIZE)
                && !matches!(edge.parent, Some(Parent::Node(parent)) if Some(parent) == filter)
        };
        match self.source.edges_above().into_iter().find(is_other) {
            Some(edge) if self.flavour == Flavour::Commit => {
                let message = format!(
                    "{} writes to it beside the job's filter, so its writes were not tracked",
                    edge.holder
                );
                Err(Error::new(ErrorKind::InUse, message).node(self.source.name()))
            }
            _ => Ok(()),
        }
    }

    /// Gives back everything.
    pub(super) async fn give_back(&mut self, is_committed: bool) -> Result<()> {
        self.tracking.set_mode(Mode::Off);
        self.tracking.set_delay(std::time::Duration::ZERO);
        self.frozen = None;
        let graph = self.source.graph().clone();
        // The filter can only be closed outside of drained sections of its own.
        self.drained = None;
        let mut result = Ok(());
        if let Some(filter) = self.filter.take() {
            let mut change = graph.change().drop_filter(&filter);
            for edge in [&self.main, &self.reader, &self.tracking.target] {
                change = change.eject(edge);
            }
            change = self.between.iter().fold(change, |change, (edge, _)| change.eject(edge));
            result = match change.commit().await {
                Ok(_) => close_filter(graph.change().remove(filter)).await,
                Err(error) => Err(error.context("the job's filter stays in the graph")),
            };
        }
        self.between.clear();
        self.blockers.clear();
        self.slots.clear();
        if self.restores_read_only && !(is_committed && self.pivots) {
            result = result.and(self.make_read_only().await);
        }
        result
    }
}

async fn close_filter(change: Change) -> Result<()> {
    let report = change.commit().await?;
    report.closed.into_iter().try_for_each(|closed| closed.into_result())
}
