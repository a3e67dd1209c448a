//! Tests of the crate's interface, on the simulated world.

mod fake;
mod life;
