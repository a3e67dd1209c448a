//! Tests of the crate's interface, on the simulated world.

mod chain;
mod fake;
mod life;
