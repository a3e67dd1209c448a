//! `amend`: changes format options of an image, such as its version or the width of its refcounts.
//!
//! The job `amend` on a closed image.

use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_jobs::amend::Amend;

use crate::args::Amend as Args;
use crate::cmd::{create, job};
use crate::image;
use crate::image_spec::{self, Spec};
use crate::printer;

pub(crate) fn run(args: &Args) -> Result<()> {
    image_spec::refuse_objects(&args.source.object)?;
    let wrong = |words: &str| Err(Error::new(ErrorKind::InvalidInput, words));
    if args.options.is_empty() {
        return wrong("Must specify options (-o)");
    }
    let wants_help = create::wants_help(&args.options);
    if let Some(format) = args.source.format.as_deref().filter(|_| wants_help) {
        return help(format);
    }
    let Some(filename) = args.filename.as_deref() else {
        return wrong("Expecting one image file name");
    };
    let cache = image_spec::cache_mode("-t", &args.cache)?;
    let spec = Spec::read(filename, &args.source)?.cache(cache);
    let spec = if wants_help { spec } else { spec.writable() };
    let settings = job::Settings::new(&args.display, None, args.quiet)?;
    job::block_on(async {
        let graph = image::trusting_graph();
        let node = image::open(&graph, &spec).await?;
        amend_options(node.driver_name())?;
        if wants_help {
            help(node.driver_name())?;
            return image::close(image::backend(&node, false)?, node).await;
        }
        let options = create::format_options(&args.options)?;
        let work = Amend::of_node(&node, job::ID, options, args.force)?;
        job::run(&graph, work.into(), &settings).await?;
        let backend = image::backend(&node, false)?;
        image::close(backend, node).await
    })
}

/// The options that can be changed.
///
/// # Errors
/// `InvalidInput`: there is no such format; `NotSupported`: it has none.
fn amend_options(format: &str) -> Result<Vec<OptionSpec>> {
    let registry = bds_drivers::registry();
    let known = registry.driver(format);
    let driver = known.map_err(|_| {
        Error::new(ErrorKind::InvalidInput, format!("Unknown file format '{format}'"))
    })?;
    if driver.amend_options().is_empty() {
        let words = format!("Format driver '{format}' does not support option amendment");
        return Err(Error::new(ErrorKind::NotSupported, words));
    }
    Ok(driver.amend_options().to_vec())
}

/// Prints the options that `-o` takes.
fn help(format: &str) -> Result<()> {
    let mut specs = amend_options(format)?;
    specs.sort_by_key(|spec| spec.name);
    let mut out = format!("Amend options for '{format}':\n");
    for spec in specs {
        let kind = match spec.kind {
            OptionKind::Bool => "bool (on/off)",
            OptionKind::Number => "num",
            OptionKind::Size => "size",
            _ => "str",
        };
        let left = format!("{}=<{kind}>", spec.name);
        out += &format!("  {left:<22} - {}\n", spec.help);
    }
    printer::text(&out)
}
