//! Reopens nodes with other options: which nodes, which flags, and what their drivers prepare.
//!
//! A node's options are inherited by the nodes below that were opened inline with it
//! (`Node::inherits_from`), except options of their own. All drivers prepare while their nodes are
//! drained; then all take effect, children first.

use bds_refcount::Strong;

use super::action::Action;
use super::stage::{Facts, NewFacts};
use crate::driver::{OpenFlags, Reopen, ReopenContext};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::bitmaps::persist;
use crate::graph::model::flags;
use crate::graph::model::node::{Node, NodeId};
use crate::graph::query::walk;
use crate::graph::{Graph, NodeRef};
use crate::options::{ChildOption, OptionKind, Options};

/// A node to be reopened, with its new flags and options.
pub(in crate::graph) struct Wanted {
    node: NodeRef,
    flags: OpenFlags,
    options: Options,
}

impl Wanted {
    pub(in crate::graph) fn node(&self) -> Strong<Node> {
        Strong::clone(self.node.strong())
    }

    /// The facts to be checked, as far as they are known before the driver prepares.
    pub(in crate::graph) fn facts(&self) -> NewFacts {
        facts(&self.node, self.flags, &())
    }
}

/// A node whose driver is ready for its new flags. Dropped: nothing has changed.
pub(in crate::graph) struct Prepared<'w> {
    wanted: &'w Wanted,
    driver: Box<dyn Reopen + 'w>,
}

impl Prepared<'_> {
    /// The facts to be checked before it takes effect.
    pub(in crate::graph) fn facts(&self) -> NewFacts {
        facts(&self.wanted.node, self.wanted.flags, &*self.driver)
    }

    pub(in crate::graph) fn reopened(&self) -> Reopened {
        let node = self.wanted.node();
        let is_writeback = self.wanted.flags.cache.writeback;
        Reopened { is_changed: node.flags().cache.writeback != is_writeback, is_writeback, node }
    }

    pub(in crate::graph) fn commit(self) {
        self.wanted.node.node().set_flags(self.wanted.flags);
        self.driver.commit();
    }
}

/// A node whose reopen takes effect.
pub(in crate::graph) struct Reopened {
    pub(in crate::graph) node: Strong<Node>,
    is_writeback: bool,
    /// It differs from before.
    is_changed: bool,
}

impl Reopened {
    /// Makes the backends at the node follow its `cache.writeback`, as if they had been made now.
    /// Not under the topology lock: the last handle to a backend may be dropped meanwhile.
    pub(in crate::graph) fn update_backends(&self, graph: &Graph) {
        if !self.is_changed {
            return;
        }
        for entry in graph.backend_entries() {
            if entry.edge().medium().is_some_and(|medium| medium.id() == self.node.id()) {
                entry.set_writethrough(!self.is_writeback);
            }
        }
    }
}

fn facts(node: &NodeRef, flags: OpenFlags, prepared: &dyn Reopen) -> NewFacts {
    let facts = Facts {
        flags: Some(flags),
        is_writable: Some(!flags.read_only && !prepared.is_read_only()),
        is_active: None,
        request_alignment: prepared.request_alignment(),
    };
    (Strong::clone(node.strong()), facts)
}

/// Nodes that the options name as children. The keys are the driver's child options.
pub(in crate::graph) fn children_named(
    graph: &Graph,
    node: &NodeRef,
    options: &Options,
) -> Result<Vec<(&'static str, Option<NodeRef>)>> {
    let mut found = Vec::new();
    for name in child_options(graph, node)? {
        let Some(value) = options.peek(name) else { continue };
        match ChildOption::from_json(name, value.clone())? {
            ChildOption::None => found.push((name, None)),
            ChildOption::Node(to) => found.push((name, Some(graph.find(&to)?))),
            ChildOption::Tree(_) => {
                let message = format!("open '{name}' first and give its node name here");
                return Err(Error::new(ErrorKind::InvalidInput, message).node(node.name()));
            }
        }
    }
    Ok(found)
}

fn child_options(graph: &Graph, node: &Node) -> Result<Vec<&'static str>> {
    let driver = graph.config().registry.driver(node.driver_name())?;
    let children = driver.open_options().iter().filter(|spec| spec.kind == OptionKind::Child);
    Ok(children.map(|spec| spec.name).collect())
}

/// All nodes that the actions reopen, each once with the sum of its options, children before their
/// parents.
pub(in crate::graph) fn collect(graph: &Graph, actions: &[Action]) -> Result<Vec<Wanted>> {
    let mut all = Vec::new();
    for action in actions {
        if let Action::Reopen { node, options } = action {
            want(graph, &mut all, node, options)?;
        }
    }
    let tops: Vec<_> = all.iter().map(|wanted| Strong::clone(wanted.node.strong())).collect();
    let order: Vec<NodeId> = walk::parents_first(&tops).iter().map(|node| node.id()).collect();
    let place = |wanted: &Wanted| order.iter().position(|id| *id == wanted.node.id());
    all.sort_by_key(|wanted| std::cmp::Reverse(place(wanted)));
    Ok(all)
}

/// Lets the drivers prepare.
pub(in crate::graph) async fn prepare<'w>(
    graph: &Graph,
    wanted: &'w [Wanted],
) -> Result<Vec<Prepared<'w>>> {
    let mut prepared = Vec::new();
    for wanted in wanted {
        graph.step()?;
        let prepare = prepare_driver(graph, wanted).await;
        let driver = prepare.map_err(|error| error.node(wanted.node.name()))?;
        prepared.push(Prepared { wanted, driver });
    }
    Ok(prepared)
}

/// Refuses a node that copy-on-read writes to.
fn check_may_lose_writing(node: &Node) -> Result<()> {
    if !node.copies_on_read() {
        return Ok(());
    }
    let message = "what is read is copied into it: end copy-on-read first";
    Err(Error::new(ErrorKind::InUse, message).node(node.name()))
}

async fn prepare_driver<'w>(graph: &Graph, wanted: &'w Wanted) -> Result<Box<dyn Reopen + 'w>> {
    let Wanted { node, flags, options } = wanted;
    let mut context = ReopenContext {
        current: node.flags(),
        flags: *flags,
        options: options.clone(),
        fs: &graph.config().fs,
    };
    if flags.read_only {
        check_may_lose_writing(node)?;
    }
    if flags.read_only {
        // While it can still write. If the change fails after all, they are marked again before the
        // next write.
        persist::store_all(node).await?;
    }
    if node.could_write() && (flags.read_only || flags.cache.no_flush) {
        // Afterwards earlier writes would never be flushed.
        graph.0.core.flush_node(node.strong()).await?;
    }
    let prepared = node.driver().prepare_reopen(&mut context).await?;
    let registry = &graph.config().registry;
    flags::check_taken(&**registry.driver(node.driver_name())?, &context.options)?;
    Ok(prepared)
}

/// Adds the node with its new flags, and the nodes below that inherit them, to what earlier reopens
/// of the change want.
fn want(graph: &Graph, all: &mut Vec<Wanted>, node: &NodeRef, options: &Options) -> Result<()> {
    let mut options = Options::from_json(options.clone().into_json())?;
    for name in child_options(graph, node)? {
        options.take(name);
    }
    for fixed in ["driver", "node-name"] {
        check_fixed(node, fixed, options.take_str(fixed)?)?;
    }
    let place = entry(graph, all, node.strong());
    let flags =
        flags::take_flags(&mut options, all[place].flags).map_err(|e| e.node(node.name()))?;
    let driver = graph.config().registry.driver(node.driver_name())?;
    flags::check_known(&**driver, &options).map_err(|e| e.node(node.name()))?;
    all[place].flags = flags;
    let keys: Vec<String> = options.keys().map(str::to_owned).collect();
    for key in keys {
        if let Some(value) = options.take(&key) {
            all[place].options.set(&key, value);
        }
    }
    let mut todo = vec![place];
    while let Some(place) = todo.pop() {
        let (parent, flags) = (all[place].node.clone(), all[place].flags);
        for edge in parent.node().children().iter() {
            let way = walk::through_filters(edge.target().strong());
            for child in way.iter().filter(|node| node.inherits_from() == Some(parent.id())) {
                let known = all.iter().find(|wanted| wanted.node.id() == child.id());
                let now = known.map_or_else(|| child.flags(), |wanted| wanted.flags);
                let fresh = flags::inherited_again(now, child.given(), flags, edge.role());
                if fresh != now {
                    let place = entry(graph, all, child);
                    all[place].flags = fresh;
                    todo.push(place);
                }
            }
        }
    }
    Ok(())
}

/// The node's index in the list; added with its present flags if it is new.
fn entry(graph: &Graph, all: &mut Vec<Wanted>, node: &Strong<Node>) -> usize {
    if let Some(place) = all.iter().position(|wanted| wanted.node.id() == node.id()) {
        return place;
    }
    let node = NodeRef::change(graph, Strong::clone(node));
    let flags = node.flags();
    all.push(Wanted { node, flags, options: Options::new() });
    all.len() - 1
}

fn check_fixed(node: &NodeRef, option: &'static str, wanted: Option<String>) -> Result<()> {
    let now = if option == "driver" { node.driver_name() } else { node.name() };
    match wanted {
        Some(wanted) if wanted != now => {
            let message = format!("'{option}' cannot change: it is '{now}'");
            Err(Error::new(ErrorKind::InvalidInput, message).node(node.name()))
        }
        _ => Ok(()),
    }
}
