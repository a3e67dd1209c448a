//! The lock, and the right to move edges, are the graph's own (2.11, number 1).

use bds_core::graph::lock::Edit;

fn story(_edit: Edit<'_>) {}

fn main() {}
