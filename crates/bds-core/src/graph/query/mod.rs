//! Queries: ways through the graph, its edges as values, and the graph as text, drawing or JSON.
//!
//! Reads only. Needs the model.

pub(super) mod dump;
pub(super) mod facts;
pub mod walk;
