//! Changes the graph while two threads read and write: no request fails, no byte is lost.

use std::sync::Arc;

use bds_core::Options;
use bds_core::graph::{Graph, GraphConfig, NewImage};
use bds_testkit::Scratch;

use crate::load;

/// `cargo xtask bench --only graph` runs a million requests.
#[test]
fn requests_survive_adding_and_removing_overlays_and_filters() {
    let scratch = Scratch::in_memory();
    let graph = Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())));
    let image = NewImage {
        format: "qcow2".into(),
        path: scratch.path("layer1.qcow2"),
        options: Options::new().with("size", 1 << 20),
        skip_backing: true,
    };
    bds_io::block_on(graph.create_image(image)).unwrap();
    let report = load::run(scratch.dir(), 20_000).unwrap();
    assert!(report.requests >= 20_000 && report.changes >= 4, "{report:?}");
}
