//! The graph's lock and the right to move edges are private (row 46).

use bds_core::graph::drain::set::DrainedEdit;

fn check(_edit: DrainedEdit<'_>) {}

fn main() {}
