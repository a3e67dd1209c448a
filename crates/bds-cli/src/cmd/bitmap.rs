//! `bitmap`: adds, removes, clears, enables, disables and merges persistent dirty bitmaps.
//!
//! The actions are done in the order of the command line. As with qemu-img, those before one that
//! fails stay done.

use std::ffi::OsStr;

use bds_core::graph::{BitmapOptions, Graph, NodeRef};
use bds_core::{Error, ErrorKind, Result};

use crate::args::{Bitmap, BitmapAction};
use crate::image;
use crate::image_spec::Spec;

pub(crate) fn run(args: &Bitmap) -> Result<()> {
    let (filename, name) = check(args)?;
    let granularity = match &args.granularity {
        None => None,
        Some(text) => granularity(text)?,
    };
    let spec = Spec::read(filename, &args.source)?.writable();
    image::block_on(async {
        let graph = image::trusting_graph();
        let node = image::open(&graph, &spec).await?;
        let done = match open_source(&graph, args).await {
            Ok(source) => {
                let job = Job { node: &node, source: source.as_ref(), name, granularity };
                let done = job.run(&args.actions.0).await;
                match source {
                    None => done,
                    Some(source) => done.and(source.close().await?.into_result()),
                }
            }
            Err(error) => Err(error),
        };
        let closed = node.close().await?.into_result();
        done.and(closed)
    })
}

/// Checks which options go together; returns the image and the bitmap.
fn check(args: &Bitmap) -> Result<(&OsStr, &str)> {
    let refuse = |words: &str| Err(Error::new(ErrorKind::InvalidInput, words));
    let has = |wanted: fn(&BitmapAction) -> bool| args.actions.0.iter().any(wanted);
    if args.actions.0.is_empty() {
        return refuse(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        );
    }
    if args.granularity.is_some() && !has(|action| *action == BitmapAction::Add) {
        return refuse("granularity only supported with --add");
    }
    if args.source_file.is_some() && !has(|action| matches!(action, BitmapAction::Merge(_))) {
        return refuse("Merge bitmap source file only supported with --merge");
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return refuse("-F only supported with -b");
    }
    match &args.words[..] {
        [filename, name] => match name.to_str() {
            Some(name) => Ok((filename, name)),
            None => refuse("a bitmap's name is UTF-8"),
        },
        _ => refuse("Expecting filename and bitmap name"),
    }
}

/// Of a new bitmap; `None` for 0, the default.
fn granularity(text: &str) -> Result<Option<u32>> {
    match super::size("granularity", text)? {
        0 => Ok(None),
        // No such power of two is allowed: the error is that of any other wrong number.
        bytes => Ok(Some(u32::try_from(bytes).unwrap_or(u32::MAX))),
    }
}

/// The image that bitmaps are merged from, unless it is the same.
async fn open_source(graph: &Graph, args: &Bitmap) -> Result<Option<NodeRef>> {
    let Some(name) = &args.source_file else { return Ok(None) };
    let spec = Spec::read(name, &args.source)?;
    let spec = Spec { is_options: false, format: args.source_format.as_deref(), ..spec };
    image::open(graph, &spec).await.map(Some)
}

/// Changes one bitmap of an image.
struct Job<'a> {
    node: &'a NodeRef,
    source: Option<&'a NodeRef>,
    name: &'a str,
    granularity: Option<u32>,
}

impl Job<'_> {
    async fn run(&self, actions: &[BitmapAction]) -> Result<()> {
        for action in actions {
            self.apply(action).await.map_err(|error| {
                let (verb, name) = (action.verb(), self.name);
                error.context(format_args!("Operation {verb} on bitmap {name} failed"))
            })?;
        }
        Ok(())
    }

    async fn apply(&self, action: &BitmapAction) -> Result<()> {
        let Self { node, name, .. } = self;
        match action {
            BitmapAction::Add => {
                let options = BitmapOptions {
                    granularity: self.granularity,
                    persistent: true,
                    ..BitmapOptions::named(*name)
                };
                node.add_bitmap(options).await.map(|_| ())
            }
            BitmapAction::Remove => node.remove_bitmap(name).await,
            BitmapAction::Clear => node.clear_bitmap(name).await,
            BitmapAction::Enable => node.enable_bitmap(name).await,
            BitmapAction::Disable => node.disable_bitmap(name).await,
            BitmapAction::Merge(from) => {
                let source = self.source.unwrap_or(node);
                node.merge_bitmaps(name, &[(source, from)]).await
            }
        }
    }
}
