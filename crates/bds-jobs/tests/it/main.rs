//! Tests of the crate's interface, on the simulated world.

mod backup;
mod chain;
mod checkpoint;
mod create;
mod errors;
mod fake;
mod grouped;
mod groups;
mod life;
mod load;
mod mirror;
mod query;
mod races;
mod shutdown;
mod speed;
mod stuck;
mod verbs;
