//! Registry of backends: by name, in order of creation, and their detachment at shutdown.
//!
//! The graph keeps them weakly: a backend lives as long as a handle to it exists, and its name is
//! free from then on. Only the monitor's list owns backends. Their names are claimed in the same
//! namespace as node names.

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
    /// Registers a backend.
    pub(crate) fn register_backend(&self, backend: Weak<dyn BackendEntry>) {
        let mut names = self.lock_names();
        names.prune_backends();
        names.backends.push(backend);
    }

    /// The backends that live now, oldest first.
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

    /// Adds the backend to the monitor's list.
    pub(crate) fn own_backend_entry(&self, backend: Arc<dyn BackendEntry>) -> Result<()> {
        let known = self.backend_entry(backend.name());
        if !known.is_some_and(|known| Arc::ptr_eq(&known, &backend)) {
            let message = "the backend has not claimed a name, so it could not be deleted by name";
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

    /// Removes it from the monitor's list and returns the monitor's reference.
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

    /// Removes the medium of every backend, whatever blocks that but a frozen edge, and the
    /// backends from the monitor's list. Returns what could not be done.
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

/// Emits the event that a backend's medium was inserted, ejected or replaced.
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
