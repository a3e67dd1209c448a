//! The graph as text, as a drawing and as JSON; for tests, the tool and bug reports.
//!
//! Nodes are sorted by name and ids are left out, so equal graphs give equal texts. Taken node by node while others may
//! change the graph: each line was true at some moment.

use std::fmt::Write as _;

use bds_refcount::{HolderInfo, HolderKind};
use serde_json::{Value, json};

use super::Graph;
use super::node_ref::NodeRef;
use crate::driver::{DetectZeroes, OpenFlags, Role};

impl Graph {
    /// All nodes that are open now, sorted by name.
    pub fn nodes(&self) -> Vec<NodeRef> {
        let ids = self.0.reaper.arena.snapshot();
        let acquire = |id| self.0.reaper.arena.acquire(id).ok();
        let mut nodes: Vec<NodeRef> = ids
            .into_iter()
            .filter_map(acquire)
            .map(|strong| NodeRef::iterator(self, strong))
            .collect();
        nodes.sort_by(|a, b| a.name().cmp(b.name()));
        nodes
    }

    /// One paragraph a node:
    ///
    /// ```text
    /// disk0 qcow2 len=1048576 rw refs=1
    ///   held by owner 'open'
    ///   file -> disk0-file (data|metadata|primary)
    /// ```
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for node in self.nodes() {
            let flags = flag_words(node.flags(), node.is_writable()).join(",");
            // Not counting the reference that looks.
            let count = node.count().saturating_sub(1);
            let (name, driver, len) = (node.name(), node.driver_name(), node.len());
            let _ = writeln!(out, "{name} {driver} len={len} {flags} refs={count}");
            for holder in named_holders(&node) {
                let _ = writeln!(out, "  held by {holder}");
            }
            for edge in node.node().children().iter() {
                let target = edge.target();
                let role = role_words(edge.role());
                let _ = writeln!(out, "  {} -> {} ({role})", edge.name(), target.name());
            }
        }
        out
    }

    /// For Graphviz: nodes as boxes with driver, length and count; edges with name and role; other holders as ellipses.
    pub fn dot(&self) -> String {
        let mut out = String::from("digraph bds {\n  node [shape=box, fontname=monospace];\n");
        for node in self.nodes() {
            let name = quoted(node.name());
            let count = node.count().saturating_sub(1);
            let state = if node.is_writable() { "rw" } else { "ro" };
            let label = format!(
                "{}\\n{} {state}\\n{} bytes, {count} refs",
                escaped(node.name()),
                escaped(node.driver_name()),
                node.len()
            );
            let _ = writeln!(out, "  {name} [label=\"{label}\"];");
            for edge in node.node().children().iter() {
                let target = quoted(edge.target().name());
                let style = if edge.role().contains(Role::COW) { ", style=dashed" } else { "" };
                let _ = writeln!(out, "  {name} -> {target} [label=\"{}\"{style}];", edge.name());
            }
            for holder in named_holders(&node).iter().filter(|text| !text.starts_with("edge ")) {
                let id = quoted(&format!("{holder} of {}", node.name()));
                let _ = writeln!(out, "  {id} [shape=ellipse, label=\"{}\"];", escaped(holder));
                let _ = writeln!(out, "  {id} -> {name} [style=dotted];");
            }
        }
        out.push_str("}\n");
        out
    }

    /// As `query-named-block-nodes` tells it, reduced to what is known here.
    pub fn query(&self) -> Value {
        self.nodes().iter().map(describe).collect()
    }
}

fn describe(node: &NodeRef) -> Value {
    let flags = node.flags();
    let detect = match flags.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let children: Vec<Value> = node
        .node()
        .children()
        .iter()
        .map(|edge| json!({"child": edge.name(), "node-name": edge.target().name()}))
        .collect();
    json!({
        "node-name": node.name(),
        "drv": node.driver_name(),
        "ro": !node.is_writable(),
        "file": super::walk::filename(node).map(|path| path.to_string_lossy().into_owned()),
        "cache": {
            "direct": flags.cache.direct,
            "no-flush": flags.cache.no_flush,
            "writeback": flags.cache.writeback,
        },
        "detect_zeroes": detect,
        "virtual-size": node.len(),
        "children": children,
    })
}

/// Holders as words, sorted, without places in the program: those differ between builds.
fn named_holders(node: &NodeRef) -> Vec<String> {
    let is_ours = |info: &HolderInfo| info.kind == HolderKind::Iterator;
    let holders = node.graph().holders(node.id());
    let mut words: Vec<String> = holders
        .into_iter()
        .filter(|info| !is_ours(info))
        .map(|info| bds_refcount::Holder { kind: info.kind, name: info.name }.to_string())
        .collect();
    words.sort();
    words
}

fn flag_words(flags: OpenFlags, is_writable: bool) -> Vec<&'static str> {
    let words = [
        (true, if is_writable { "rw" } else { "ro" }),
        (flags.cache.direct, "direct"),
        (flags.cache.no_flush, "no-flush"),
        (!flags.cache.writeback, "writethrough"),
        (flags.discard, "discard"),
        (flags.detect_zeroes != DetectZeroes::Off, "detect-zeroes"),
        (flags.force_share, "force-share"),
        (flags.info_only, "info-only"),
        (flags.for_check, "for-check"),
    ];
    words.into_iter().filter_map(|(is_set, word)| is_set.then_some(word)).collect()
}

fn role_words(role: Role) -> String {
    role.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join("|")
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", escaped(text))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ")
}
