//! Creates or opens (`-n`) the target of `mirror`, after all checks that need no change of it, and
//! closes it.

use bds_core::driver::OpenFlags;
use bds_core::graph::{Graph, NodeRef};
use bds_core::{Error, ErrorKind, Result};

use super::plan::Plan;
use crate::cmd::{convert_target, create};
use crate::file_identity;
use crate::image;
use crate::image_spec::Spec;
use crate::overlay::{Base, Content};
use crate::partial_output::PartialOutput;

/// The open target.
pub(super) struct Target {
    pub(super) node: NodeRef,
    /// Reads as zeros everywhere.
    pub(super) is_zero: bool,
}

impl Target {
    /// Creates or opens the target.
    pub(super) async fn open(
        graph: &Graph,
        plan: &Plan<'_>,
        source: &NodeRef,
        partial: &mut PartialOutput,
    ) -> Result<Self> {
        match plan.args.no_create {
            true => check_existing(graph, plan, source).await?,
            false => make(graph, plan, source, partial).await?,
        }
        let flags = OpenFlags { cache: plan.target_cache, discard: true, ..OpenFlags::default() };
        let node = image::open(graph, &spec(plan, flags)).await?;
        // A new image reads as zeros, unless a device or a backing file shows through.
        let is_new = !plan.args.no_create && !plan.options.contains("backing_file");
        let is_zero = plan.args.target_is_zero || (is_new && !image::shows_old_bytes(&node));
        Ok(Self { node, is_zero })
    }

    /// Flushes what was written, and reports what fails.
    pub(super) async fn close(self) -> Result<()> {
        let closed = self.node.close().await?.into_result();
        closed.map_err(|error| error.context("cannot finish the output"))
    }
}

async fn make(
    graph: &Graph,
    plan: &Plan<'_>,
    source: &NodeRef,
    partial: &mut PartialOutput,
) -> Result<()> {
    let path = create::path(plan.target)?;
    let mut options = plan.options.clone();
    options.set("size", source.len());
    let base = Base::open(graph, &options, &path).await?;
    if let Some(base) = &base {
        base.refuse_other_than_below(source)?;
    }
    let format = graph.config().registry.format(plan.format())?;
    format.check_create(&mut options.clone(), base.as_ref().map(Base::len))?;
    convert_target::check_cache(graph, &path, plan.target_cache).await?;
    create::create(graph, plan.format(), path, options, false).await?;
    partial.set_created();
    match base {
        Some(base) => base.close().await,
        None => Ok(()),
    }
}

/// Checks an existing target before it is opened for writing; changes nothing.
async fn check_existing(graph: &Graph, plan: &Plan<'_>, source: &NodeRef) -> Result<()> {
    let flags = OpenFlags { read_only: true, force_share: true, ..OpenFlags::default() };
    let node = image::open(graph, &spec(plan, flags)).await?;
    file_identity::refuse_read_files(&node, [source])?;
    let len = node.len();
    node.close().await?.into_result()?;
    if len == source.len() {
        return Ok(());
    }
    let message = format!(
        "the target has another size than the source, which has {} bytes: resize it, or make a new one",
        source.len()
    );
    let error = Error::new(ErrorKind::InvalidInput, message).field("target size", len);
    Err(error.file(plan.target))
}

fn spec<'a>(plan: &'a Plan<'a>, flags: OpenFlags) -> Spec<'a> {
    let args = plan.args;
    let format = Some(plan.format()).filter(|_| !args.target_image_opts);
    Spec { name: plan.target, is_options: args.target_image_opts, format, flags }
}

impl Base {
    /// Refuses an image that is not the one below the source: a copy of the source's own layer
    /// means nothing on another one.
    fn refuse_other_than_below(&self, source: &NodeRef) -> Result<()> {
        let below = crate::cmd::job::image_below(source);
        let fits = match (self.content(source)?, &below) {
            (Content::Above(layer), Some(below)) => layer == below.id(),
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let message = "the source's own layer fits on its own backing file only: name that with -B";
        Err(Error::new(ErrorKind::InvalidInput, message).field("source", source.name()))
    }
}
