//! Backends as the graph knows them: by name, in the order in which they came, and as somebody to send away at the end.
//!
//! The graph knows them weakly: a backend lives as long as somebody holds a handle to it, and its name is free from that moment on.
//! Only the monitor's list holds one, and there the membership is the reference. A name is claimed in the one namespace that node
//! names are claimed in.

use std::any::Any;
use std::sync::{Arc, Weak};

use super::root::RootMove;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventHub};
use crate::graph::model::blockers::Operations;
use crate::graph::model::edge::Edge;
use crate::graph::model::node::Node;
use crate::graph::open::names::Claim;
use crate::graph::{Graph, NameTable};

/// A backend, seen from the graph.
pub(crate) trait BackendEntry: Send + Sync + 'static {
    /// Under what name it holds its node; the monitor's too, if it claimed that.
    fn name(&self) -> &str;

    /// Its way in.
    fn edge(&self) -> &Arc<Edge>;

    /// Turns the flush after every write on or off.
    fn set_writethrough(&self, is_on: bool);

    /// The device that uses it.
    fn device(&self) -> Option<Arc<str>>;

    /// The graph ends: requests that wait for a user's decision fail.
    fn end(&self);

    /// For whoever knows what it is.
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

impl NameTable {
    /// Strikes off who has gone, whenever the list would have to grow: constant time on average.
    fn prune_backends(&mut self) {
        if self.backends.len() == self.backends.capacity() {
            self.backends.retain(|backend| backend.strong_count() > 0);
            self.names.retain(
                |_, claim| !matches!(claim, Claim::Backend(backend) if backend.strong_count() == 0),
            );
        }
    }
}

impl Graph {
    /// The graph knows of the backend from now on.
    pub(crate) fn register_backend(&self, backend: Weak<dyn BackendEntry>) {
        let mut plan = self.plan();
        plan.prune_backends();
        plan.backends.push(backend);
    }

    /// The backends that live now, in the order in which they came.
    pub(crate) fn backend_entries(&self) -> Vec<Arc<dyn BackendEntry>> {
        self.plan().backends.iter().filter_map(Weak::upgrade).collect()
    }

    /// The backend that has claimed this name.
    pub(crate) fn backend_entry(&self, name: &str) -> Option<Arc<dyn BackendEntry>> {
        match self.plan().names.get(name) {
            Some(Claim::Backend(backend)) => backend.upgrade(),
            _ => None,
        }
    }

    /// The monitor's list holds it from now on.
    pub(crate) fn own_backend_entry(&self, backend: Arc<dyn BackendEntry>) -> Result<()> {
        let known = self.backend_entry(backend.name());
        if !known.is_some_and(|known| Arc::ptr_eq(&known, &backend)) {
            let words = "the backend has not claimed a name: nobody could delete it";
            return Err(Error::new(ErrorKind::InvalidInput, words).field("backend", backend.name()));
        }
        let mut plan = self.plan();
        if plan.owned_backends.iter().any(|known| Arc::ptr_eq(known, &backend)) {
            let words = "the monitor owns the backend already";
            return Err(
                Error::new(ErrorKind::AlreadyExists, words).field("backend", backend.name())
            );
        }
        plan.owned_backends.push(backend);
        Ok(())
    }

    /// Takes it off the monitor's list. The answer is the monitor's reference.
    pub(crate) fn disown_backend_entry(&self, name: &str) -> Result<Arc<dyn BackendEntry>> {
        let backend = self.backend_entry(name).ok_or_else(|| no_backend(name))?;
        let refuse = |kind, words: String| Err(Error::new(kind, words).field("backend", name));
        if let Some(device) = backend.device() {
            let words = format!("device '{device}' uses it: detach it first, or revoke the medium");
            return refuse(ErrorKind::InUse, words);
        }
        if let Some(node) = backend.edge().medium() {
            node.check_allowed(Operations::DELETE)?;
        }
        let owned = {
            let mut plan = self.plan();
            let place = plan.owned_backends.iter().position(|known| Arc::ptr_eq(known, &backend));
            place.map(|place| plan.owned_backends.remove(place))
        };
        drop(backend);
        match owned {
            Some(owned) => Ok(owned),
            None => {
                let words = "the monitor does not own the backend: it goes with the last handle";
                refuse(ErrorKind::InvalidInput, words.to_owned())
            }
        }
    }

    /// Takes the medium out of every backend, whatever stands in the way but a frozen edge, and the backends off the monitor's list.
    /// Returns what could not be done.
    pub(in crate::graph) async fn detach_backends(&self) -> Vec<(String, Error)> {
        let mut failed = Vec::new();
        for backend in self.backend_entries() {
            backend.end();
            let out = RootMove::new(self, backend.edge(), None).unless(Operations::empty());
            if let Err(error) = self.change().move_root(out).commit().await {
                failed.push((format!("backend '{}'", backend.name()), error));
            }
        }
        let owned = std::mem::take(&mut self.plan().owned_backends);
        drop(owned);
        failed
    }
}

pub(crate) fn no_backend(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no backend '{name}'"))
}

/// Tells that a backend has another medium.
pub(in crate::graph) fn tell_moved(
    events: &EventHub,
    edge: &Edge,
    from: Option<&Node>,
    to: Option<&Node>,
) {
    if edge.backend_in_flight().is_none() {
        return;
    }
    let name = |node: &Node| node.name().to_owned();
    let backend = || edge.holder().name.to_string();
    match (from, to) {
        (None, Some(to)) => {
            events.emit(|| Event::MediumInserted { backend: backend(), node: name(to) });
        }
        (Some(from), None) => {
            events.emit(|| Event::MediumEjected { backend: backend(), node: name(from) });
        }
        (Some(from), Some(to)) => events.emit(|| Event::MediumReplaced {
            backend: backend(),
            from: name(from),
            node: name(to),
        }),
        (None, None) => {}
    }
}
