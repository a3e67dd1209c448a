//! An open consumes the options, also when it fails (row 28: they were freed twice).

use bds_core::graph::Graph;
use bds_core::Options;

async fn check(graph: Graph, options: Options) -> bool {
    let _node = graph.open(options).await;
    options.contains("driver")
}

fn main() {}
