//! Options are given away, whether the open succeeds or not (row 28: they were freed twice).

use bds_core::graph::Graph;
use bds_core::Options;

async fn story(graph: Graph, options: Options) -> bool {
    let _node = graph.open(options).await;
    options.contains("driver")
}

fn main() {}
