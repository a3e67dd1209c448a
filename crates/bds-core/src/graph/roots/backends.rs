//! Backends as the graph knows them: by name, in the order in which they came, and as somebody to send away at the end.
//!
//! The graph knows them weakly: a backend lives as long as somebody holds a handle to it, and its name is free from that moment on.
//! Only the monitor's list holds one, and there the membership is the reference. A name is claimed in the one namespace that node
//! names are claimed in.

use std::sync::{Arc, Weak};

use super::root::RootMove;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventHub};
use crate::graph::Graph;
use crate::graph::model::blockers::BlockOps;
use crate::graph::model::edge::Edge;
use crate::graph::model::node::Node;
use crate::graph::name_table::{BackendEntry, Claim};

impl Graph {
    /// The graph knows of the backend from now on.
    pub(crate) fn register_backend(&self, backend: Weak<dyn BackendEntry>) {
        let mut names = self.lock_names();
        names.prune_backends();
        names.backends.push(backend);
    }

    /// The backends that live now, in the order in which they came.
    pub(crate) fn backend_entries(&self) -> Vec<Arc<dyn BackendEntry>> {
        self.lock_names().backends.iter().filter_map(Weak::upgrade).collect()
    }

    /// The backend that has claimed this name.
    pub(crate) fn backend_entry(&self, name: &str) -> Option<Arc<dyn BackendEntry>> {
        match self.lock_names().claims.get(name) {
            Some(Claim::Backend(backend)) => backend.upgrade(),
            _ => None,
        }
    }

    /// The monitor's list holds it from now on.
    pub(crate) fn own_backend_entry(&self, backend: Arc<dyn BackendEntry>) -> Result<()> {
        let known = self.backend_entry(backend.name());
        if !known.is_some_and(|known| Arc::ptr_eq(&known, &backend)) {
            let message = "the backend has not claimed a name: nobody could delete it";
            return Err(
                Error::new(ErrorKind::InvalidInput, message).field("backend", backend.name())
            );
        }
        let mut names = self.lock_names();
        if names.owned_backends.iter().any(|known| Arc::ptr_eq(known, &backend)) {
            let message = "the monitor owns the backend already";
            return Err(
                Error::new(ErrorKind::AlreadyExists, message).field("backend", backend.name())
            );
        }
        names.owned_backends.push(backend);
        Ok(())
    }

    /// Takes it off the monitor's list. The answer is the monitor's reference.
    pub(crate) fn disown_backend_entry(&self, name: &str) -> Result<Arc<dyn BackendEntry>> {
        let backend = self.backend_entry(name).ok_or_else(|| no_backend(name))?;
        let refuse = |kind, message: String| Err(Error::new(kind, message).field("backend", name));
        if let Some(device) = backend.device() {
            let message =
                format!("device '{device}' uses it: detach it first, or revoke the medium");
            return refuse(ErrorKind::InUse, message);
        }
        if let Some(node) = backend.edge().medium() {
            node.check_allowed(BlockOps::DELETE)?;
        }
        let owned = {
            let mut names = self.lock_names();
            let place = names.owned_backends.iter().position(|known| Arc::ptr_eq(known, &backend));
            place.map(|place| names.owned_backends.remove(place))
        };
        drop(backend);
        match owned {
            Some(owned) => Ok(owned),
            None => {
                let message = "the monitor does not own the backend: it goes with the last handle";
                refuse(ErrorKind::InvalidInput, message.to_owned())
            }
        }
    }

    /// Takes the medium out of every backend, whatever stands in the way but a frozen edge, and the backends off the monitor's list.
    /// Returns what could not be done.
    pub(in crate::graph) async fn detach_backends(&self) -> Vec<(String, Error)> {
        let mut failed = Vec::new();
        for backend in self.backend_entries() {
            backend.end();
            let out = RootMove::new(self, backend.edge(), None).unless(BlockOps::empty());
            if let Err(error) = self.change().move_root(out).commit().await {
                failed.push((format!("backend '{}'", backend.name()), error));
            }
        }
        let owned = std::mem::take(&mut self.lock_names().owned_backends);
        drop(owned);
        failed
    }
}

pub(crate) fn no_backend(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no backend '{name}'"))
}

/// Tells that a backend has another medium.
pub(in crate::graph) fn emit_medium_event(
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
