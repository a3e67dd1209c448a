//! A change that nobody commits is noticed (row 40: transactions were left behind).
#![deny(unused_must_use)]

use bds_core::graph::{Graph, NodeRef};

fn story(graph: Graph, node: NodeRef) {
    graph.change().own(&node);
}

fn main() {}
