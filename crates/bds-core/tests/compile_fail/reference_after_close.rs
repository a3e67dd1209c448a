//! A reference is used up by closing its node.

use bds_core::graph::NodeRef;

async fn story(node: NodeRef) -> usize {
    let _report = node.close().await;
    node.count()
}

fn main() {}
