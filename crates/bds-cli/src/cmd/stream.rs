//! `stream`: copies what an image shows of the images below it into the image, and cuts them out of
//! its chain.
//!
//! The job `stream` on closed images. qemu-img has no such command; QEMU has `block-stream`.

use bds_core::Result;
use bds_jobs::{Stream, StreamOptions};

use crate::args::Stream as Args;
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
        let options = StreamOptions {
            base,
            backing_file: args.backing_file.clone(),
            ..StreamOptions::new(&node)
        };
        let prepared = Stream::prepare(job::ID, options).await?;
        job::run(&graph, prepared, &settings).await?;
        let backend = image::backend(&node, true)?;
        job::note_base(&backend).await;
        image::close(backend, node).await
    })?;
    settings.say("Image streamed.")
}
