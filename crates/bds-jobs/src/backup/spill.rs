//! The spill file of a backup: takes old data that memory has no space for.

use std::path::Path;

use bds_core::driver::OpenFlags;
use bds_core::graph::{Graph, NodeRef};
use bds_core::{Error, Options, Result};
use bds_io::OpenOptions;

use super::options::{Spill, wrong};
use crate::chain::nodes::close_dead;

/// Opens the spill node of a backup, for `len` bytes.
///
/// # Errors
/// Nothing is left. `AlreadyExists`: the file; `InvalidInput`: the node is too short; those of the
/// host.
pub(super) async fn open(graph: &Graph, spill: &Spill, len: u64) -> Result<NodeRef> {
    match spill {
        Spill::Node(node) if node.len() < len => wrong(format!(
            "spill node '{}' has only {} bytes, {len} are wanted: make it larger",
            node.name(),
            node.len()
        )),
        Spill::Node(node) => Ok(node.clone()),
        Spill::File(path) => open_file(graph, path, len).await,
    }
}

async fn open_file(graph: &Graph, path: &Path, len: u64) -> Result<NodeRef> {
    let fs = &graph.config().fs;
    let failed = |words: &str, error| Error::io(error, words).file(path);
    let exclusive =
        OpenOptions { write: true, create: true, exclusive: true, ..Default::default() };
    let file =
        fs.open(path, &exclusive).map_err(|error| failed("cannot create the spill file", error))?;
    let opened = async {
        // Without blocks: they are taken as they are needed.
        let sized = file.set_len(len).await;
        sized.map_err(|error| failed("cannot make the spill file so long", error))?;
        let mut options = Options::new().with("driver", "file").with("discard", "unmap");
        options.set_path("filename", path);
        let flags = OpenFlags { is_implicit: true, discard: true, ..OpenFlags::default() };
        graph.open_with(options, flags).await
    };
    let opened = opened.await;
    drop(file);
    let removed = fs.remove(path).map_err(|error| failed("cannot remove the spill file", error));
    match (opened, removed) {
        (Ok(node), Ok(())) => Ok(node),
        (Ok(node), Err(error)) => {
            drop(node);
            close_dead(graph).await.and(Err(error))
        }
        (Err(error), _) => Err(error),
    }
}
