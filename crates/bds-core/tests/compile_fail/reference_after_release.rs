//! Releasing consumes the reference (row 30).

use bds_core::graph::NodeRef;

fn check(node: NodeRef) -> usize {
    node.release();
    node.count()
}

fn main() {}
