//! The interface by which a graph's shutdown stops exports, jobs and front ends.

use crate::driver::BoxFuture;
use crate::error::Result;

/// When somebody is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShutdownStage {
    /// Whoever serves nodes to the outside.
    Exports,
    /// Whoever works on nodes on its own account.
    Jobs,
    /// Whoever lets a device or a tool in. The graph's own backends belong here without being registered.
    Backends,
}

/// Somebody who holds nodes and can be told to let go. Registered with [`Graph::on_shutdown`].
pub trait Stoppable: Send + Sync + 'static {
    /// Who it is, for the report.
    fn name(&self) -> String;

    /// Ends whatever it does and gives its references up. Called at most once a shutdown.
    ///
    /// # Errors
    /// What could not be ended in order; the shutdown goes on.
    fn stop(&self) -> BoxFuture<'_, Result<()>>;
}
