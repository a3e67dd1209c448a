//! A borrow of a node does not outlive the reference (row 8: a job used nodes it had released).

use bds_core::graph::NodeRef;

fn check(node: NodeRef) -> usize {
    let name = node.name();
    drop(node);
    name.len()
}

fn main() {}
