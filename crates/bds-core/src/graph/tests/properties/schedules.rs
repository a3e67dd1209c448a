//! Several tasks at once, in the order that a seed chooses: requests, sections, changes, opens and
//! releases.
//!
//! The result of each change depends on the order and is not predicted. Invariants are asserted
//! meanwhile, by the drivers and by each task; at the end the graph is read into a model, which
//! must compute the same state.

use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::Strong;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

use super::model::{ALL, Access, Edge, Kind, Model, Node};
use super::run::{graph_of_fakes, idle, real_access};
use super::snapshot;
use crate::driver::Role;
use crate::error::Result;
use crate::graph::tests::tally::Tally;
use crate::graph::{Graph, Node as RealNode, NodeId, NodeRef, Parent, Root, RootMove};
use crate::options::Options;
use crate::test_kit::gate_port;
use crate::test_kit::stepwise::{self, Stepwise};

/// One operation of a task. Numbers select among the initial nodes.
#[derive(Clone, Debug)]
pub(super) enum TaskOp {
    Read,
    Drain(usize),
    DrainAll,
    Nested(usize, usize),
    Append(usize, usize),
    Replace(usize, usize),
    InsertFilter(usize, usize),
    DropFilter(usize),
    SetBacking(usize, Option<usize>),
    PointRoot(usize),
    ReadOnly(usize, bool),
    /// A filter is opened, used and released.
    ShortLivedFilter(usize),
    Freeze(usize, usize),
    Inactivate(usize),
    Cancelled(usize, usize, usize),
    Reap,
}

pub(super) fn op() -> impl Strategy<Value = TaskOp> {
    let n = || 0..16usize;
    prop_oneof![
        8 => n().prop_map(|_| TaskOp::Read),
        3 => n().prop_map(TaskOp::Drain),
        1 => n().prop_map(|_| TaskOp::DrainAll),
        1 => (n(), n()).prop_map(|(a, b)| TaskOp::Nested(a, b)),
        2 => (n(), n()).prop_map(|(a, b)| TaskOp::Append(a, b)),
        3 => (n(), n()).prop_map(|(a, b)| TaskOp::Replace(a, b)),
        1 => (n(), n()).prop_map(|(a, b)| TaskOp::InsertFilter(a, b)),
        2 => n().prop_map(TaskOp::DropFilter),
        2 => (n(), proptest::option::of(n())).prop_map(|(a, b)| TaskOp::SetBacking(a, b)),
        2 => n().prop_map(TaskOp::PointRoot),
        1 => (n(), any::<bool>()).prop_map(|(a, b)| TaskOp::ReadOnly(a, b)),
        3 => n().prop_map(TaskOp::ShortLivedFilter),
        1 => (n(), n()).prop_map(|(a, b)| TaskOp::Freeze(a, b)),
        // Links of the initial chain.
        2 => prop_oneof![Just((3, 2)), Just((4, 3)), Just((4, 2))].prop_map(|(a, b)| TaskOp::Freeze(a, b)),
        1 => n().prop_map(TaskOp::Inactivate),
        1 => (n(), n(), 0..12usize).prop_map(|(a, b, c)| TaskOp::Cancelled(a, b, c)),
        1 => n().prop_map(|_| TaskOp::Reap),
    ]
}

/// The nodes from `top` down to `base`, along the links of a chain.
fn path(top: &NodeRef, base: &NodeRef) -> Vec<NodeId> {
    let mut path = vec![top.id()];
    let mut at = top.strong().clone();
    while at.id() != base.id() {
        let role = if at.driver().is_filter() { Role::FILTERED } else { Role::COW };
        let edge = at.child_in_role(role).expect("P21: the chain leads down to its end");
        at = edge.target().strong().clone();
        path.push(at.id());
    }
    path
}

fn is_empty(node: &NodeRef) -> bool {
    stepwise::requests(node.node().driver()) == 0
}

/// What one task uses.
struct TaskContext {
    graph: Graph,
    drivers: Arc<Stepwise>,
    nodes: Vec<NodeRef>,
    root: Arc<crate::graph::Edge>,
    tally: Arc<Tally>,
}

impl TaskContext {
    fn node(&self, n: usize) -> &NodeRef {
        &self.nodes[n % self.nodes.len()]
    }

    async fn op(&mut self, op: &TaskOp) {
        // Refusals are expected; the drivers and the other tasks assert that they change nothing.
        let outcome = match op {
            TaskOp::Drain(n) => return self.drain(self.node(*n)).await,
            TaskOp::Nested(a, b) => {
                let outer = self.graph.drain(self.node(*a)).await;
                self.drain(self.node(*b)).await;
                return drop(outer);
            }
            TaskOp::DrainAll => {
                let guard = self.graph.drain_all().await;
                assert!(self.nodes.iter().all(is_empty), "P34");
                bds_io::yield_now().await;
                assert!(self.nodes.iter().all(is_empty), "P34");
                return drop(guard);
            }
            TaskOp::Read => {
                if self.root.medium().is_some() {
                    gate_port::read(&self.root).await.unwrap();
                    self.tally.count("read");
                }
                return;
            }
            TaskOp::ShortLivedFilter(n) => return self.short_lived_filter(*n).await,
            TaskOp::Reap => return drop(self.graph.reap().await),
            TaskOp::Append(a, b) => self.graph.append(self.node(*a), self.node(*b)).await,
            TaskOp::Replace(a, b) => self.graph.replace(self.node(*a), self.node(*b)).await,
            TaskOp::InsertFilter(a, b) => {
                self.graph.insert_filter(self.node(*a), self.node(*b)).await
            }
            TaskOp::DropFilter(a) => self.graph.drop_filter(self.node(*a)).await,
            TaskOp::SetBacking(a, b) => {
                self.graph.set_backing(self.node(*a), b.map(|b| self.node(b))).await
            }
            TaskOp::PointRoot(n) => {
                let change = self.graph.change().move_root(RootMove::new(
                    &self.graph,
                    &self.root,
                    Some(self.node(*n)),
                ));
                change.commit().await.map(drop)
            }
            TaskOp::ReadOnly(n, on) => {
                let word = if *on { "on" } else { "off" };
                let options = Options::new().with("read-only", word);
                self.graph.reopen(self.node(*n), options).await
            }
            TaskOp::Freeze(a, b) => self.freeze(*a, *b).await,
            TaskOp::Inactivate(n) => match self.graph.inactivate(self.node(*n)).await {
                Ok(()) => self.graph.activate(self.node(*n)).await,
                Err(error) => Err(error),
            },
            TaskOp::Cancelled(a, b, turns) => {
                let change = self.graph.replace(self.node(*a), self.node(*b));
                let Some(outcome) = super::run::Comparison::run_for(*turns, change).await else {
                    return self.tally.count("cancelled");
                };
                outcome
            }
        };
        self.tally.count(if outcome.is_ok() { "changed" } else { "refused" });
    }

    /// P34: no request is inside or enters; P38: the drained node lives.
    async fn drain(&self, node: &NodeRef) {
        let guard = self.graph.drain(node).await;
        self.drivers.seal(node.name());
        for _ in 0..3 {
            assert!(is_empty(node), "P34");
            assert!(node.quiesce_count() > 0, "P35");
            bds_io::yield_now().await;
        }
        self.drivers.unseal(node.name());
        self.tally.count("drained");
        drop(guard);
    }

    /// P21: frozen links keep their target, and are not frozen twice.
    async fn freeze(&self, a: usize, b: usize) -> Result<()> {
        let (top, base) = (self.node(a), self.node(b));
        let frozen = self.graph.freeze_chain(top, base, "it")?;
        self.tally.count_if(!frozen.is_empty(), "frozen");
        let before = path(top, base);
        for _ in 0..4 {
            bds_io::yield_now().await;
            assert_eq!(path(top, base), before, "P21");
            let is_again = self.graph.freeze_chain(top, base, "another").is_ok();
            assert_eq!(is_again, frozen.is_empty(), "P21: by one at a time");
        }
        Ok(())
    }

    async fn short_lived_filter(&mut self, n: usize) {
        let text = format!("driver=pass,read-only=on,file={}", self.node(n).name());
        let Ok(node) = self.graph.open(Options::parse(&text).unwrap()).await else { return };
        let id = node.id();
        let access = real_access(Access { perm: 1, shared: ALL });
        let root = Root {
            kind: HolderKind::Backend,
            name: "guest",
            access,
            is_fixed: false,
            is_backend: false,
        };
        if let Ok(edge) = self.graph.attach_root(Some(&node), &root) {
            drop(node);
            gate_port::read(&edge).await.unwrap();
            self.tally.count("read");
        }
        // Others may have moved the edge to another node.
        bds_io::yield_now().await;
        drop(self.graph.acquire(id));
    }
}

/// Runs the tasks' operations in the order that the seed chooses.
pub(super) async fn play(sim: &bds_io::Sim, tasks: Vec<Vec<TaskOp>>, tally: &Arc<Tally>) {
    let (graph, drivers) = graph_of_fakes(sim, None);
    let nodes = initial_nodes(&graph).await;
    let mut running = Vec::new();
    for (place, ops) in tasks.into_iter().enumerate() {
        let access = real_access(Access { perm: 1, shared: ALL });
        let name = format!("r{place}");
        let root = Root {
            kind: HolderKind::Backend,
            name: &name,
            access,
            is_fixed: false,
            is_backend: false,
        };
        let root = graph.attach_root(Some(&nodes[place % nodes.len()]), &root).unwrap();
        let mut context = TaskContext {
            graph: graph.clone(),
            drivers: Arc::clone(&drivers),
            nodes: nodes.clone(),
            root,
            tally: Arc::clone(tally),
        };
        running.push(bds_io::spawn(async move {
            for op in &ops {
                context.op(op).await;
            }
            context.root
        }));
    }
    // P40: all tasks complete; the simulation panics if none can ever run again.
    let mut roots = Vec::new();
    for task in running {
        roots.push(task.await);
    }
    idle().await;
    graph.reap().await;
    check(&graph);
    drop((roots, nodes));
    idle().await;
    let report = graph.shutdown().await;
    report.check_leaks().unwrap();
    assert_eq!(graph.dump(), "", "P13");
    graph.reap().await;
}

/// Two images on each other, a filter, and some spare nodes; all read-only, so that edges can point
/// anywhere.
async fn initial_nodes(graph: &Graph) -> Vec<NodeRef> {
    let mut nodes = Vec::new();
    for text in [
        "driver=file,node-name=f0",
        "driver=file,node-name=f1",
        "driver=cow,node-name=base,file=f0",
        "driver=cow,node-name=top,file.driver=file,backing=base",
        "driver=pass,node-name=pass,file=top",
        "driver=pass,node-name=spare,file=f1",
        "driver=cow,node-name=over,file.driver=file",
    ] {
        let options = Options::parse(&format!("{text},read-only=on")).unwrap();
        nodes.push(graph.open(options).await.unwrap());
    }
    nodes
}

/// P16, P17, P24, P25, P35 at the end: the graph is what the model computes from its edges.
fn check(graph: &Graph) {
    let found = snapshot::of_graph(graph);
    let mut model = read(&graph.0.core.live());
    model.recompute();
    assert!(model.is_legal(), "P24");
    let wanted = snapshot::of_model(&model);
    assert_eq!(snapshot::edges(&found), snapshot::edges(&wanted), "P25, P35");
}

/// P24, P25: permissions of edges equal those computed from the roots down, and are legal. The
/// caller holds the graph's lock.
pub(in crate::graph::tests) fn check_permissions(nodes: &[Strong<RealNode>]) {
    let found = read(nodes);
    let mut wanted = found.clone();
    wanted.recompute();
    for (number, edge) in &found.edges {
        let wanted = wanted.edges[number].access;
        assert_eq!(edge.access, wanted, "P25: {} as it follows from the graph", edge.holder);
    }
    assert!(found.is_legal(), "P24");
}

/// Live nodes and their edges as a model, without derived values. The edges of dead nodes keep
/// their permissions.
fn read(nodes: &[Strong<RealNode>]) -> Model {
    let mut model = Model::default();
    let key =
        |id| nodes.iter().position(|node| node.id() == id).map(|at| u32::try_from(at).unwrap());
    for (number, node) in (0..).zip(nodes) {
        let kind = match node.driver_name() {
            "file" | "leaf" => Kind::File,
            "pass" | "filter" => Kind::Filter,
            _ => Kind::Image,
        };
        let new = Node {
            ro: node.flags().read_only,
            is_active: node.is_active(),
            ..Node::new(node.name(), kind)
        };
        model.nodes.insert(number, new);
        for edge in node.parents() {
            let access = edge.access();
            let bits = |perm: crate::graph::Perm| u8::try_from(perm.bits()).unwrap();
            let parent = match edge.parent() {
                Some(Parent::Node(id)) => key(*id),
                _ => None,
            };
            let number = model.fresh();
            let edge = Edge {
                parent,
                name: edge.name(),
                holder: edge.holder().to_string(),
                child: key(node.id()),
                access: Access { perm: bits(access.perm), shared: bits(access.shared) },
                frozen: None,
                stays: edge.is_fixed(),
            };
            model.edges.insert(number, edge);
        }
    }
    model
}
