//! `graph`: draws the nodes of an image, their holders and their edges.

use std::ffi::OsStr;
use std::fmt::Write as _;

use bds_core::driver::Role;
use bds_core::graph::{Access, Graph, Holder, HolderKind, NodeRef, walk};
use bds_core::{Error, Result};

use crate::args::{self, Drawing};
use crate::image;
use crate::image_spec::Spec;
use crate::printer;
use crate::render::{self, Link, Shape};

pub(crate) fn run(args: &args::Graph) -> Result<()> {
    let text = image::block_on(draw(args))?;
    match &args.write_to {
        Some(path) => {
            std::fs::write(path, text).map_err(|e| Error::io(e, "cannot write").file(path))
        }
        None => printer::text(&text),
    }
}

async fn draw(args: &args::Graph) -> Result<String> {
    let graph = image::trusting_graph();
    let mut nodes = Vec::new();
    for name in &args.filenames {
        nodes.push(image::open(&graph, &Spec::read(name, &args.source)?).await?);
    }
    if let Some(path) = &args.write_to {
        crate::file_identity::refuse_image_file(&graph, path)?;
    }
    let text = match args.output {
        Drawing::Text => graph.dump(),
        Drawing::Dot => graph.dot(),
        Drawing::Svg => drawing(&graph).svg(),
        Drawing::Json => format!("{:#}\n", graph.query_graph()),
    };
    for node in nodes {
        node.close().await?.into_result()?;
    }
    Ok(text)
}

/// Describes all nodes of the graph as boxes, and all edges as lines.
fn drawing(graph: &Graph) -> render::Drawing {
    let nodes = graph.nodes();
    let place = |name: &str| nodes.iter().position(|node| node.name() == name);
    let mut drawing =
        render::Drawing { shapes: nodes.iter().map(shape).collect(), links: Vec::new() };
    for (from, node) in nodes.iter().enumerate() {
        for edge in node.edges_below() {
            let Some(to) = place(&edge.child_name) else { continue };
            let Access { perm, shared } = edge.access;
            drawing.links.push(Link {
                from,
                to,
                label: edge.name.to_owned(),
                tooltip: format!(
                    "{}.{}: permissions {perm}; shared {shared}",
                    node.name(),
                    edge.name
                ),
                is_chain: edge.role.intersects(Role::COW | Role::FILTERED),
            });
        }
    }
    drawing
}

fn shape(node: &NodeRef) -> Shape {
    let is_filter = node.edges_below().iter().any(|edge| edge.role.contains(Role::FILTERED));
    let is_end = walk::children(node).is_empty();
    let file = walk::filename(node);
    let file_name = file.as_deref().and_then(|path| path.file_name().map(OsStr::to_string_lossy));
    let title = match file_name {
        Some(name) if !is_filter => name.into_owned(),
        _ => node.driver_name().to_owned(),
    };
    let state = if node.is_writable() { "read-write" } else { "read-only" };
    let mut details = vec![
        format!("{} {}", node.driver_name(), node.name()),
        format!("{}, {state}", crate::human_size::human_size(node.len())),
    ];
    let holders: Vec<String> = holders(node).into_iter().map(|h| format!("held by {h}")).collect();
    details.extend(holders.iter().cloned());
    let mut tooltip = format!("node '{}', driver {}", node.name(), node.driver_name());
    let _ = write!(tooltip, "\n{} bytes, {state}", node.len());
    // Not counting the reference that draws.
    let _ = write!(tooltip, "\nreferences: {}", node.count().saturating_sub(1));
    if let Some(path) = &file {
        let _ = write!(tooltip, "\nfile: {}", path.display());
    }
    for line in &holders {
        let _ = write!(tooltip, "\n{line}");
    }
    let fill = match (is_end, is_filter) {
        (true, _) => "#eef3e8",
        (false, true) => "#f6efe2",
        (false, false) => "#e8eef6",
    };
    Shape { title, details, tooltip, fill }
}

/// Returns the holders of a node, except edges, which are drawn, and the tool's own references.
fn holders(node: &NodeRef) -> Vec<String> {
    let is_drawn =
        |kind| matches!(kind, HolderKind::Edge | HolderKind::Iterator | HolderKind::Owner);
    let holders = node.graph().holders(node.id()).into_iter();
    holders
        .filter(|holder| !is_drawn(holder.kind.into()))
        .map(|holder| Holder { kind: holder.kind, name: holder.name }.to_string())
        .collect()
}
