//! Dumps the graph as text, as a Graphviz drawing and as JSON; for tests, the tool and bug reports.
//!
//! Nodes are sorted by name and ids are left out, so equal graphs give equal texts. Taken node by
//! node while others may change the graph: each line was true at some moment.

use std::fmt::Write as _;

use crate::holder_kind::HolderKind;
use bds_refcount::HolderInfo;
use serde_json::{Value, json};

use super::facts::letters;
use crate::driver::Access;
use crate::driver::{DetectZeroes, OpenFlags, Role};
use crate::graph::Graph;
use crate::graph::model::node_ref::NodeRef;

impl Graph {
    /// All nodes that are open now, sorted by name.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let names: Vec<String> = graph.nodes().iter().map(|node| node.name().to_owned()).collect();
    /// assert_eq!(names, ["#block001", "base", "top"], "the file of 'top' has a generated name");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn nodes(&self) -> Vec<NodeRef> {
        let ids = self.0.core.arena.snapshot();
        let acquire = |id| self.0.core.arena.acquire(id).ok();
        let mut nodes: Vec<NodeRef> = ids
            .into_iter()
            .filter_map(acquire)
            .map(|strong| NodeRef::iterator(self, strong))
            .collect();
        nodes.sort_by(|a, b| a.name().cmp(b.name()));
        nodes
    }

    /// One paragraph a node: driver, length, state, count; its file, if it opened one; then its
    /// holders, its users with their permissions, and its children.
    ///
    /// ```text
    /// disk0 qcow2 len=1048576 rw refs=2
    ///   held by owner 'open'
    ///   used by backend 'guest' does=rwus lets=rwus
    ///   file -> disk0-file (data|metadata|primary) does=rwus lets=r-u-
    /// ```
    /// Letters: `r` consistent read, `w` write, `u` write unchanged, `s` resize.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// assert_eq!(
    ///     graph.dump(),
    ///     "disk mem len=1048576 rw refs=2\n  \
    ///        held by owner 'open'\n  \
    ///        used by backend 'guest' does=r--- lets=rwus\n"
    /// );
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for node in self.nodes() {
            dump_node(&mut out, &node);
        }
        out
    }

    /// For Graphviz: nodes as boxes with the file's name, driver, length and count; edges with name
    /// and role; other holders as ellipses.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let dot = graph.dot(); // for `dot -Tsvg`
    /// assert!(dot.starts_with("digraph bds {"));
    /// assert!(dot.contains(r#""top" -> "base" [label="backing\n"#), "{dot}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn dot(&self) -> String {
        let mut out = String::from("digraph bds {\n  node [shape=box, fontname=monospace];\n");
        for node in self.nodes() {
            let name = quoted(node.name());
            let count = node.count().saturating_sub(1);
            let state = if node.is_writable() { "rw" } else { "ro" };
            let file = super::walk::filename(&node).and_then(|path| {
                path.file_name().map(|name| format!("{}\\n", escaped(&name.to_string_lossy())))
            });
            let label = format!(
                "{}{}\\n{} {state}\\n{} bytes, {count} refs",
                file.unwrap_or_default(),
                escaped(node.name()),
                escaped(node.driver_name()),
                node.len()
            );
            let _ = writeln!(out, "  {name} [label=\"{label}\"];");
            for edge in node.edges_below() {
                let target = quoted(&edge.child_name);
                let style = if edge.role.contains(Role::COW) { ", style=dashed" } else { "" };
                let label = format!("{}\\n{}", edge.name, access_words(edge.access));
                let _ = writeln!(out, "  {name} -> {target} [label=\"{label}\"{style}];");
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

    /// The answer of QEMU's `query-named-block-nodes`, reduced to what is known here.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let options = "driver=mem,node-name=disk,size=1M,read-only=on";
    /// let disk = graph.open(Options::parse(options)?).await?;
    /// let all = graph.query();
    /// assert_eq!(all[0]["virtual-size"], 1 << 20);
    /// assert_eq!((&all[0]["node-name"], &all[0]["ro"]), (&"disk".into(), &true.into()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn query(&self) -> Value {
        self.nodes().iter().map(describe).collect()
    }
}

fn dump_node(out: &mut String, node: &NodeRef) {
    // Without the reference taken here.
    let count = node.count().saturating_sub(1);
    let (name, driver, len) = (node.name(), node.driver_name(), node.len());
    let _ = writeln!(out, "{name} {driver} len={len} {} refs={count}", state_words(node).join(","));
    if let Some(path) = node.node().own_filename() {
        let _ = writeln!(out, "  filename {}", path.display());
    }
    let users = node.edges_above();
    let is_user = |holder: &String| users.iter().any(|edge| edge.holder == *holder);
    for holder in named_holders(node).iter().filter(|holder| !is_user(holder)) {
        let _ = writeln!(out, "  held by {holder}");
    }
    for edge in &users {
        let _ = writeln!(out, "  used by {} {}", edge.holder, access_words(edge.access));
    }
    for edge in node.edges_below() {
        let (role, access) = (role_words(edge.role), access_words(edge.access));
        let frozen =
            edge.frozen_by.map_or_else(String::new, |holder| format!(" frozen by {holder}"));
        let _ = writeln!(out, "  {} -> {} ({role}) {access}{frozen}", edge.name, edge.child_name);
    }
    for reason in node.blocked(crate::graph::BlockOps::all()) {
        let _ = writeln!(out, "  blocked: {reason}");
    }
    for bitmap in node.bitmaps() {
        let name = bitmap.name.as_deref().unwrap_or("(anonymous)");
        let leased =
            bitmap.leased_by.map_or_else(String::new, |holder| format!(" leased by {holder}"));
        let states = [
            (!bitmap.recording, " disabled"),
            (bitmap.persistent, " persistent"),
            (bitmap.readonly, " readonly"),
            (bitmap.inconsistent, " inconsistent"),
        ];
        let states: String = states.iter().filter(|it| it.0).map(|it| it.1).collect();
        let _ = writeln!(out, "  bitmap {name}{states}{leased}");
    }
}

fn access_words(access: Access) -> String {
    format!("does={} lets={}", letters(access.perm), letters(access.shared))
}

fn state_words(node: &NodeRef) -> Vec<&'static str> {
    let mut words = flag_words(node.flags(), node.could_write());
    let states = [
        (!node.is_active(), "inactive"),
        (node.is_poisoned(), "poisoned"),
        (node.quiesce_count() > 0, "drained"),
    ];
    words.extend(states.into_iter().filter_map(|(is_so, word)| is_so.then_some(word)));
    words
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

/// Holders as text, sorted, without places in the program: those differ between builds.
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
        (flags.is_implicit, "implicit"),
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
