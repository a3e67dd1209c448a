//! Core of the block layer: the graph of reference-counted nodes, the driver contract, and the
//! request path.
//!
//! Reading order: [`error`], [`options`], [`event`], [`driver`] (the contract), [`graph`] (nodes,
//! edges, and operations that change them), [`request`] (the request path and its backends).
//!
//! Fields may be added to structs of options in minor versions: callers build them with
//! `..Default::default()`.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod copy;
pub mod driver;
pub mod error;
pub mod event;
pub mod graph;
mod holder_kind;
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

/// Runs the README's code as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
