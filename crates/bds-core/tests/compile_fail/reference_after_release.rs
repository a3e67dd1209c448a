//! A reference is used up by its release.

use bds_core::graph::NodeRef;

fn story(node: NodeRef) -> usize {
    node.release();
    node.count()
}

fn main() {}
