//! Creates or opens (`-n`) the output of `convert`, after all checks that need no change of it, and
//! closes it.

use std::path::Path;
use std::sync::Arc;

use bds_core::driver::{Attempt, CacheMode, OpenFlags, Prealloc, Truncate, ZeroFlags};
use bds_core::graph::{Graph, NodeId, NodeRef, walk};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};

use super::convert_plan::Plan;
use crate::cmd::create;
use crate::file_identity;
use crate::image;
use crate::image_options;
use crate::image_spec::Spec;
use crate::overlay::{Base, Content};
use crate::partial_output::PartialOutput;

/// The open output and what is known about it.
pub(crate) struct Target {
    pub(crate) node: NodeRef,
    pub(crate) backend: Arc<Backend>,
    /// Length before the copy. A write with O_DIRECT is rounded up to whole blocks and may extend
    /// the file.
    len: u64,
    /// Reads as zeros everywhere.
    pub(crate) is_zero: bool,
    /// Zero writes may deallocate.
    pub(crate) may_unmap: bool,
    /// Only data of the source's layers above this one is copied.
    pub(crate) above: Option<NodeId>,
    /// Only what differs from this is copied.
    pub(crate) shows: Option<Arc<Backend>>,
    base: Option<Base>,
}

impl Target {
    /// Creates or opens the output. `total`: bytes of all sources.
    pub(crate) async fn open(
        graph: &Graph,
        plan: &Plan<'_>,
        sources: &[NodeRef],
        total: u64,
        partial: &mut PartialOutput,
    ) -> Result<Self> {
        match plan.args.no_create {
            true => Self::existing(graph, plan, sources, total).await,
            false => Self::create(graph, plan, sources, total, partial).await,
        }
    }

    async fn create(
        graph: &Graph,
        plan: &Plan<'_>,
        sources: &[NodeRef],
        total: u64,
        partial: &mut PartialOutput,
    ) -> Result<Self> {
        let path = create::path(plan.output)?;
        let mut options = plan.options.clone();
        let size = match options.take_size("size")? {
            Some(size) if size < total => {
                let message = "the option 'size' is smaller than the input";
                return Err(Error::new(ErrorKind::InvalidInput, message).field("size", size));
            }
            size => size.unwrap_or(total),
        };
        options.set("size", size);
        let base = Base::open(graph, &options, &path).await?;
        let format = Arc::clone(graph.config().registry.format(plan.format())?);
        let facts = format.check_create(&mut options.clone(), base.as_ref().map(Base::len))?;
        if plan.args.compress && facts.compressed_unit.is_none() {
            return Err(incompressible());
        }
        check_cache(graph, &path, plan.target_cache).await?;
        let (above, shows) = match (&base, sources) {
            (Some(base), [source]) => match base.content(source)? {
                Content::Above(layer) => (Some(layer), None),
                Content::UnlikeBase(base) => (None, Some(base)),
            },
            _ => (None, None),
        };
        create::create(graph, plan.format(), path, options, false).await?;
        partial.set_created();
        let (node, backend) = open(graph, plan).await?;
        // A new image reads as zeros; a device keeps its old data.
        let is_zero = base.is_none() && plan.sparse_len != 0 && !image::shows_old_bytes(&node);
        let len = backend.len();
        if base.as_ref().is_some_and(|base| base.len() > total) && len > total {
            // Behind the source's end the output reads as zeros, not as the longer backing image.
            let zeroed = backend.write_zeroes(total, len - total, ZeroFlags::empty()).await;
            // Without NO_FALLBACK it is always done.
            let (Attempt::Done | Attempt::Unsupported) =
                zeroed.map_err(|e| e.context("cannot clear the end of the output"))?;
        }
        Ok(Self { node, backend, len, is_zero, may_unmap: true, above, shows, base })
    }

    async fn existing(
        graph: &Graph,
        plan: &Plan<'_>,
        sources: &[NodeRef],
        total: u64,
    ) -> Result<Self> {
        let base = check_existing(graph, plan, sources, total).await?;
        let (node, backend) = open(graph, plan).await?;
        let len = backend.len();
        let is_zero = plan.args.target_is_zero;
        // A preallocated output keeps its space.
        let allocated_len = backend.allocated_len().await?;
        let may_unmap = allocated_len.is_none_or(|allocated| allocated < len);
        // Data in the overlay may hide the backing image, so the overlay itself is compared.
        let shows = base.is_some().then(|| Arc::clone(&backend));
        Ok(Self { node, backend, len, is_zero, may_unmap, above: None, shows, base })
    }

    /// Restores the output's length and closes it: flushes what was written, and reports what
    /// fails.
    pub(crate) async fn close(self) -> Result<()> {
        let Self { node, backend, len, shows, base, .. } = self;
        drop(shows);
        let trimmed = trim(&backend, len).await;
        let backend = Arc::into_inner(backend).expect("the copy is over");
        let closed = image::close(backend, node).await;
        let base_closed = match base {
            Some(base) => base.close().await,
            None => Ok(()),
        };
        trimmed.and(closed).map_err(|e| e.context("cannot finish the output"))?;
        base_closed
    }
}

async fn trim(backend: &Backend, len: u64) -> Result<()> {
    if backend.len() <= len {
        return Ok(());
    }
    let change = Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false };
    backend.truncate(change).await
}

/// Checks an existing output before it is opened for writing; changes nothing.
async fn check_existing(
    graph: &Graph,
    plan: &Plan<'_>,
    sources: &[NodeRef],
    total: u64,
) -> Result<Option<Base>> {
    let flags = OpenFlags { read_only: true, force_share: true, ..OpenFlags::default() };
    let node = image::open(graph, &spec(plan, flags)).await?;
    file_identity::refuse_read_files(&node, sources)?;
    if node.len() < total {
        let message = format!("the output is smaller than the input, which has {total} bytes");
        let error = Error::new(ErrorKind::InvalidInput, message).field("output size", node.len());
        return Err(error.file(plan.output));
    }
    if plan.args.compress && image::backend(&node, false)?.compressed_unit().is_none() {
        return Err(incompressible());
    }
    let path = walk::filename(&node).unwrap_or_default();
    let base = Base::open(graph, &plan.options, &path).await?;
    if let Some(base) = &base {
        base.refuse_other_overlay(&node)?;
    }
    node.close().await?.into_result()?;
    Ok(base)
}

fn spec<'a>(plan: &'a Plan<'a>, flags: OpenFlags) -> Spec<'a> {
    let args = plan.args;
    let format = Some(plan.format());
    let format = format.filter(|_| !args.target_image_opts);
    Spec { name: plan.output, is_options: args.target_image_opts, format, flags }
}

async fn open(graph: &Graph, plan: &Plan<'_>) -> Result<(NodeRef, Arc<Backend>)> {
    let flags = OpenFlags { cache: plan.target_cache, discard: true, ..OpenFlags::default() };
    let node = image::open(graph, &spec(plan, flags)).await?;
    let backend = Arc::new(image::backend(&node, true)?);
    Ok((node, backend))
}

/// Checks that an existing file supports the cache mode before it is truncated.
pub(super) async fn check_cache(graph: &Graph, path: &Path, cache: CacheMode) -> Result<()> {
    if !cache.direct || !path.exists() {
        return Ok(());
    }
    let file = image_options::file(path);
    let flags = OpenFlags { read_only: true, info_only: true, cache, ..OpenFlags::default() };
    graph.open_with(file, flags).await?.close().await?.into_result()
}

fn incompressible() -> Error {
    Error::new(ErrorKind::NotSupported, "Compression not supported for this file format")
}
