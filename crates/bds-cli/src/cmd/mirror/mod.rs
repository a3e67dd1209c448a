//! `mirror`: copies an image with the job `mirror`, on images that no other process writes.
//!
//! ```text
//! source opened read-only ─► target created or checked, and opened ─► job until it is ready
//!   ─► ended in order: the target is complete and durable ─► both closed
//! ```
//! `plan` checks the arguments, `target` makes the target. What was created is removed again if the
//! command does not complete, unless there is a record of it: then the same command goes on with
//! both. qemu-img has no such command; QEMU has `blockdev-mirror`.

mod plan;
mod target;

use bds_core::Result;
use bds_core::driver::OpenFlags;
use bds_core::graph::{Graph, NodeRef};
use bds_jobs::mirror::{Mirror, MirrorOptions};

use self::plan::Plan;
pub(super) use self::plan::check_target;
use self::target::Target;
use crate::args::Mirror as Args;
use crate::cmd::{create, job};
use crate::image;
use crate::image_spec::Spec;
use crate::incomplete::Failure;
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;

pub(crate) fn run(args: &Args) -> Result<()> {
    if create::wants_help(&args.options) {
        let format = args.output_format.as_deref().unwrap_or("raw");
        return create::help(format, args.target.as_deref());
    }
    let plan = Plan::new(args)?;
    job::block_on(mirror(&plan))?;
    plan.settings.say("Image mirrored.")
}

async fn mirror(plan: &Plan<'_>) -> Result<()> {
    let interrupt = Interrupt::watch()?;
    let graph = image::trusting_graph();
    let source = interrupt.run_or_drop(open_source(&graph, plan)).await?;
    let total = source.len();
    let goes_on = plan.goes_on();
    let mut partial = match plan.args.no_create || goes_on {
        true => PartialOutput::of_existing(),
        false => create::partial(create::path(plan.target)?, &plan.options, plan.args.keep_partial),
    };
    if plan.record.is_some() {
        partial.keep_for_record();
    }
    let opening = Target::open(&graph, plan, &source, (&mut partial, goes_on));
    let opened = interrupt.run_or_drop(opening).await;
    let copied = match opened {
        Err(error) => Err(Failure::before_copy(error)),
        Ok(target) => copy(&graph, plan, &interrupt, &source, target).await,
    };
    let outcome = match copied {
        Ok(()) => {
            partial.complete();
            Ok(())
        }
        Err(failure) => Err(failure.into_error(plan.target, total, partial)),
    };
    let closed = source.close().await?.into_result();
    outcome.and(closed)
}

async fn open_source(graph: &Graph, plan: &Plan<'_>) -> Result<NodeRef> {
    let args = plan.args;
    let flags = OpenFlags {
        read_only: true,
        force_share: args.force_share,
        // A copy of an image that is being written would be inconsistent.
        refuse_writers: !args.force_share,
        cache: plan.source_cache,
        ..OpenFlags::default()
    };
    let format = args.format.as_deref();
    let spec = Spec { name: &args.source, is_options: args.image_opts, format, flags };
    image::open(graph, &spec).await
}

/// Runs the job and closes the target.
async fn copy(
    graph: &Graph,
    plan: &Plan<'_>,
    interrupt: &Interrupt,
    source: &NodeRef,
    target: Target,
) -> Result<(), Failure> {
    let options = MirrorOptions {
        sync: plan.sync(),
        copy_mode: plan.copy_mode(),
        granularity: plan.granularity,
        buf_size: plan.buf_size,
        unmap: !plan.args.no_unmap,
        target_is_zero: target.is_zero,
        record: plan.record.clone(),
        manifest: plan.manifest(),
        ..MirrorOptions::new(source, &target.node, job::ID)
    };
    let done = match Mirror::prepare(options).await {
        Err(error) => Err((error, 0)),
        Ok(prepared) => {
            let prepared = Box::new(prepared);
            let when_ready = job::WhenReady::End;
            job::run_until(graph, prepared, &plan.settings, interrupt, when_ready).await
        }
    };
    let closed = target.close().await;
    match done {
        Ok(()) => {
            let done = Some(source.len());
            closed.map_err(|error| Failure { error, done, closing: None })
        }
        Err((error, done)) => Err(Failure { error, done: Some(done), closing: closed.err() }),
    }
}
