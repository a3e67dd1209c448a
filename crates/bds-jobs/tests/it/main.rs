//! Tests of the crate's interface, on the simulated world.

mod errors;
mod fake;
mod groups;
mod life;
mod shutdown;
mod speed;
mod verbs;
