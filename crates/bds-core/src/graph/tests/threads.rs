//! Tests the gate on real threads, under contention.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use bds_refcount::Strong;

use crate::graph::change::commit::Moved;
use crate::graph::change::stage::Move;
use crate::graph::drain::set::DrainSet;
use crate::graph::drain::set::DrainedEdit;
use crate::graph::{Access, Edge, NodeRef};
use crate::test_kit::gate_port::root;
use crate::test_kit::logging::run;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future that only other threads wake.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

/// Enters and leaves until `stop` is set; asserts that a node marked empty is not entered.
fn keep_entering(edge: &Edge, empty: &[(NodeRef, AtomicBool); 2], stop: &AtomicBool) -> usize {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(ticket) = edge.ticket() else {
            block_on(edge.wait_open());
            continue;
        };
        let target = edge.target();
        if count % 3 == 0 {
            thread::yield_now(); // a change may happen in between
        }
        let number = target.tracker().enter();
        if edge.admits(ticket) {
            let (_, is_empty) =
                empty.iter().find(|(node, _)| node.id() == target.id()).expect("one of the two");
            thread::yield_now();
            assert!(!is_empty.load(Ordering::SeqCst), "inside a drained node");
            assert_eq!(edge.target().id(), target.id(), "re-pointed while inside");
            count += 1;
        }
        target.tracker().leave(number);
    }
    count
}

#[test]
fn no_request_is_inside_a_drained_or_left_node() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let a = fixture.open("driver=file,filename=a,node-name=a").await;
        let b = fixture.open("driver=file,filename=b,node-name=b").await;
        let edge = root(&a, "guest", Access::READ);
        let graph = fixture.graph.clone();
        let nodes = [(a, AtomicBool::new(false)), (b, AtomicBool::new(false))];
        let stop = AtomicBool::new(false);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let count = keep_entering(&edge, &nodes, &stop);
                    total.fetch_add(count, Ordering::Relaxed);
                });
            }
            for round in 0..2000 {
                let (from, is_empty) = &nodes[round % 2];
                let (to, _) = &nodes[(round + 1) % 2];
                let strong = Strong::clone(from.strong());
                let drained = block_on(DrainSet::begin(&graph, vec![strong.clone()], "test"));
                is_empty.store(true, Ordering::SeqCst);
                thread::yield_now();
                // The count may be up for a moment: a thread counts itself, finds the gate closed,
                // and leaves.
                let to = Some(to.strong().clone());
                let mut moved = Moved::default();
                let lock = graph.0.core.lock();
                let staged = Move { edge: Arc::clone(&edge), from: Some(strong), to, number: 0 };
                let since = std::panic::Location::caller();
                moved.repoint(&DrainedEdit::new(&drained, &lock), staged, since);
                drop(lock);
                drop(moved);
                is_empty.store(false, Ordering::SeqCst);
                drop(drained);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(total.load(Ordering::Relaxed) > 0);
        assert_eq!((nodes[0].0.count(), nodes[1].0.count()), (2, 1), "even rounds: back at a");
    });
}
