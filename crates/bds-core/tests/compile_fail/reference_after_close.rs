//! Closing consumes the reference.

use bds_core::graph::NodeRef;

async fn check(node: NodeRef) -> usize {
    let _report = node.close().await;
    node.count()
}

fn main() {}
