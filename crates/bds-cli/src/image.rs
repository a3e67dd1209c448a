//! From what a user types to an open node: flags, cache modes, opening and closing (names and formats: `describe.rs`).
//!
//! The tool trusts the way qemu-img's users expect: files named inside images are opened, and a format that was not given is
//! guessed from the first bytes. One thing it does not do: write to an image that it merely guesses to be raw.

use std::ffi::OsStr;
use std::sync::Arc;

use bds_core::driver::{CacheMode, OpenFlags};
use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::{Context, ContextOptions};

use crate::describe;

use crate::file_identity;

/// Longest backing chain the tool opens. A loop is found long before.
const MAX_DEPTH: usize = 1 << 16;
const MAX_NODES: usize = 1 << 18;

/// A graph that trusts what images name.
pub(crate) fn trusting_graph() -> Graph {
    let registry = Arc::new(bds_drivers::registry());
    Graph::new(GraphConfig {
        gate: Arc::new(TrustAll { may_probe: true }),
        max_depth: MAX_DEPTH,
        max_nodes_per_image: MAX_NODES,
        ..GraphConfig::new(registry)
    })
}

/// What is to be opened, and how.
#[derive(Clone, Debug)]
pub(crate) struct Spec<'a> {
    /// A file name, or options.
    pub(crate) name: &'a OsStr,
    pub(crate) is_options: bool,
    pub(crate) format: Option<&'a str>,
    pub(crate) flags: OpenFlags,
}

impl<'a> Spec<'a> {
    /// A file or options to be read.
    pub(crate) fn read(name: &'a OsStr, source: &'a crate::args::Source) -> Result<Self> {
        refuse_objects(&source.object)?;
        let flags =
            OpenFlags { read_only: true, force_share: source.force_share, ..OpenFlags::default() };
        let format = source.format.as_deref();
        Ok(Self { name, is_options: source.image_opts, format, flags })
    }

    /// The same for writing.
    #[must_use]
    pub(crate) fn writable(mut self) -> Self {
        self.flags.read_only = false;
        self.flags.discard = true;
        self
    }

    #[must_use]
    pub(crate) fn cache(mut self, cache: CacheMode) -> Self {
        self.flags.cache = cache;
        self
    }
}

/// User-creatable objects hold secrets and the like; nothing here can use them yet.
pub(crate) fn refuse_objects(objects: &[String]) -> Result<()> {
    match objects.first() {
        None => Ok(()),
        Some(object) => Err(Error::new(
            ErrorKind::NotSupported,
            "--object is not supported: there are no user-creatable objects",
        )
        .field("object", object)),
    }
}

/// qemu-img's word for a cache mode.
pub(crate) fn cache_mode(option: &str, word: &str) -> Result<CacheMode> {
    CacheMode::parse(word).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("invalid cache mode for {option}: use none, writeback, writethrough, directsync or unsafe"),
        )
        .field("cache", word)
    })
}

/// Opens an image.
pub(crate) async fn open(graph: &Graph, spec: &Spec<'_>) -> Result<NodeRef> {
    let opened = match describe::options(graph, spec).await {
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

/// Runs a command that asks little of the disk: on this thread, with a small ring and no other thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let options = ContextOptions { ring_entries: 16, ..ContextOptions::default() };
    Context::new(options).map_err(|e| Error::io(e, "cannot start"))?.block_on(future)
}

/// A way into a node, under the name that "in use" messages show.
pub(crate) fn enter(node: &NodeRef, is_writable: bool) -> Result<Backend> {
    Backend::new(
        node,
        BackendOptions { name: "bds".to_owned(), writable: is_writable, ..Default::default() },
    )
}

/// Does a new image of this kind show what its place held before? A raw disk on a device does; nothing is emptied there.
pub(crate) fn shows_old_bytes(node: &NodeRef) -> bool {
    let file = walk::child(node, "file").map(|(file, _)| file.driver_name());
    file == Some("host_device") && node.driver_name() == "raw"
}

/// Ends the use of an image: what was written becomes durable, and what fails is said.
pub(crate) async fn close(backend: Backend, node: NodeRef) -> Result<()> {
    drop(backend);
    node.close().await?.into_result()
}
