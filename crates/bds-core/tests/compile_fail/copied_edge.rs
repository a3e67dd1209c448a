//! An edge has one parent: it is not copied.

use bds_core::graph::Edge;

fn story(edge: &Edge) -> Edge {
    edge.clone()
}

fn main() {}
