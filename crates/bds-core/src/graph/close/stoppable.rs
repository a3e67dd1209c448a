//! The interface by which a graph's shutdown stops exports, jobs and front ends.

use crate::driver::BoxFuture;
use crate::error::Result;

/// The order in which users of nodes are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShutdownStage {
    /// Servers that offer nodes to the outside.
    Exports,
    /// Jobs: they work on nodes on their own account.
    Jobs,
    /// Front ends of devices and tools. The graph's own backends belong here without being
    /// registered.
    Backends,
}

/// A user of nodes that can be stopped. Registered with
/// [`Graph::on_shutdown`](crate::graph::Graph::on_shutdown).
pub trait Stoppable: Send + Sync + 'static {
    /// Its name, for the report.
    fn name(&self) -> String;

    /// Ends its work and drops its references. Called at most once a shutdown.
    ///
    /// # Errors
    /// What could not be ended in order; the shutdown goes on.
    fn stop(&self) -> BoxFuture<'_, Result<()>>;
}
