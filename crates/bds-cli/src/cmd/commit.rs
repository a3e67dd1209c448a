//! `commit`: writes what an image holds into an image below it.
//!
//! The job `commit` on closed images. The image keeps its backing file; unless it was committed
//! further down than into that, it is emptied.

use bds_core::{Error, ErrorKind, Result};
use bds_jobs::{Commit, CommitOptions};

use crate::args::Commit as Args;
use crate::cmd::job;
use crate::image;
use crate::image_spec::{self, Spec};

pub(crate) fn run(args: &Args) -> Result<()> {
    let cache = image_spec::cache_mode("-t", &args.cache)?;
    let spec = Spec::read(&args.filename, &args.source)?.writable().cache(cache);
    let settings = job::Settings::new(&args.display, args.rate.as_deref(), args.quiet)?;
    job::block_on(async {
        let graph = image::trusting_graph();
        let node = image::open(&graph, &spec).await?;
        let base = match &args.base {
            Some(name) => Some(job::find_below(&node, name).await?),
            None => None,
        };
        let is_direct = base.is_none();
        let Some(base) = base.or_else(|| job::image_below(&node)) else {
            let message = "Image does not have a backing file";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        };
        let options = CommitOptions { base: Some(base.clone()), ..CommitOptions::new(&node) };
        let prepared = Commit::prepare(job::ID, options).await?;
        job::run(&graph, prepared, &settings).await?;
        drop(base);
        let backend = image::backend(&node, true)?;
        if is_direct && !args.drop {
            backend.make_empty().await?;
        }
        if is_direct {
            job::note_base(&backend).await;
        }
        image::close(backend, node).await
    })?;
    settings.say("Image committed.")
}
