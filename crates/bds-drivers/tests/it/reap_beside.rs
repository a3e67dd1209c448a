//! Reaping on one thread beside users on another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::Options;
use bds_core::graph::{Graph, GraphConfig, Release};

/// A release of the only reference is the last one, also while another thread reaps.
#[test]
fn a_reap_holds_no_node_that_a_user_holds() {
    let graph = Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                drop(bds_io::block_on(graph.reap()));
            }
        });
        let mut not_last = 0;
        for _ in 0..3000 {
            let options = Options::parse("driver=mem,size=64k").unwrap();
            let node = bds_io::block_on(graph.open(options)).unwrap();
            not_last += usize::from(node.release() != Release::Last);
        }
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(not_last, 0, "of 3000");
    });
    bds_io::block_on(graph.shutdown()).check_leaks().unwrap();
}
