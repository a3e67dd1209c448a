//! The block layer's core: a graph of counted nodes, the contract drivers keep, and the path a request takes.
//!
//! Reading order: [`error`], [`options`], [`event`], [`driver`] (the contract), [`graph`] (the plan of the rooms), [`request`]
//! (the request path and its backends).
#![forbid(unsafe_code)]

pub mod copy;
pub mod driver;
pub mod error;
pub mod event;
#[cfg(feature = "doc-examples")]
#[doc(hidden)]
pub mod example;
pub mod graph;
pub mod options;
pub mod rate;
pub mod request;
pub mod stats;
#[cfg(test)]
mod test_kit;
mod tracker;

pub use driver::{Driver, DriverType};
pub use error::{Error, ErrorKind, Result};
pub use options::Options;
