//! The lock, and the right to move edges, are the graph's own (2.11, number 1).

use bds_core::graph::drain::set::DrainedEdit;

fn story(_edit: DrainedEdit<'_>) {}

fn main() {}
