//! A node that a change removes is not used after it (row 11: backup's filter was).

use bds_core::graph::{Graph, NodeRef};

async fn story(graph: Graph, filter: NodeRef) -> usize {
    let change = graph.change().drop_filter(&filter).remove(filter);
    let _report = change.commit().await;
    filter.count()
}

fn main() {}
