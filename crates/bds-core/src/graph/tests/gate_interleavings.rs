//! Every order in which two requests and a change can pass one door: the real gate and the real counters, step by step.
//!
//! Each step is one call; all of them are single sequentially consistent operations, so orders of calls are orders of memory. (Loom
//! does not get this far: the locks below it are of other crates. What the counts and RCU cells themselves do is modelled with
//! loom in bds-refcount.)

use super::fakes::{root, run};
use crate::graph::edge::Ticket;
use crate::graph::{Access, Edge, NodeRef};
use crate::tracker::ShardNumber;

/// How far a request is.
#[derive(Default)]
struct Request {
    step: usize,
    ticket: Option<Ticket>,
    number: Option<ShardNumber>,
    is_inside: bool,
    /// It found the gate shut and will come again later.
    is_turned_away: bool,
}

impl Request {
    const STEPS: usize = 4;

    fn go_on(&mut self, edge: &Edge, node: &NodeRef) {
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

/// How far the change is.
#[derive(Default)]
struct Change {
    step: usize,
    is_alone: bool,
}

impl Change {
    const STEPS: usize = 3;

    /// False: it has to wait, so this is not the next step.
    fn go_on(&mut self, edge: &Edge, node: &NodeRef) -> bool {
        match self.step {
            0 => edge.close(),
            1 if node.in_flight() > 0 => return false,
            1 => self.is_alone = true,
            _ => {
                self.is_alone = false;
                edge.open();
            }
        }
        self.step += 1;
        true
    }
}

/// Plays one order. `None`: it cannot be, because somebody would have had to wait. Else: was a request turned away?
fn play(order: &[usize], edge: &Edge, node: &NodeRef) -> Option<bool> {
    let mut requests = [Request::default(), Request::default()];
    let mut change = Change::default();
    let mut is_possible = true;
    for who in order {
        match requests.get_mut(*who) {
            Some(request) => request.go_on(edge, node),
            None => is_possible &= change.go_on(edge, node),
        }
        let inside = requests.iter().any(|request| request.is_inside);
        assert!(!(change.is_alone && inside), "inside while a change goes on: {order:?}");
    }
    while change.step < Change::STEPS {
        change.go_on(edge, node);
    }
    assert!(!edge.is_closed() && node.in_flight() == 0);
    is_possible.then(|| requests.iter().any(|request| request.is_turned_away))
}

/// All ways to lay these three sequences into one.
fn orders(left: [usize; 3], order: &mut Vec<usize>, visit: &mut dyn FnMut(&[usize])) {
    if left == [0; 3] {
        return visit(order);
    }
    for who in 0..3 {
        if left[who] > 0 {
            let mut rest = left;
            rest[who] -= 1;
            order.push(who);
            orders(rest, order, visit);
            order.pop();
        }
    }
}

#[test]
fn in_no_order_is_a_request_inside_while_the_edge_is_changed() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,filename=a,node-name=a").await;
        let edge = root(&node, "guest", Access::READ);
        let (mut possible, mut turned_away) = (0, 0);
        let left = [Request::STEPS, Request::STEPS, Change::STEPS];
        orders(left, &mut Vec::new(), &mut |order| {
            if let Some(was_turned_away) = play(order, &edge, &node) {
                possible += 1;
                turned_away += usize::from(was_turned_away);
            }
        });
        assert!(possible > 1000 && turned_away > 100, "{possible}, {turned_away}");
    });
}
