//! The model of opening: a tree of nodes opens whole or not at all; and the options that describe
//! it to the graph.

use std::fmt::Write as _;

use super::commands::{Body, Child, Fault, Tree};
use super::model::{Access, Edge, Key, Kind, Model, Node};

/// Number of nodes that the tree opens.
pub(super) fn len(tree: &Tree) -> usize {
    let of_child = |child: &Child| match child {
        Child::Node(_) => 0,
        Child::Inline(tree) => len(tree),
    };
    1 + match &tree.body {
        Body::File => 0,
        Body::Filter(file) => of_child(file),
        Body::Image(file, backing) => of_child(file) + backing.as_deref().map_or(0, of_child),
    }
}

fn named(name: usize) -> String {
    format!("n{name}")
}

/// The tree as `blockdev-add` options. `None` if it names a node and there is none.
pub(super) fn options(tree: &Tree, model: &Model) -> Option<String> {
    let mut text = String::new();
    write_tree(&mut text, "", tree, model)?;
    Some(text)
}

fn write_tree(text: &mut String, prefix: &str, tree: &Tree, model: &Model) -> Option<()> {
    let driver = match &tree.body {
        Body::File => "file",
        Body::Filter(_) => "pass",
        Body::Image(..) => "cow",
    };
    let comma = if text.is_empty() { "" } else { "," };
    let _ = write!(text, "{comma}{prefix}driver={driver}");
    let mut add = |key: &str, value: &str| {
        let _ = write!(text, ",{prefix}{key}={value}");
    };
    if let Some(name) = tree.name {
        add("node-name", &named(name));
    }
    if let Some(ro) = tree.ro {
        add("read-only", if ro { "on" } else { "off" });
    }
    if tree.discard {
        add("discard", "unmap");
    }
    if tree.transfer > 0 {
        add("transfer", &tree.transfer.to_string());
    }
    match tree.fault {
        Fault::None => {}
        Fault::FailOpen => add("fail-open", "on"),
        Fault::FailFlush => add("fail-flush", "on"),
        Fault::FailClose => add("fail-close", "on"),
        Fault::RefuseBacking => add("refuse-backing", "on"),
        Fault::OddLen => add("odd-len", "on"),
    }
    let (file, backing) = match &tree.body {
        Body::File => (None, None),
        Body::Filter(file) => (Some(file), None),
        Body::Image(file, backing) => (Some(file), backing.as_ref()),
    };
    for (name, child) in [("file", file), ("backing", backing)] {
        match child.map(|child| &**child) {
            None => {}
            Some(Child::Node(n)) => {
                let to = pick(&model.live(), *n)?;
                let _ = write!(text, ",{prefix}{name}={}", model.nodes[&to].name);
            }
            Some(Child::Inline(tree)) => {
                write_tree(text, &format!("{prefix}{name}."), tree, model)?;
            }
        }
    }
    Some(())
}

pub(super) fn pick<T: Copy>(from: &[T], n: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[n % from.len()])
}

impl Model {
    /// The root of the opened tree; generated names are still empty.
    pub(super) fn open(&mut self, tree: &Tree) -> Option<Key> {
        if self.is_shut {
            return None;
        }
        let before = self.clone();
        let live = before.live();
        let mut reserved = Vec::new();
        let opened = self.open_tree(tree, (false, false), &live, &mut reserved);
        self.recompute();
        if opened.is_none() || !self.is_legal() {
            *self = before;
            return None;
        }
        opened
    }

    fn open_tree(
        &mut self,
        tree: &Tree,
        (ro, discard): (bool, bool),
        live: &[Key],
        reserved: &mut Vec<usize>,
    ) -> Option<Key> {
        if let Some(name) = tree.name {
            // P42: names are unique, and claimed before anything is opened.
            let is_taken = live.iter().any(|key| self.nodes[key].name == named(name));
            if is_taken || reserved.contains(&name) {
                return None;
            }
            reserved.push(name);
        }
        let key = self.fresh();
        let is_ro = tree.ro.unwrap_or(ro);
        let (kind, file, backing) = match &tree.body {
            Body::File => (Kind::File, None, None),
            Body::Filter(file) => (Kind::Filter, Some(file), None),
            Body::Image(file, backing) => (Kind::Image, Some(file), backing.as_ref()),
        };
        for (name, child) in [("file", file), ("backing", backing)] {
            let Some(child) = child else { continue };
            let child = match &**child {
                Child::Node(n) => pick(live, *n)?,
                Child::Inline(tree) => {
                    let ro = is_ro || name == "backing";
                    let child = self.open_tree(tree, (ro, true), live, reserved)?;
                    self.nodes.get_mut(&child).unwrap().inherits_from = Some(key);
                    child
                }
            };
            let edge = Edge {
                parent: Some(key),
                name,
                holder: String::new(),
                child: Some(child),
                access: Access { perm: 0, shared: 0 },
                frozen: None,
                stays: false,
            };
            let number = self.fresh();
            self.edges.insert(number, edge);
        }
        self.nodes.insert(key, node(tree, kind, is_ro, discard));
        (tree.fault != Fault::FailOpen).then_some(key)
    }

    /// Sets the name that a node got.
    pub(super) fn set_name(&mut self, key: Key, name: &str) {
        let node = self.nodes.get_mut(&key).unwrap();
        (node.name, node.first_name) = (name.to_owned(), name.to_owned());
        for edge in self.children(key) {
            let edge = self.edges.get_mut(&edge).unwrap();
            edge.holder = format!("edge '{name}.{}'", edge.name);
        }
    }
}

fn node(tree: &Tree, kind: Kind, ro: bool, discard: bool) -> Node {
    let name = tree.name.map(named).unwrap_or_default();
    Node {
        ro,
        is_ro_given: tree.ro.is_some(),
        discard: discard || tree.discard,
        fail_flush: tree.fault == Fault::FailFlush,
        fail_close: tree.fault == Fault::FailClose,
        refuses_backing: tree.fault == Fault::RefuseBacking,
        has_odd_len: tree.fault == Fault::OddLen,
        transfer: tree.transfer,
        ..Node::new(&name, kind)
    }
}
