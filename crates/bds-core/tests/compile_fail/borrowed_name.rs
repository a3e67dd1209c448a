//! What is borrowed of a node does not outlive the reference (row 8: a job used nodes it had given up).

use bds_core::graph::NodeRef;

fn story(node: NodeRef) -> usize {
    let name = node.name();
    drop(node);
    name.len()
}

fn main() {}
