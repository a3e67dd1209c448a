//! `graph`: the nodes behind an image, who holds them, and what they hold.

use bds_core::graph::{Access, Graph, Holder, HolderKind, NodeRef, walk};
use bds_core::{Error, Result};

use crate::args::{self, Drawing};
use crate::image::{self, Spec};
use crate::picture::{Link, Picture, Shape};
use crate::printer;

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
    let text = match args.output {
        Drawing::Text => graph.dump(),
        Drawing::Dot => graph.dot(),
        Drawing::Svg => picture(&graph).svg(),
        Drawing::Json => format!("{:#}\n", graph.query_graph()),
    };
    for node in nodes {
        node.close().await?.into_result()?;
    }
    Ok(text)
}

fn picture(graph: &Graph) -> Picture {
    let nodes = graph.nodes();
    let place = |name: &str| nodes.iter().position(|node| node.name() == name);
    let mut picture = Picture { shapes: nodes.iter().map(shape).collect(), links: Vec::new() };
    for (from, node) in nodes.iter().enumerate() {
        for edge in node.edges_below() {
            if let Some(to) = place(&edge.child_name) {
                let Access { perm, shared } = edge.access;
                let label = format!("{} (does {perm}; lets {shared})", edge.name);
                picture.links.push(Link { from, to, label });
            }
        }
    }
    picture
}

fn shape(node: &NodeRef) -> Shape {
    let state = if node.is_writable() { "read-write" } else { "read-only" };
    // Not counting the references that draw.
    let count = node.count().saturating_sub(1);
    let is_end = walk::children(node).is_empty();
    let mut lines = vec![
        format!("{} ({})", node.name(), node.driver_name()),
        format!("{}, {state}", crate::text::human_size(node.len())),
        format!("{count} reference{}", if count == 1 { "" } else { "s" }),
    ];
    let holders = node.graph().holders(node.id());
    let is_drawn = |kind| matches!(kind, HolderKind::Edge | HolderKind::Iterator);
    for holder in holders.into_iter().filter(|holder| !is_drawn(holder.kind)) {
        lines.push(format!("held by {}", Holder { kind: holder.kind, name: holder.name }));
    }
    if let (true, Some(file)) = (is_end, walk::filename(node)) {
        lines.push(file.display().to_string());
    }
    Shape { lines, fill: if is_end { "#eef3e8" } else { "#e8eef6" } }
}
