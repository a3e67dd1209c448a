//! An id of one kind is none of another.

use bds_core::graph::{BitmapId, Graph};

fn story(graph: Graph, bitmap: BitmapId) -> bool {
    graph.acquire(bitmap).is_ok()
}

fn main() {}
