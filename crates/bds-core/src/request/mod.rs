//! The corridor: the one way from a user or a driver to the driver of the node below, each step once.
//!
//! ```text
//! Backend                       Port (a driver's child)
//!       └──────────┬──────────────┘
//!   enter     gate of the edge, counted in            queued is not in flight
//!   range     sane offset, permission, read-only
//!   align     widen to whole blocks, read what a write must keep
//!   traffic   register; wait for overlapping earlier serialising requests (and the other way round)
//!   split     by the node's limits
//!   begun     the driver; what it has begun ends even if the request is dropped
//!   flush     once, after the last fragment, if durability was asked and the driver cannot
//! ```
//!
//! The inline way (`dispatch::try_read`, `try_write`) takes the same steps without waiting, allocating or locking, and
//! declines whatever does not fit.
//!
//! A request through a backend runs in a task of its own from its first poll on: a future that is kept without being polled, or
//! forgotten, holds nothing up (`backend::io`).
//!
//! It never changes the graph. Dropping a future at any await counts out, deregisters and wakes who waited; if the driver has
//! begun to change something by then, all that happens when the driver is done.

mod align;
mod backend;
mod begun;
mod copy_on_read;
mod dispatch;
mod enter;
mod flush;
mod offload;
mod port;
mod range;
mod status;
mod truncate;
mod zero;

use crate::graph::{Graph, GraphConfig};

pub use backend::{
    Backend, BackendDrained, BackendOptions, Device, ErrorPolicies, ErrorPolicy, IoStatus,
};
pub use copy_on_read::CopyOnReadGuard;
pub use status::{ChainRun, HostBytes};

impl Graph {
    /// An empty graph.
    pub fn new(config: GraphConfig) -> Graph {
        Graph::with_ports(config, port::make)
    }
}

#[cfg(test)]
pub(crate) mod tests;
