//! The graph with small fake drivers.

mod close;
mod fakes;
mod gates;
mod open;
