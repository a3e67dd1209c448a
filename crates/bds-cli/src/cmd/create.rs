//! `create`: a new image.

use std::path::Path;

use bds_core::driver::{DriverType, OpenFlags};
use bds_core::graph::{Graph, NewImage};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Options, Result};

use crate::args::Create;
use crate::image::{self, Spec};
use crate::partial::Partial;
use crate::printer;
use crate::stop::Stop;

pub(crate) fn run(args: &Create) -> Result<()> {
    image::refuse_objects(&args.object)?;
    if wants_help(&args.options) {
        return help(&args.format, args.filename.as_deref());
    }
    let Some(filename) = args.filename.as_deref() else {
        return Err(Error::new(ErrorKind::InvalidInput, "Expecting image file name"));
    };
    let mut options = format_options(&args.options)?;
    set_backing(&mut options, args.backing.as_deref(), args.backing_format.as_deref())?;
    if let Some(text) = &args.size {
        options.set("size", super::size("image size", text)?);
    }
    if !options.contains("size") && !options.contains("backing_file") {
        return Err(Error::new(ErrorKind::InvalidInput, "Image creation needs a size parameter")
            .file(filename));
    }
    let graph = image::trusting_graph();
    image::block_on(async {
        // What is dropped half-way is removed again.
        let stop = Stop::watch()?;
        let made = make(&graph, &args.format, filename, options, args.backing_unsafe, args.quiet);
        stop.or_drop(made).await
    })
}

/// Makes an image and says so as qemu-img does.
async fn make(
    graph: &Graph,
    format: &str,
    filename: &str,
    options: Options,
    skip_backing: bool,
    is_quiet: bool,
) -> Result<()> {
    let given = options.clone();
    create(graph, format, filename, options, skip_backing).await?;
    if is_quiet {
        return Ok(());
    }
    let size = match given.peek("size").and_then(serde_json::Value::as_u64) {
        Some(size) => size,
        None => {
            let flags = OpenFlags { read_only: true, info_only: true, ..OpenFlags::default() };
            let typed = format!("file:{filename}");
            let spec = Spec { name: &typed, is_options: false, format: Some(format), flags };
            image::open(graph, &spec).await?.len()
        }
    };
    let driver = graph.config().registry.format(format)?;
    printer::line(formatting(&**driver, filename, &given, size))
}

/// Makes an image; warns if its backing file could not be opened.
pub(crate) async fn create(
    graph: &Graph,
    format: &str,
    filename: &str,
    options: Options,
    skip_backing: bool,
) -> Result<()> {
    let path = filename.strip_prefix("file:").unwrap_or(filename);
    let image = NewImage { format: format.to_owned(), path: path.into(), options, skip_backing };
    let report = graph.create_image(image).await?;
    if let Some(error) = report.backing_error {
        printer::message(format_args!("bds: warning: {}", crate::report::words(&error)));
        printer::message(
            "Could not open backing image to determine size; the image was created with the size given.",
        );
    }
    Ok(())
}

/// The files that creating an image may make, before it does.
pub(crate) fn partial(filename: &str, options: &Options, keeps: bool) -> Partial {
    let data_file = options.peek("data_file").and_then(serde_json::Value::as_str);
    let files = [Some(filename.strip_prefix("file:").unwrap_or(filename)), data_file];
    Partial::before_creation(files.into_iter().flatten().map(Into::into), keeps)
}

/// All -o together.
pub(crate) fn format_options(texts: &[String]) -> Result<Options> {
    Options::parse(&texts.join(","))
}

pub(crate) fn wants_help(texts: &[String]) -> bool {
    texts.iter().flat_map(|text| text.split(',')).any(|word| word == "help" || word == "?")
}

/// -b and -F are other words for two options.
pub(crate) fn set_backing(
    options: &mut Options,
    file: Option<&str>,
    format: Option<&str>,
) -> Result<()> {
    for (key, value) in [("backing_file", file), ("backing_fmt", format)] {
        if let Some(value) = value {
            if options.contains(key) {
                return Err(Error::new(ErrorKind::InvalidInput, "the option is given twice")
                    .field("option", key));
            }
            options.set(key, value);
        }
    }
    if options.contains("backing_file") && !options.contains("backing_fmt") {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Backing file specified without backing format: add -F with its format",
        ));
    }
    Ok(())
}

/// qemu-img's order of qcow2's options; what is not here comes first.
const ORDER: [&str; 12] = [
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
];

/// "Formatting 'x', fmt=qcow2 cluster_size=65536 …": what was asked for and the defaults, as qemu-img prints them.
fn formatting(driver: &dyn DriverType, filename: &str, given: &Options, size: u64) -> String {
    let mut out = format!("Formatting '{filename}', fmt={}", driver.name());
    let specs = driver.create_options();
    let mut specs: Vec<&OptionSpec> = specs.iter().collect();
    if specs.iter().any(|spec| spec.name == ORDER[0]) {
        specs.sort_by_key(|spec| ORDER.iter().position(|name| *name == spec.name));
    }
    for spec in specs {
        let name = spec.name;
        let value = if name == "size" {
            Some(size.to_string())
        } else {
            given.peek(name).map(|value| printed(spec, value)).or_else(|| default_of(spec))
        };
        if let Some(value) = value {
            out += &format!(" {name}={value}");
        }
    }
    out
}

/// The default, unless qemu-img keeps it to itself.
fn default_of(spec: &OptionSpec) -> Option<String> {
    let is_silent = matches!(spec.name, "compat" | "preallocation" | "nocow" | "extent_size_hint");
    spec.default.filter(|_| !is_silent).map(str::to_owned)
}

fn printed(spec: &OptionSpec, value: &serde_json::Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match spec.kind {
        OptionKind::Size => bds_core::options::parse_size(&text).map_or(text, |n| n.to_string()),
        _ => text,
    }
}

/// What -o understands.
pub(crate) fn help(format: &str, filename: Option<&str>) -> Result<()> {
    let registry = bds_drivers::registry();
    let driver = registry.format(format)?;
    let mut out = match filename {
        None => format!("Supported {format} options:\n"),
        Some(_) => "Supported options:\n".to_owned(),
    };
    let mut specs: Vec<OptionSpec> = driver.create_options().to_vec();
    if let Some(filename) = filename {
        let protocol = registry.driver(image::protocol_of_file(Path::new(filename)))?;
        let is_new =
            |spec: &&OptionSpec| !driver.create_options().iter().any(|s| s.name == spec.name);
        specs.extend(protocol.create_options().iter().filter(is_new));
    }
    specs.sort_by_key(|spec| spec.name);
    for spec in specs {
        let kind = match spec.kind {
            OptionKind::Bool => "bool (on/off)",
            OptionKind::Number => "num",
            OptionKind::Size => "size",
            OptionKind::String | OptionKind::Choice(_) | OptionKind::Child => "str",
        };
        let left = format!("{}=<{kind}>", spec.name);
        out += &format!("  {left:<22} - {}\n", spec.help);
    }
    if filename.is_none() {
        out += "\nThe protocol level may support further options.\n\
                Specify the target filename to include those options.\n";
    }
    printer::text(&out)
}
