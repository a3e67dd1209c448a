//! Media: put in, taken out, exchanged, and taken away for good. Each is a graph change: drained, checked, all or nothing.

use super::Backend;
use super::policy::ErrorPolicies;
use crate::error::Result;
use crate::graph::{Change, Expected, NodeRef, Operations, RootMove};

impl Backend {
    /// Puts a medium in. The backend takes a reference of its own. Writes become durable one by one if the node's `cache.writeback` is
    /// off; that never turns it off by itself.
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: there is a medium, or somebody does not bear what the backend does (he is named); `ReadOnly`,
    /// `Inactive`: the backend writes and the node cannot be written; `InvalidInput`: it belongs to another graph.
    pub async fn insert(&self, node: &NodeRef) -> Result<()> {
        self.put(node, Expected::Nothing).await
    }

    /// Puts a medium in, in place of the one there is, if there is one.
    ///
    /// # Errors
    /// As [`Backend::insert`]; `InUse` also if [`Operations::EJECT`] is blocked on the old one.
    pub async fn replace_medium(&self, node: &NodeRef) -> Result<()> {
        self.put(node, Expected::Anything).await
    }

    async fn put(&self, node: &NodeRef, expected: Expected) -> Result<()> {
        let was_on = self.is_writethrough();
        // Before the first write can come; a few flushes too many if it fails.
        self.set_writethrough(was_on || !node.flags().cache.writeback);
        let root = RootMove::new(&self.graph, &self.inner.edge, Some(node)).from(expected);
        let done = self.graph.change().move_root(root).commit().await;
        if done.is_err() {
            self.set_writethrough(was_on);
        }
        done.map(drop)
    }

    /// Takes the medium out, and returns a reference to it; `None` if there was none. Waits for requests inside; who waits at
    /// the gate finds no medium.
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: [`Operations::EJECT`] is blocked, or the edge is frozen (by whom and why is told).
    pub async fn eject(&self) -> Result<Option<NodeRef>> {
        self.take_out(Operations::EJECT).await
    }

    /// Takes the medium away from whoever uses the backend: QEMU's `drive_del`. Works with a device attached, which stays so:
    /// the handle is valid, and requests fail with `NoMedium`. Failures are reported from now on, whatever the policy was, and
    /// who waited for a decision is told too. Without a medium, only that.
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: [`Operations::DELETE`] is blocked on the medium, or the edge is frozen.
    pub async fn revoke(&self) -> Result<()> {
        let medium = self.take_out(Operations::DELETE).await?;
        self.set_policies(ErrorPolicies::REPORT);
        self.resume();
        drop(medium);
        Ok(())
    }

    /// The reference returned is to the very node that was taken out, however often others change that meanwhile.
    async fn take_out(&self, blockers: Operations) -> Result<Option<NodeRef>> {
        loop {
            let Some(medium) = self.node() else { return Ok(None) };
            let expected = Expected::Node(medium.id());
            let root = RootMove::new(&self.graph, &self.inner.edge, None);
            let root = root.unless(blockers).from(expected);
            match self.graph.change().move_root(root).commit().await {
                Ok(_) => return Ok(Some(medium)),
                Err(error) if self.node().is_some_and(|now| now.id() == medium.id()) => {
                    return Err(error);
                }
                // Somebody else was quicker.
                Err(_) => {}
            }
        }
    }
}

impl Change {
    /// Puts a medium into a backend that has none by then. [`Backend::insert`] as a part of something bigger; whether writes become
    /// durable one by one is left as it is.
    pub fn insert(self, backend: &Backend, node: &NodeRef) -> Self {
        let root = RootMove::new(&backend.graph, &backend.inner.edge, Some(node));
        self.move_root(root.from(Expected::Nothing))
    }

    /// Takes the medium out of a backend. Without one, does nothing.
    pub fn eject(self, backend: &Backend) -> Self {
        self.move_root(RootMove::new(&backend.graph, &backend.inner.edge, None))
    }
}
