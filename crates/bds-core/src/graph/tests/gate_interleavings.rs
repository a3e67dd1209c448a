//! Tests every interleaving of two requests and a change at one edge, on the real gate and the real
//! in-flight count.
//!
//! Each step is one call, and all of them are single sequentially consistent operations, so orders
//! of calls are orders of memory accesses. (Loom cannot model this: the locks involved come from
//! other crates. The counts and RCU cells themselves are modelled with loom in bds-refcount.)

use crate::graph::model::gate::Ticket;
use crate::graph::{Access, Edge, NodeRef};
use crate::test_kit::gate_port::root;
use crate::test_kit::logging::run;
use crate::tracker::ShardNumber;

/// Progress of one request.
#[derive(Default)]
struct Request {
    step: usize,
    ticket: Option<Ticket>,
    number: Option<ShardNumber>,
    is_inside: bool,
    /// Found the gate closed; would wait for it to open.
    is_turned_away: bool,
}

impl Request {
    const STEPS: usize = 4;

    fn advance(&mut self, edge: &Edge, node: &NodeRef) {
        match self.step {
            0 => self.ticket = edge.ticket(),
            1 if self.ticket.is_some() => self.number = Some(node.node().tracker().enter()),
            2 => self.is_inside = self.ticket.is_some_and(|ticket| edge.admits(ticket)),
            3 => {
                self.is_turned_away = !self.is_inside;
                self.is_inside = false;
                if let Some(number) = self.number.take() {
                    node.node().tracker().leave(number);
                }
            }
            _ => {}
        }
        self.step += 1;
    }
}

/// Progress of the change.
#[derive(Default)]
struct Change {
    step: usize,
    is_changing: bool,
}

impl Change {
    const STEPS: usize = 3;

    /// False if the change has to wait, so that this cannot be the next step.
    fn advance(&mut self, edge: &Edge, node: &NodeRef) -> bool {
        match self.step {
            0 => edge.close_gate(),
            1 if node.in_flight() > 0 => return false,
            1 => self.is_changing = true,
            _ => {
                self.is_changing = false;
                edge.open_gate();
            }
        }
        self.step += 1;
        true
    }
}

/// Runs one interleaving. `None` if it is impossible because the change would have to wait; else
/// whether a request was turned away.
fn run_order(order: &[usize], edge: &Edge, node: &NodeRef) -> Option<bool> {
    let mut requests = [Request::default(), Request::default()];
    let mut change = Change::default();
    let mut is_possible = true;
    for actor in order {
        match requests.get_mut(*actor) {
            Some(request) => request.advance(edge, node),
            None => is_possible &= change.advance(edge, node),
        }
        let inside = requests.iter().any(|request| request.is_inside);
        assert!(!(change.is_changing && inside), "inside during a change: {order:?}");
    }
    while change.step < Change::STEPS {
        change.advance(edge, node);
    }
    assert!(!edge.gate_blocked() && node.in_flight() == 0);
    is_possible.then(|| requests.iter().any(|request| request.is_turned_away))
}

/// Enumerates all interleavings of the three sequences.
fn orders(left: [usize; 3], order: &mut Vec<usize>, visit: &mut dyn FnMut(&[usize])) {
    if left == [0; 3] {
        return visit(order);
    }
    for actor in 0..3 {
        if left[actor] > 0 {
            let mut rest = left;
            rest[actor] -= 1;
            order.push(actor);
            orders(rest, order, visit);
            order.pop();
        }
    }
}

#[test]
fn no_interleaving_lets_a_request_in_during_a_change() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,filename=a,node-name=a").await;
        let edge = root(&node, "guest", Access::READ);
        let (mut possible, mut turned_away) = (0, 0);
        let left = [Request::STEPS, Request::STEPS, Change::STEPS];
        orders(left, &mut Vec::new(), &mut |order| {
            if let Some(was_turned_away) = run_order(order, &edge, &node) {
                possible += 1;
                turned_away += usize::from(was_turned_away);
            }
        });
        assert!(possible > 1000 && turned_away > 100, "{possible}, {turned_away}");
    });
}
