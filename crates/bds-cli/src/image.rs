//! Opens and closes images: open flags, cache modes, the graph's configuration (names and formats:
//! `image_options.rs`).
//!
//! As qemu-img's users expect, files named inside images are opened, and a format that was not
//! given is guessed from the first bytes. Unlike qemu-img it never writes to an image whose format
//! is guessed to be raw.

use std::sync::Arc;

use bds_core::graph::gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, Options, Result};
use bds_io::{Context, ContextOptions};

use crate::file_identity;
use crate::image_options;
use crate::image_spec::Spec;

/// Longest backing chain the tool opens. A loop is found long before.
const MAX_DEPTH: usize = 1 << 16;
const MAX_NODES: usize = 1 << 18;

/// Returns a graph that opens the files named inside images and guesses formats.
pub(crate) fn trusting_graph() -> Graph {
    let registry = Arc::new(bds_drivers::registry());
    Graph::new(GraphConfig {
        gate: Arc::new(TrustAll { may_probe: true }),
        max_depth: MAX_DEPTH,
        max_nodes_per_image: MAX_NODES,
        ..GraphConfig::new(registry)
    })
}

/// Opens an image.
pub(crate) async fn open(graph: &Graph, spec: &Spec<'_>) -> Result<NodeRef> {
    let opened = match image_options::options(graph, spec).await {
        Ok(options) => open_described(graph, spec, options).await,
        Err(error) => Err(error),
    };
    opened.map_err(|e| e.context(format_args!("Could not open '{}'", spec.name.display())))
}

async fn open_described(graph: &Graph, spec: &Spec<'_>, options: Options) -> Result<NodeRef> {
    let node = graph.open_with(options, spec.flags).await?;
    if !spec.flags.read_only {
        file_identity::refuse_own_backing(&node)?;
    }
    Ok(node)
}

/// Runs a command with few requests: on this thread, with a small ring and no other thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let options = ContextOptions { ring_entries: 16, ..ContextOptions::default() };
    Context::new(options).map_err(|e| Error::io(e, "cannot start"))?.block_on(future)
}

/// Attaches a backend to a node, under the name that "in use" messages show.
pub(crate) fn backend(node: &NodeRef, is_writable: bool) -> Result<Backend> {
    Backend::new(
        node,
        BackendOptions { name: "bds".to_owned(), writable: is_writable, ..Default::default() },
    )
}

/// Whether a new image of this kind shows what its device held before: a raw disk on a device does,
/// because nothing is cleared.
pub(crate) fn shows_old_bytes(node: &NodeRef) -> bool {
    let file = walk::child(node, "file").map(|(file, _)| file.driver_name());
    file == Some("host_device") && node.driver_name() == "raw"
}

/// Closes an image: flushes what was written, and reports what fails.
pub(crate) async fn close(backend: Backend, node: NodeRef) -> Result<()> {
    drop(backend);
    node.close().await?.into_result()
}
