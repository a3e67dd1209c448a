//! An id of one kind is not an id of another (row 26).

use bds_core::graph::{BitmapId, Graph};

fn check(graph: Graph, bitmap: BitmapId) -> bool {
    graph.acquire(bitmap).is_ok()
}

fn main() {}
