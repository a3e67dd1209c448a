//! Registry of throttle groups by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::rate::RateLimits;
use bds_core::{Error, ErrorKind, Result};

use super::group::{Group, Member};

/// Description of a group, as [`ThrottleGroups::list`] returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupInfo {
    /// Name of the group.
    pub name: String,
    /// Its current limits.
    pub limits: RateLimits,
    /// Names of the member nodes, in the order of joining.
    pub members: Vec<String>,
}

/// Groups of nodes that share rates, by name. Clones are the same groups; methods may be called
/// from any thread and never wait.
#[derive(Clone, Debug, Default)]
pub struct ThrottleGroups(
    // Locked before a group's own lock, so that no node joins a group that is being removed.
    Arc<Mutex<BTreeMap<String, Arc<Group>>>>,
);

impl ThrottleGroups {
    /// Makes an empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a group.
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidInput` if the name is empty or the limits contradict each other.
    pub fn create(&self, name: &str, limits: RateLimits) -> Result<()> {
        if name.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "a throttle group needs a name"));
        }
        let group = Group::new(name, limits)?;
        let mut groups = self.lock();
        if groups.contains_key(name) {
            let words = format!("there is a throttle group '{name}' already");
            return Err(Error::new(ErrorKind::AlreadyExists, words));
        }
        groups.insert(name.to_owned(), group);
        Ok(())
    }

    /// Replaces the limits of a group. Its buckets are empty then, and waiting requests are
    /// scheduled anew.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` if the limits contradict each other. Nothing has changed then.
    pub fn set_limits(&self, name: &str, limits: RateLimits) -> Result<()> {
        self.find(name)?.set_limits(limits)
    }

    /// Removes a group.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while it has members, naming their nodes.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut groups = self.lock();
        let members = groups.get(name).ok_or_else(|| not_found(name))?.info().members;
        if !members.is_empty() {
            let words = format!("throttle group '{name}' is in use by {}", members.join(", "));
            return Err(Error::new(ErrorKind::InUse, words));
        }
        groups.remove(name);
        Ok(())
    }

    /// Lists all groups, sorted by name.
    pub fn list(&self) -> Vec<GroupInfo> {
        self.lock().values().map(|group| group.info()).collect()
    }

    /// Adds a node to a group.
    pub(super) fn join(&self, name: &str, node_name: &str) -> Result<Member> {
        let groups = self.lock();
        Ok(groups.get(name).ok_or_else(|| not_found(name))?.join(node_name))
    }

    fn find(&self, name: &str) -> Result<Arc<Group>> {
        self.lock().get(name).cloned().ok_or_else(|| not_found(name))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Group>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no throttle group '{name}'; make it before the nodes that join it"),
    )
}
