//! Removing a node in a change consumes the reference (row 11: backup's filter was used
//! afterwards).

use bds_core::graph::{Graph, NodeRef};

async fn check(graph: Graph, filter: NodeRef) -> usize {
    let change = graph.change().drop_filter(&filter).remove(filter);
    let _report = change.commit().await;
    filter.count()
}

fn main() {}
