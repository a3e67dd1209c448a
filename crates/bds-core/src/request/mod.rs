//! The request path: the steps of every request from a backend or a driver to the driver of the
//! node below.
//!
//! ```text
//! Backend                       Port (a driver's child)
//!       └──────────┬──────────────┘
//!   admit     gate of the edge, in-flight count        a queued request is not in flight
//!   range     end of the range, permission, read-only
//!   align     widen to whole blocks, read what a write must keep
//!   tracker   register; wait for overlapping earlier serialising requests (and the other way round)
//!   block_io  split by the node's limits
//!   detach_on_drop  call the driver; once polled its operation runs to completion, even if the request is dropped
//!   flush     once, after the last piece, if durability was requested and the driver cannot do it itself
//! ```
//!
//! The inline path (`dispatch::try_read`, `try_write`) takes the same steps without waiting,
//! allocating or locking, and declines whatever does not fit.
//!
//! A backend's request runs in a task from its first poll on: a future that is kept without being
//! polled, or forgotten, holds up no other request (`backend::io`).
//!
//! This module never changes the graph. Dropping a future at any await counts the request out,
//! deregisters it and wakes waiters; if the driver has begun to change something by then, all of
//! that happens when the driver is done.

mod admit;
mod align;
mod amend;
mod backend;
mod backing_record;
mod block_io;
mod copy_on_read;
mod detach_on_drop;
mod dispatch;
mod empty;
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
