//! The graph with small fake drivers.

mod change;
mod close;
mod create;
mod fakes;
mod gates;
mod model;
mod open;
mod threads;
